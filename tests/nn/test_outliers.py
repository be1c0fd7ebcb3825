"""Outlier tracing: which dimensions are found, when hooks are there, what an outlier-aware layer does."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

import bitsandbytes as bnb
from bitsandbytes.utils import OutlierTracer, find_outlier_dims, outlier_hook


@pytest.fixture
def tracer(monkeypatch) -> OutlierTracer:
    """A tracer of its own for each test."""
    monkeypatch.setattr(OutlierTracer, "_instance", None)
    return OutlierTracer.get_instance()


def test_find_outlier_dims_finds_the_wide_columns(device):
    weight = torch.randn(64, 200, device=device)
    weight[:, [7, 120]] *= 30
    assert sorted(find_outlier_dims(weight).tolist()) == [7, 120]
    assert sorted(find_outlier_dims(weight, topk=2).tolist()) == [7, 120]
    assert sorted(find_outlier_dims(weight.t(), reduction_dim=1).tolist()) == [7, 120]
    assert find_outlier_dims(weight, zscore=100.0).numel() == 0
    assert find_outlier_dims(weight.half(), topk=1).shape == (1,)


def test_random_dims_are_valid_indices(device):
    dims = find_outlier_dims(torch.zeros(4, 6, device=device), topk=50, rdm=True)
    assert dims.shape == (50,) and dims.dtype == torch.int64
    assert dims.min() >= 0 and dims.max() < 6


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("shape", [(1, 8), (8, 1), (1, 1)])
def test_too_few_values_have_no_outliers(shape):
    assert find_outlier_dims(torch.randn(shape)).numel() == 0


def test_tracer_is_a_singleton(tracer):
    assert OutlierTracer.get_instance() is tracer
    with pytest.raises(RuntimeError, match="get_instance"):
        OutlierTracer()


def test_uninitialized_tracer_says_so(tracer, caplog):
    assert not tracer.is_initialized()
    with caplog.at_level(logging.WARNING, logger="bitsandbytes.utils"):
        assert tracer.get_outliers(torch.zeros(2, 2)) is None
    assert "not initialized" in caplog.text


def test_tracer_watches_the_first_run(tracer, device):
    model = nn.Sequential(nn.Linear(40, 100), nn.ReLU(), nn.Linear(100, 30)).to(device)
    first, last = model[0], model[2]
    with torch.no_grad():
        last.weight[:, 11] *= 100
    x = torch.randn(2, 3, 40, device=device)
    x[1, 2, 17] = 6.5

    tracer.initialize(model)
    assert tracer.is_initialized() and len(tracer.hooks) == 2
    assert tracer.get_outliers(first.weight) is None, "nothing has run"
    model(x)

    assert tracer.get_outliers(first.weight).tolist() == [17], "the first layer's come from its input"
    assert tracer.get_outliers(last.weight).tolist() == [11], "the others' from their weight"
    assert len(tracer.outliers) == len(tracer.hvalues) == 2
    assert tracer.get_hvalue(last.weight) == last.weight.untyped_storage().data_ptr()
    assert first._forward_pre_hooks and last._forward_pre_hooks

    model(x)
    assert not first._forward_pre_hooks and not last._forward_pre_hooks, "a second run needs no hooks"


def test_first_layer_indices_are_columns_however_many_rows(tracer):
    layer = nn.Linear(5, 2)
    tracer.initialize(nn.Sequential(layer))
    x = torch.full((500, 5), 0.1) * torch.arange(5)
    x[450] *= 50  # a wide row, not a column
    layer(x)
    assert all(index < 5 for index in tracer.get_outliers(layer.weight).tolist())


def test_initialize_forgets_the_model_before(tracer):
    before, after = nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4))
    tracer.initialize(before)
    before(torch.randn(2, 4))
    tracer.initialize(after)
    assert not before[0]._forward_pre_hooks
    assert tracer.get_outliers(before[0].weight) is None


def test_hook_is_for_linear_layers(tracer):
    with pytest.raises(AssertionError):
        outlier_hook(nn.ReLU(), (torch.zeros(1),))


class RoundedLinear(bnb.nn.OutlierAwareLinear):
    def quantize_weight(self, w, outlier_idx):
        self.seen = outlier_idx
        rounded = w.round()
        rounded[:, outlier_idx] = w[:, outlier_idx]
        return rounded

    def forward_with_outliers(self, x, outlier_idx):
        return nn.functional.linear(x, self.weight, self.bias)


def test_outlier_aware_layer_quantizes_once(tracer):
    layer = RoundedLinear(40, 8)
    weight = layer.weight.detach().clone()
    weight[:, 3] *= 100
    layer.weight.data.copy_(weight)
    model = nn.Sequential(nn.Linear(40, 40), layer)
    tracer.initialize(model)

    assert model(torch.randn(2, 40)) is None

    assert layer.is_quantized and layer.outlier_dim.tolist() == [3] and layer.seen is layer.outlier_dim
    expected = weight.round()
    expected[:, 3] = weight[:, 3]
    assert torch.equal(layer.weight.data, expected)
    layer.seen = None
    model(torch.randn(2, 40))
    assert layer.seen is None, "the weight is quantized once"
    assert layer.forward_with_outliers(torch.randn(2, 40), layer.outlier_dim).shape == (2, 8)


def test_outlier_aware_layer_is_abstract(tracer):
    layer = bnb.nn.OutlierAwareLinear(4, 4, bias=False)
    assert layer.bias is None and layer.outlier_dim is None and layer.is_quantized is False
    with pytest.raises(NotImplementedError, match="override"):
        layer.forward_with_outliers(torch.zeros(1, 4), None)
    with (
        pytest.warns(UserWarning, match=r"Please use OutlierTracer.initialize\(model\) before using"),
        pytest.raises(NotImplementedError, match="override"),
    ):
        layer(torch.zeros(1, 4))
