"""Face: the package directory, the shared library's suffix, project URLs."""

from __future__ import annotations

from ._native.specs import DYNAMIC_LIBRARY_SUFFIX, NONPYTORCH_DOC_URL, PACKAGE_DIR, PACKAGE_GITHUB_URL

__all__ = ["DYNAMIC_LIBRARY_SUFFIX", "NONPYTORCH_DOC_URL", "PACKAGE_DIR", "PACKAGE_GITHUB_URL"]
