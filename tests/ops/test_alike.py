"""Gradients that are of the kind that earlier ones were, and every way in which they may not be."""

from __future__ import annotations

import weakref

import pytest
import torch

from bitsandbytes import _alike
from bitsandbytes._alike import Likeness

needs_guards = pytest.mark.skipif(_alike._GUARDS is None, reason="this torch has no guards for tensors")


class Marked(torch.Tensor):
    pass


def gradients() -> list[torch.Tensor]:
    return [torch.randn(5, 3), torch.randn(7), torch.randn(())]


def remembered() -> Likeness:
    likeness = Likeness()
    likeness.remember(gradients())
    return likeness


@needs_guards
def test_new_tensors_of_the_same_kind_are_alike():
    assert remembered().holds(gradients())


CHANGES = {
    "dtype": lambda g: g.half(),
    "strides": lambda g: g.t().contiguous().t(),
    "shape": lambda g: g.reshape(3, 5),
    "a lazy negation": torch._neg_view,
    "a subclass": lambda g: g.as_subclass(Marked),
    "a parameter": torch.nn.Parameter,
    "device": lambda g: g.to("meta"),
    "absence": lambda g: None,
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_else_it_is_is_noticed(change):
    likeness, (first, *others) = remembered(), gradients()

    assert not likeness.holds([CHANGES[change](first), *others])


def test_nothing_is_like_what_was_never_remembered():
    assert not Likeness().holds(gradients())


def test_no_tensor_is_kept_alive():
    likeness, grads = Likeness(), gradients()
    likeness.remember(grads)
    references = [weakref.ref(g) for g in grads]
    del grads

    assert not any(reference() is not None for reference in references)


def test_without_guards_every_question_is_asked(monkeypatch):
    def with_other_arguments(tensors):
        raise AssertionError("is not called like this")

    for guards in (None, with_other_arguments):
        monkeypatch.setattr(_alike, "_GUARDS", guards)
        assert not remembered().holds(gradients())


def test_shared_tensors_are_never_alike():
    likeness, grads = Likeness(), [torch.ones(3)] * 2
    likeness.remember(grads)

    assert not likeness.holds(grads)
