"""Face: replacing linear layers, outlier tracing, dictionaries as tensors, device synchronization."""

from __future__ import annotations

from ._formats.state import pack_dict_to_tensor, unpack_tensor_to_dict
from ._formats.table import INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING, LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING
from ._native import sync_gpu
from .diagnostics.utils import execute_and_return
from .nn.outliers import OutlierTracer, find_outlier_dims, logger, outlier_hook
from .nn.surgery import replace_linear

__all__ = [
    "INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING",
    "LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING",
    "OutlierTracer",
    "execute_and_return",
    "find_outlier_dims",
    "logger",
    "outlier_hook",
    "pack_dict_to_tensor",
    "replace_linear",
    "sync_gpu",
    "unpack_tensor_to_dict",
]
