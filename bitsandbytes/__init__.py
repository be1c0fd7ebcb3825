"""Quantized layers and optimizers that make large models fit: 4-bit, LLM.int8() and 8-bit optimizer states."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import _ops, backends, functional
from .backends import load_builtin as _load_builtin, load_plugins as _load_plugins

if TYPE_CHECKING:
    from . import autograd, cextension, consts, cuda_specs, nn, optim, research, utils
    from .autograd._functions import MatmulLtState, matmul, matmul_4bit
    from .nn import modules
    from .optim import adam

__version__ = "0.50.0.dev0"

features = {"multi_backend"}
supported_torch_devices = {"cpu", "cuda", "xpu", "hpu", "npu", "mps"}

__pdoc__ = {
    "libbitsandbytes": False,
    "optim.optimizer.Optimizer8bit": False,
    "optim.optimizer.MockArgs": False,
}

__all__ = [
    "MatmulLtState",
    "__version__",
    "adam",
    "autograd",
    "backends",
    "cextension",
    "consts",
    "cuda_specs",
    "features",
    "functional",
    "matmul",
    "matmul_4bit",
    "modules",
    "nn",
    "optim",
    "research",
    "supported_torch_devices",
    "utils",
]

# Imported when first asked for: name -> module, or module and attribute.
_LAZY: dict[str, str | tuple[str, str]] = {
    "MatmulLtState": ("autograd._functions", "MatmulLtState"),
    "adam": "optim.adam",
    "autograd": "autograd",
    "cextension": "cextension",
    "consts": "consts",
    "cuda_specs": "cuda_specs",
    "diagnostics": "diagnostics",
    "matmul": ("autograd._functions", "matmul"),
    "matmul_4bit": ("autograd._functions", "matmul_4bit"),
    "modules": "nn.modules",
    "nn": "nn",
    "optim": "optim",
    "research": "research",
    "utils": "utils",
}


def __getattr__(name: str) -> Any:
    target = _LAZY.get(name)
    if target is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = (target, None) if isinstance(target, str) else target
    value: Any = importlib.import_module(f"{__name__}.{module}")
    if attribute is not None:
        value = getattr(value, attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


# The loaded backends' operator modules are attributes of the package: `bitsandbytes.cpu_ops` and so on.
for _name, _module in _load_builtin().items():
    globals()[f"{_name}_ops"] = _module
_load_plugins()
