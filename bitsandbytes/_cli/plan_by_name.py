"""Which tensors to quantize when transformers cannot say: a rule on names and shapes.

Quantized are the two-dimensional floating-point tensors named ``<module>.weight`` whose module is not named like an
embedding, a normalization, a router or an output head, and whose sides are both at least 16. Every other
two-dimensional weight is listed in the config as skipped, so a loader that knows the model replaces the same layers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import torch

from .checkpoint import Checkpoint
from .errors import CliError
from .plan import Item, Plan, Stored, first_float_dtype

__all__ = ["plan_by_name"]

_WEIGHT = ".weight"
_NOT_LINEAR = re.compile(
    r"embed|wte|wpe|norm|(^|[._])ln(_|\d|$)|shared$|position|relative_attention_bias|router|(^|\.)gate$|"
    r"(^|[._])(lm_head|head|score|classifier|qa_outputs|output_projection|decoder)$",
    re.IGNORECASE,
)
_SMALLEST_SIDE = 16
_STORED_TRANSPOSED = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")


def plan_by_name(checkpoint: Checkpoint, config_file: dict, skip: Sequence[str]) -> Plan:
    """Plan by the rule above; ``skip`` are more modules to leave alone, matched as a loader matches them.

    Raises:
        CliError: the model is of a kind that stores weights in another form.
    """
    if config_file.get("model_type") in _STORED_TRANSPOSED:
        raise CliError(
            f"a {config_file['model_type']} model stores its weights transposed: quantizing it needs transformers "
            "(pip install bitsandbytes[cli])"
        )
    # The bare model's names lack the part that most names begin with ("model.", "bert.").
    prefix = Counter(name.partition(".")[0] for name in checkpoint).most_common(1)[0][0] + "."
    items, skipped = [], set(skip)
    for name, entry in checkpoint.entries.items():
        module = None
        if name.endswith(_WEIGHT) and len(entry.shape) == 2:
            module = name.removesuffix(_WEIGHT)
            quantizable = entry.dtype.is_floating_point and min(entry.shape) >= _SMALLEST_SIDE
            if not quantizable or _NOT_LINEAR.search(module) or _matches(module, skip):
                skipped |= {module, module.removeprefix(prefix)}
                module = None
        items.append(Item(name, Stored(checkpoint, name), module))
    # A name also skips every module that ends with it: what it catches by accident must not be quantized either.
    for item in items:
        if item.module is not None and _matches(item.module, sorted(skipped)):
            item.module = None
    dtype = getattr(torch, str(config_file.get("dtype") or config_file.get("torch_dtype")), None)
    if not isinstance(dtype, torch.dtype):
        dtype = first_float_dtype(checkpoint)
    return Plan(items, dtype, sorted(skipped))


def _matches(module: str, patterns: Sequence[str]) -> bool:
    return any(
        module.endswith(pattern) or re.match(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))", module)
        for pattern in patterns
    )
