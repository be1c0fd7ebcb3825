"""The command line: quantize, inspect and selftest as thin commands over the public functions."""

from .main import main

__all__ = ["main"]
