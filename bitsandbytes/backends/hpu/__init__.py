"""The hpu backend."""

__all__: list[str] = []
