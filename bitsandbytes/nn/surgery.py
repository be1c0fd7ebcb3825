"""Replacing the linear layers of a model in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

__all__ = ["replace_linear"]


def replace_linear(
    model: nn.Module,
    linear_replacement: Callable[[int, int, bool], nn.Module],
    skip_modules: Sequence[str] = ("lm_head",),
    copy_weights: bool = False,
    post_processing_function: str | None = None,
) -> nn.Module:
    """Replace every ``nn.Linear`` below ``model``, in place, and return ``model``.

    Args:
        model: a model that is itself a linear layer stays as it is.
        linear_replacement: called as ``(in_features, out_features, has_bias)``.
        skip_modules: own names (not paths) of children that stay.
        copy_weights: give the new layers the parameters of the old ones.
        post_processing_function: name of a method to call on each old layer that has it, with the layer as the only
            argument.
    """
    for name, module in list(model.named_children()):
        replace_linear(module, linear_replacement, skip_modules, copy_weights, post_processing_function)
        if not isinstance(module, nn.Linear) or name in skip_modules:
            continue
        replacement = linear_replacement(module.in_features, module.out_features, module.bias is not None)
        if copy_weights:
            replacement.weight = module.weight
            replacement.bias = module.bias
        setattr(model, name, replacement)
        if post_processing_function is not None:
            process = getattr(module, post_processing_function, None)
            if process is not None:
                process(module)
    return model
