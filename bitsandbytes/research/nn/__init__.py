"""Face: linear layers that train in emulated FP8."""

from .modules import LinearFP8Global, LinearFP8Mixed

__all__ = ["LinearFP8Global", "LinearFP8Mixed"]
