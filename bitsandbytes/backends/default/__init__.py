"""Plain torch: the oracle of every operator, and the kernel of every device that has none of its own."""

from . import embedding, grouped, optimizer_4bit, optimizers, rounding

__all__ = ["embedding", "grouped", "optimizer_4bit", "optimizers", "rounding"]
