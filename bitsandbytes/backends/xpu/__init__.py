"""The xpu backend."""

__all__: list[str] = []
