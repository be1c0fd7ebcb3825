"""Optimizers by name and settings, for programs that choose by configuration."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from . import adagrad, adam, adamw, adamw4bit, ademamix, lamb, lars, lion, muon, rmsprop, sgd
from ._base import Optimizer8bit

__all__ = ["create"]

# Every class by (family, bits, paged).
_FAMILIES = {
    "adagrad": (adagrad, "Adagrad"),
    "adam": (adam, "Adam"),
    "adamw": (adamw, "AdamW"),
    "ademamix": (ademamix, "AdEMAMix"),
    "lamb": (lamb, "LAMB"),
    "lars": (lars, "LARS"),
    "lion": (lion, "Lion"),
    "rmsprop": (rmsprop, "RMSprop"),
    "sgd": (sgd, "SGD"),
}
_CLASSES: dict[tuple[str, int, bool], type[Optimizer8bit]] = {
    (name, bits, paged): getattr(module, f"{'Paged' * paged}{family}{bits}bit")
    for name, (module, family) in _FAMILIES.items()
    for bits in (8, 32)
    for paged in (False, True)
    if hasattr(module, f"{'Paged' * paged}{family}{bits}bit")
}
_CLASSES["adamw", 4, False] = _CLASSES["adamw", 4, True] = adamw4bit.AdamW4bit
_CLASSES["muon", 8, False] = muon.Muon8bit

_UNLISTED = ("stochastic_rounding", "percentile_clipping", "block_wise")  # accepted, though in no signature


def create(
    name: str, params: Iterable[Any], *, bits: int | None = None, paged: bool = False, **settings: Any
) -> Optimizer8bit:
    """Make the optimizer that ``name``, ``bits`` and ``paged`` stand for: ``create("adamw", params, paged=True)``.

    Args:
        name: adagrad, adam, adamw, ademamix, lamb, lars, lion, muon, rmsprop or sgd; case does not matter.
        params: parameters or groups of them.
        bits: how the state is kept, 8 unless given; 32 too except for muon; 4 for adamw.
        paged: keep large state in pageable memory; for adam, adamw, ademamix and lion.
        settings: what the class takes, by its names: ``lr``, ``betas``, ``weight_decay``, ``stochastic_rounding``, ...

    Raises:
        ValueError: there is no such name, combination or setting, or a setting makes no sense.
    """
    names = sorted({family for family, _, _ in _CLASSES})
    family = name.lower() if isinstance(name, str) else name
    if family not in names:
        raise ValueError(f"there is no optimizer {name!r}; choose one of {', '.join(names)}")
    bits = 8 if bits is None else bits
    kind = _CLASSES.get((family, bits, paged)) if isinstance(bits, int) and isinstance(paged, bool) else None
    if kind is None:
        there_are = ", ".join(f"bits={b}{', paged=True' * p}" for f, b, p in sorted(_CLASSES) if f == family)
        raise ValueError(f"{family} has no bits={bits!r}, paged={paged!r}; there are: {there_are}")
    known = [
        key for key in inspect.signature(kind).parameters if key not in ("params", "optim_bits", "is_paged")
    ]
    unknown = sorted(settings.keys() - set(known) - set(_UNLISTED))
    if unknown:
        raise ValueError(f"{kind.__name__} has no setting {', '.join(unknown)}; it takes {', '.join(known)}")
    if "lr" not in settings and inspect.signature(kind).parameters["lr"].default is inspect.Parameter.empty:
        raise ValueError(f"{kind.__name__} needs lr")
    if kind is adamw4bit.AdamW4bit:
        settings["is_paged"] = paged
    return kind(params, **settings)
