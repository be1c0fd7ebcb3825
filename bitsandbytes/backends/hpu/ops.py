"""Habana Gaudi: no kernel of its own yet; every operator runs as the default backend's plain torch."""

from __future__ import annotations

__all__: list[str] = []
