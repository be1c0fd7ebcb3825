"""Which 4-bit matmul runs on which GPU: a pure function of the library, so it is held without one."""

from __future__ import annotations

import pytest
import torch

from bitsandbytes._native import ABI, DTYPE_ID, has_native, lib

pytestmark = pytest.mark.skipif(
    not has_native("bnb_cuda_gemm_4bit_plan"), reason="no native library with bnb_cuda_gemm_4bit_plan"
)

H200 = (90, 132)
A100 = (80, 108)
TURING = (75, 72)

LAYERS = [(4096, 4096), (14336, 4096), (4096, 14336), (8192, 8192), (28672, 8192), (1024, 4096), (384, 384)]


def plan(M, N, K, blocksize=64, dtype=torch.bfloat16, gpu=H200):
    return lib.bnb_cuda_gemm_4bit_plan(DTYPE_ID[dtype], M, N, K, blocksize, *gpu)


def dequantize():
    return ABI.constants["BNB_GEMM_DEQUANTIZE"]


def plain():
    return ABI.constants["BNB_GEMM_SIMT"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("N", "K"), LAYERS)
def test_few_tokens_read_the_weight_once(N, K, dtype):
    for M in (1, 2, 8, 16):
        assert plan(M, N, K, dtype=dtype) >= 0
        assert plan(M, N, K, dtype=dtype, gpu=A100) >= 0


@pytest.mark.parametrize("blocksize", [64, 128, 256, 512, 1024, 2048, 4096])
def test_every_block_that_fills_rows_has_a_fused_kernel(blocksize):
    assert plan(1, 4096, 4096, blocksize) >= 0


@pytest.mark.parametrize(
    ("K", "blocksize"), [(96, 64), (4096 + 64, 128), (64, 128), (65, 64), (4096, 96), (4096, 8192)]
)
def test_blocks_across_rows_or_of_other_sizes_are_decoded_first(K, blocksize):
    assert plan(1, 4096, K, blocksize) == dequantize()


def test_what_tensor_cores_do_not_take_goes_through_the_plain_kernel_while_tokens_are_few():
    for problem in ({"blocksize": 32}, {"dtype": torch.float32}, {"gpu": TURING}):
        assert plan(1, 4096, 4096, **problem) == plain()
        assert plan(64, 4096, 4096, **problem) == dequantize()


def test_many_tokens_use_the_dense_matmul():
    for M in (ABI.constants["BNB_GEMM_MOST_FUSED_ROWS"] + 1, 4096, 2**33):
        assert plan(M, 14336, 4096) == dequantize()
    for M in (65, 1024, 4096):
        assert plan(M, 14336, 4096, gpu=A100) == dequantize()
    # A small layer pays for whole tiles of tokens only where they are nearly full.
    for M in (257, 384, 513, 640):
        assert plan(M, 4096, 4096) == dequantize()
    for M in (385, 512, 641, 768, 1024):
        assert plan(M, 4096, 4096) >= 0
        assert plan(M, 1024, 4096) == dequantize()


def test_tokens_that_the_cache_does_not_hold_use_the_dense_matmul():
    assert plan(1024, 8192, 28672) >= 0
    assert plan(1024, 8192, 2 * 28672) == dequantize()
    assert plan(512, 8192, 2 * 28672) >= 0


@pytest.mark.parametrize(("N", "K"), LAYERS)
def test_warpgroups_multiply_what_lies_between_few_and_many(N, K):
    for M in (33, 64, 65, 128, 129, 256):
        assert plan(M, N, K) >= 0


@pytest.mark.parametrize("gpu", [A100, (86, 84), (89, 128), (100, 148), (120, 170)])
@pytest.mark.parametrize(("N", "K"), LAYERS)
def test_without_warpgroups_the_weight_is_read_again_rather_than_decoded_for_some_tokens_more(N, K, gpu):
    for M in (1, 9, 17, 33, 64):
        assert plan(M, N, K, gpu=gpu) >= 0
        assert workspace(M, N, K, plan(M, N, K, gpu=gpu)) == 0
    for M in (65, 256, 1024):
        assert plan(M, N, K, gpu=gpu) == dequantize()


def workspace(M, N, K, tuning, multiprocessors=132):
    problem = (DTYPE_ID[torch.bfloat16], M, N, K, 64, tuning, multiprocessors)
    return lib.bnb_cuda_gemm_4bit_workspace(*problem)


@pytest.mark.parametrize(("N", "K"), LAYERS)
def test_up_to_24_tokens_need_no_workspace(N, K):
    for M in (1, 8, 16, 17, 24):
        assert plan(M, N, K) >= 0
        assert workspace(M, N, K, plan(M, N, K)) == 0


def test_the_warpgroup_kernel_needs_room_for_the_tokens_and_for_shared_sums():
    N, K = 4096, 4096 + 64
    for M in (1, 8, 64, 100, 256):
        tuning = plan(M, N, K)

        # Tiles of tokens and stages of K are whole; each CTA may leave the sums of two tiles.
        tokens = 2 * (K + 192) * (M if M % 64 == 0 else 128)
        if M <= 8:
            assert workspace(M, N, K, tuning) == 0
        else:
            assert tokens < workspace(M, N, K, tuning) <= tokens + 132 * 2 * 256 * 256 * 4
            # One CTA has every tile for itself.
            assert workspace(M, N, K, tuning, multiprocessors=1) == tokens
    for tuning in (dequantize(), plain(), 1000):
        assert workspace(64, 4096, 4096, tuning) == 0
    assert workspace(64, N, K, plan(64, N, K), multiprocessors=0) == 0


@pytest.mark.parametrize("size", [(0, 64, 64), (1, 0, 64), (1, 64, 0), (1, 2**40, 64), (1, 64, 2**40)])
def test_sizes_that_no_kernel_has_are_planned_all_the_same(size):
    assert plan(*size) == dequantize()


def test_newer_gpus_plan_like_hopper():
    assert plan(1, 4096, 4096, gpu=(100, 148)) == plan(1, 4096, 4096, gpu=H200)


@pytest.mark.parametrize("gpu", [(86, 84), (89, 128), (120, 170)])
def test_gpus_with_less_shared_memory_have_a_kernel_that_fits(gpu):
    assert plan(1, 4096, 4096, gpu=gpu) >= 0
    assert plan(1, 4096, 4096, gpu=gpu) != plan(1, 4096, 4096, gpu=H200)
