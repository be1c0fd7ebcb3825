"""Embeddings: initialisation and overrides of the float ones, look-ups and error bounds of the quantized ones."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings

import pytest
import torch
from torch import nn

import bitsandbytes as bnb
from bitsandbytes._overrides import GlobalOptimManager
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import (
    Embedding,
    Embedding4bit,
    Embedding8bit,
    EmbeddingFP4,
    EmbeddingNF4,
    Int8Params,
    Params4bit,
    StableEmbedding,
)
from oracles import STORAGE_DTYPES, assert_same_bytes

QUANTIZED = [Embedding8bit, Embedding4bit, EmbeddingFP4, EmbeddingNF4]
FOUR_BIT = [Embedding4bit, EmbeddingFP4, EmbeddingNF4]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]

# The warning about sizes that blocks do not divide has its own test.
pytestmark = pytest.mark.filterwarnings("ignore:Embedding size:UserWarning")


class TestFloat:
    @pytest.mark.parametrize("cls", [Embedding, StableEmbedding])
    def test_xavier_rows_and_a_zero_padding_row(self, device, cls):
        layer = cls(40, 24, padding_idx=3, device=device)
        bound = (6 / (40 + 24)) ** 0.5
        assert layer.weight.abs().max() <= bound
        assert layer.weight.abs().max() > 0.9 * bound
        assert layer.weight[3].eq(0).all()
        assert layer.weight.device.type == device

    @pytest.mark.parametrize("cls", [Embedding, StableEmbedding])
    def test_asks_for_32_bit_optimizer_state(self, cls):
        layer = cls(40, 24)
        requests = GlobalOptimManager.get_instance().module_weight_config_triple
        assert [(n, c) for m, n, c in requests if m is layer] == [("weight", {"optim_bits": 32})]

    def test_plain_look_up(self, device):
        layer = Embedding(40, 24, device=device)
        indices = torch.randint(40, (2, 3), device=device)
        assert torch.equal(layer(indices), layer.weight[indices])

    @pytest.mark.parametrize("dtype", [None, *DTYPES])
    def test_normalised_look_up_in_the_weight_dtype(self, device, dtype):
        layer = StableEmbedding(40, 24, device=device, dtype=dtype)
        indices = torch.randint(40, (2, 3), device=device)
        y = layer(indices)
        expected = nn.functional.layer_norm(layer.weight[indices].float(), (24,))
        assert y.dtype == layer.weight.dtype == (dtype or torch.float32)
        assert layer.norm.weight.dtype == torch.float32 and layer.norm.weight.device.type == device
        assert torch.equal(y, expected.to(y.dtype))
        assert list(layer.state_dict()) == ["weight", "norm.weight", "norm.bias"]
        assert layer.half()(indices).dtype == torch.float16

    def test_given_weight_is_taken(self):
        table = torch.randn(5, 4)
        assert torch.equal(Embedding(5, 4, _weight=table).weight, table)
        assert torch.equal(StableEmbedding(5, 4, _weight=table).weight, table)

    def test_signatures_are_the_published_ones(self):
        names = "num_embeddings embedding_dim padding_idx max_norm norm_type scale_grad_by_freq sparse _weight device"
        assert list(inspect.signature(Embedding).parameters) == names.split()
        assert list(inspect.signature(StableEmbedding).parameters) == [*names.split(), "dtype"]


class TestQuantized:
    def test_signatures_are_the_published_ones(self):
        def names(cls):
            return list(inspect.signature(cls).parameters)

        assert names(Embedding8bit) == ["num_embeddings", "embedding_dim", "device", "dtype"]
        assert names(Embedding4bit) == [
            "num_embeddings",
            "embedding_dim",
            "dtype",
            "quant_type",
            "quant_storage",
            "device",
        ]
        for cls in (EmbeddingFP4, EmbeddingNF4):
            assert names(cls) == ["num_embeddings", "embedding_dim", "dtype", "quant_storage", "device"]
        for cls in QUANTIZED:
            assert cls.__module__ == "bitsandbytes.nn.modules"
            assert getattr(bnb.nn.modules, cls.__name__) is cls

    def test_parameters_and_formats(self, device):
        layer = EmbeddingNF4(10, 64).to(device)
        assert type(layer.weight) is Params4bit and layer.weight.module is layer
        assert layer.weight.quant_state.quant_type == "nf4" and not layer.weight.quant_state.nested
        assert layer.quant_storage == torch.uint8 and layer.quant_state is layer.weight.quant_state
        assert type(Embedding8bit(10, 64).weight) is Int8Params

    @pytest.mark.parametrize("dim", [64, 128, 80, 33])
    @pytest.mark.parametrize("cls", QUANTIZED)
    def test_error_bounds(self, device, cls, dim):
        exact = nn.Embedding(50, dim)
        exact.weight.data.uniform_()
        layer = cls(50, dim)
        layer.weight.data = exact.weight.data.clone()
        indices = torch.arange(50)
        error = (layer.to(device)(indices.to(device)).cpu() - exact(indices)).abs().max()
        assert error < (0.05 if cls is Embedding8bit else 0.20)

    @pytest.mark.parametrize("dim", [64, 33])
    @pytest.mark.parametrize("cls", QUANTIZED)
    def test_tables_of_ones_are_exact(self, device, cls, dim):
        table = torch.randint(2, (50, dim)) * 2.0 - 1.0
        table[:, 0] = 1.0  # each row has its extreme value
        layer = cls(50, dim)
        layer.weight.data = table.clone()
        assert torch.equal(layer.to(device)(torch.arange(50, device=device)).cpu(), table)

    @pytest.mark.parametrize("storage", STORAGE_DTYPES)
    @pytest.mark.parametrize("dim", [128, 48])
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("cls", FOUR_BIT)
    def test_look_up_is_the_row_of_the_decoded_table(self, device, cls, dtype, dim, storage):
        layer = cls(50, dim, dtype=dtype, quant_storage=storage).to(device)
        table = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        for shape in [(), (3,), (0,), (2, 3), (2, 1, 3)]:
            indices = torch.randint(50, shape, device=device)
            rows = layer(indices)
            assert rows.dtype == dtype and rows.shape == (*shape, dim)
            assert torch.equal(rows, table[indices])

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_8_bit_look_up_is_code_times_scale(self, device, dtype):
        layer = Embedding8bit(50, 24, dtype=dtype).to(device)
        table = (layer.weight.data.double() * layer.weight.SCB.double().view(-1, 1) / 127).cpu()
        for shape in [(), (3,), (0,), (2, 3), (2, 1, 3)]:
            indices = torch.randint(50, shape, device=device)
            rows = layer(indices)
            assert rows.dtype == dtype and rows.shape == (*shape, 24)
            torch.testing.assert_close(rows.cpu().double(), table[indices.cpu()], rtol=1e-2, atol=0)

    def test_a_nested_table_is_looked_up_too(self, device):
        layer = EmbeddingNF4(50, 64)
        layer.weight.compress_statistics = True
        layer.to(device)
        table = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        indices = torch.randint(50, (7,), device=device)
        assert layer.weight.quant_state.nested
        assert torch.equal(layer(indices), table[indices])

    def test_sizes_that_blocks_do_not_divide_are_reported(self, caplog):
        with pytest.warns(UserWarning, match=r"not divisible by block size.*slow inference"):
            EmbeddingNF4(10, 65)
        assert "not divisible by block size" in caplog.text
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            EmbeddingNF4(10, 128)

    def test_unquantized_tables_say_what_to_do(self):
        with pytest.raises(RuntimeError, match="Embedding layer is not quantized"):
            Embedding8bit(10, 64)(torch.tensor([1]))
        with (
            pytest.warns(UserWarning, match="not initialized"),
            pytest.raises(AssertionError, match="quantize"),
        ):
            EmbeddingNF4(10, 64)(torch.tensor([1]))

    def test_bad_options_and_indices(self, device):
        with pytest.raises(ValueError, match="quant_type"):
            Embedding4bit(10, 64, quant_type="int4")
        with pytest.raises(ValueError, match="quant_storage"):
            Embedding4bit(10, 64, quant_storage=torch.int32)
        for cls in QUANTIZED:
            with pytest.raises(ValueError, match="indices must be int32 or int64"):
                cls(10, 64).to(device)(torch.ones(1, device=device))

    @pytest.mark.parametrize("index", [10, -1, 2**40])
    @pytest.mark.parametrize("dim", [64, 33])
    @pytest.mark.parametrize("cls", QUANTIZED)
    def test_an_index_that_is_none(self, device, cls, dim, index):
        """An error on the CPU; a GPU cannot say without waiting, and a row of NaN leaves nothing corrupted."""
        layer, indices = cls(10, dim).to(device), torch.tensor([3, index], device=device)
        if device == "cpu":
            with pytest.raises(IndexError, match=f"index {index} is out of range for a table of 10 rows"):
                layer(indices)
        elif device == "cuda":
            good, bad = layer(indices)
            assert bad.isnan().all() and torch.equal(good, layer(indices[:1])[0])

    def test_recovers_the_state_of_a_replaced_parameter(self, device):
        layer = EmbeddingNF4(10, 64, quant_storage=torch.float16).to(device)
        indices = torch.arange(10, device=device)
        expected = layer(indices)
        layer.weight = nn.Parameter(layer.weight.data, requires_grad=False)
        assert torch.equal(layer(indices), expected)

    @pytest.mark.parametrize("cls", QUANTIZED)
    def test_moves_and_casts(self, device, cls):
        layer = nn.Sequential(cls(10, 64)).to("cpu")
        indices = torch.arange(10)
        expected = layer(indices)
        layer.half().to(device)
        assert torch.equal(layer(indices.to(device)).cpu(), expected)
        saved = copy.deepcopy(layer.state_dict())
        layer.to("meta")
        assert list(layer.state_dict()) == list(saved)
        layer.to_empty(device=device).load_state_dict(saved)
        assert torch.equal(layer(indices.to(device)).cpu(), expected)

    @pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
    @pytest.mark.parametrize("cls", QUANTIZED)
    def test_copies(self, cls, how):
        layer = cls(10, 64).to("cpu")
        twin = how(layer)
        indices = torch.arange(10)
        assert type(twin.weight) is type(layer.weight)
        assert torch.equal(twin(indices), layer(indices))
        for key, value in layer.state_dict().items():
            assert_same_bytes(twin.state_dict()[key], value)

    @pytest.mark.parametrize("dim", [64, 48])
    @pytest.mark.parametrize("cls", QUANTIZED)
    def test_one_graph_for_every_number_of_rows(self, device, cls, dim):
        torch._dynamo.reset()
        graphs = []
        layer = cls(50, dim, dtype=torch.bfloat16).to(device)
        compiled = torch.compile(
            layer, fullgraph=True, dynamic=True, backend=lambda g, _: graphs.append(g) or g
        )
        for rows in (4, 3, 7):
            indices = torch.randint(50, (2, rows), device=device)
            assert torch.equal(compiled(indices), layer(indices))
        assert len(graphs) == 1
        torch._dynamo.reset()

    def test_inductor_gives_the_same_rows(self, device):
        torch._dynamo.reset()
        layer = EmbeddingNF4(50, 64, dtype=torch.float16).to(device)
        indices = torch.randint(50, (2, 5), device=device)
        assert torch.equal(torch.compile(layer, fullgraph=True)(indices), layer(indices))
        torch._dynamo.reset()

    def test_repr_tells_format_block_size_and_dtypes(self):
        text = repr(EmbeddingNF4(10, 64, dtype=torch.float16).to("cpu"))
        for part in (
            "nf4",
            "blocksize=64",
            "dtype=torch.float16",
            "quant_storage=torch.uint8",
            "nested=False",
        ):
            assert part in text
        assert "int8" in repr(Embedding8bit(10, 64))
