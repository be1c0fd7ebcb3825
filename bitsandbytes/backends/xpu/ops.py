"""Intel GPUs: no kernel of their own yet; every operator runs as the default backend's plain torch."""

from __future__ import annotations

__all__: list[str] = []
