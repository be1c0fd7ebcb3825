"""Entry points for devices that Triton compiles for."""

__all__: list[str] = []
