"""LAMB: Adam whose update is limited to a multiple of the parameter's norm (You et al., 2019).

The limit is a clip: it never lengthens an update. A parameter of zeros has none, so it can leave zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from ._base import Optimizer2State
from ._variants import accepts_older_keywords, warn_ignored

__all__ = ["LAMB", "LAMB8bit", "LAMB32bit"]


class LAMBFamily(Optimizer2State, rule="lamb"):
    """The signature that all LAMB classes share.

    Args:
        params, lr, betas, eps, weight_decay, optim_bits, args, min_8bit_size: as in ``Adam``.
        bias_correction, adam_w_mode: always on.
        amsgrad: not available.
        max_unorm: the update's norm may be at most this times the parameter's.

    Raises:
        ValueError: a negative, infinite or NaN setting, or a beta outside [0, 1).
    """

    @accepts_older_keywords
    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        bias_correction: bool = True,
        betas: Sequence[float] | str = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        adam_w_mode: bool = True,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        max_unorm: float = 1.0,
    ) -> None:
        if amsgrad:
            warn_ignored(self, amsgrad=amsgrad)
        if not bias_correction:
            warn_ignored(self, bias_correction=bias_correction)
        if not adam_w_mode:
            warn_ignored(self, adam_w_mode=adam_w_mode)
        super().__init__(
            self._rule_name,
            params,
            lr,
            betas,
            eps,
            weight_decay,
            optim_bits,
            args,
            min_8bit_size,
            max_unorm=max_unorm,
        )


class LAMB(LAMBFamily):
    """LAMB with 8-bit or 32-bit state."""


class LAMB8bit(LAMBFamily, bits=8, hides=("optim_bits",), requires={"amsgrad": False, "max_unorm": 1.0}):
    """LAMB with 8-bit state. Its ``max_unorm`` is 1; ``args`` or an override sets another."""


class LAMB32bit(LAMBFamily, bits=32, hides=("optim_bits",)):
    """LAMB with 32-bit state."""
