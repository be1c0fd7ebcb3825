"""What ``python -m bitsandbytes`` prints: the environment, the devices, the library, and whether it works."""

__all__ = ["cuda", "main", "utils"]
