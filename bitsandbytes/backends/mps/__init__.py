"""The mps backend."""

__all__: list[str] = []
