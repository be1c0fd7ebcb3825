"""Face: the SwitchBack layers."""

from .switchback import (
    StandardLinear,
    StandardLinearFunction,
    SwitchBackLinear,
    SwitchBackLinearGlobal,
    SwitchBackLinearGlobalMemEfficient,
    SwitchBackLinearVectorwise,
    _SwitchBackGlobal,
    _SwitchBackGlobalMemEfficient,
    _SwitchBackVectorwise,
)

__all__ = [
    "StandardLinear",
    "StandardLinearFunction",
    "SwitchBackLinear",
    "SwitchBackLinearGlobal",
    "SwitchBackLinearGlobalMemEfficient",
    "SwitchBackLinearVectorwise",
    "_SwitchBackGlobal",
    "_SwitchBackGlobalMemEfficient",
    "_SwitchBackVectorwise",
]
