"""Runs at Python's start from the first folder of PYTHONPATH: lets a copy of the package win there.

An editable install puts a finder before the module path, which would find the checkout, and its native library, first.
"""

from __future__ import annotations

import sys

sys.meta_path[:] = [
    finder for finder in sys.meta_path if not type(finder).__module__.startswith("_editable_")
]
