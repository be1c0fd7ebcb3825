"""AdamW: Adam that decays weights by default."""

from __future__ import annotations

from .adam import ONLY_8BIT, AdamFamily

__all__ = ["AdamW", "AdamW8bit", "AdamW32bit", "PagedAdamW", "PagedAdamW8bit", "PagedAdamW32bit"]


class AdamWFamily(AdamFamily, defaults={"weight_decay": 1e-2}):
    """The signature that all AdamW classes share: Adam's with another default."""


class AdamW(AdamWFamily):
    """AdamW with 8-bit or 32-bit state."""


class AdamW8bit(AdamWFamily, bits=8, requires=ONLY_8BIT):
    """AdamW with 8-bit state."""


class AdamW32bit(AdamWFamily, bits=32):
    """AdamW with 32-bit state."""


class PagedAdamW(AdamWFamily, paged=True, hides=("is_paged",)):
    """AdamW with state in pageable memory."""


class PagedAdamW8bit(AdamWFamily, bits=8, paged=True, hides=("is_paged",), requires=ONLY_8BIT):
    """AdamW with 8-bit state in pageable memory."""


class PagedAdamW32bit(AdamWFamily, bits=32, paged=True, hides=("is_paged",)):
    """AdamW with 32-bit state in pageable memory."""
