"""The autograd functions of :mod:`bitsandbytes.research`."""

__all__: list[str] = []
