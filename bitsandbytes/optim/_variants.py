"""How an optimizer class becomes one statement: a family states a signature, a variant how its state is kept.

A variant's constructor is the family's with some settings fixed, hence hidden or limited. It carries the resulting
signature, so that ``inspect.signature``, positional calls and editors see an ordinary class. ``percentile_clipping``
and ``block_wise`` of earlier releases are accepted by keyword everywhere but stand in no signature: programs look
there to learn whether they must pass them. So does ``stochastic_rounding``, for the signatures are published.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

__all__ = ["accepts_older_keywords", "variant_init", "warn_ignored"]

_UNLISTED = ("percentile_clipping", "block_wise", "stochastic_rounding")

_Init = TypeVar("_Init", bound=Callable[..., None])


def warn_ignored(owner: object, **settings: Any) -> None:
    """Warn about settings that were given but have no effect."""
    for name, value in settings.items():
        warnings.warn(f"{type(owner).__name__}: {name}={value!r} is accepted but has no effect", stacklevel=4)


def accepts_older_keywords(init: _Init) -> _Init:
    """Let a constructor take keywords that its signature does not show.

    ``percentile_clipping`` still clips. ``block_wise`` chose one scale for a whole tensor when False; 8-bit state is
    block-wise now. ``stochastic_rounding`` rounds bfloat16 parameters up or down at random, right on average.
    """

    @functools.wraps(init)
    def accept(self: Any, *args: Any, **kwargs: Any) -> None:
        percentile = kwargs.pop("percentile_clipping", None)
        if percentile is not None:
            if not 0 < percentile <= 100:
                raise ValueError(f"percentile_clipping must be between 1 and 100, got {percentile}")
            self._percentile_clipping = percentile
        if "stochastic_rounding" in kwargs:
            self._stochastic_rounding = _as_bool("stochastic_rounding", kwargs.pop("stochastic_rounding"))
        if not kwargs.pop("block_wise", True):
            warn_ignored(self, block_wise=False)
        init(self, *args, **kwargs)

    return accept  # type: ignore[return-value]


def _as_bool(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")
    return value


def variant_init(
    cls: type,
    fixed: Mapping[str, Any],
    hides: Collection[str],
    defaults: Mapping[str, Any],
    requires: Mapping[str, Any],
) -> Callable[..., None]:
    """A constructor for ``cls``: its parent's with settings ``fixed``.

    ``hides`` leave the signature, ``defaults`` change in it, and ``requires`` names the one value that a visible
    argument may have (``ValueError`` otherwise).
    """
    parent = cls.__init__  # type: ignore[misc]
    visible = [
        parameter.replace(default=defaults.get(name, parameter.default))
        for name, parameter in inspect.signature(parent).parameters.items()
        if name not in hides
    ]
    signature = inspect.Signature(visible)

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        older = {name: kwargs.pop(name) for name in _UNLISTED if name in kwargs}
        given = signature.bind(self, *args, **kwargs).arguments
        for name, only in requires.items():
            if given.get(name, only) != only:
                raise ValueError(f"{cls.__name__} supports only {name}={only!r}, got {given[name]!r}")
        parent(**{**defaults, **given, **fixed, **older})

    __init__.__signature__ = signature  # type: ignore[attr-defined]
    __init__.__qualname__ = f"{cls.__qualname__}.__init__"
    __init__.__module__ = cls.__module__
    return __init__
