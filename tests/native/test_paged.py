"""Managed memory: a tensor that looks like a CPU tensor, lives as long as it is used, and needs a GPU library."""

from __future__ import annotations

import gc

import pytest
import torch

from bitsandbytes import _native, functional as F
from bitsandbytes._native import paged
from bitsandbytes.functional import GlobalPageManager, get_paged, prefetch_tensor

HAS_GPU = torch.cuda.is_available() and _native.has_native("bnb_cuda_managed_alloc")
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device and the CUDA library")


@pytest.fixture
def manager():
    found = GlobalPageManager.get_instance()
    found.initialize()
    yield found
    found.initialize()


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU library")
def test_without_a_gpu_library_the_call_says_so():
    with pytest.raises(RuntimeError, match="bnb_cuda_managed_alloc"):
        get_paged(4, 4)


def test_only_paged_tensors_can_be_prefetched():
    plain = torch.ones(3)
    with pytest.raises(AttributeError):
        prefetch_tensor(plain)
    plain.is_paged = False
    with pytest.raises(AssertionError):
        prefetch_tensor(plain)


@pytest.mark.parametrize("singleton", [F.GlobalPageManager, F.CUBLAS_Context])
def test_singletons(singleton):
    with pytest.raises(RuntimeError, match=r"get_instance\(\)"):
        singleton()
    assert singleton.get_instance() is singleton.get_instance()


def test_prefetch_all_goes_backwards(manager, monkeypatch):
    seen = []
    monkeypatch.setattr(paged, "prefetch_tensor", lambda tensor, to_cpu: seen.append((tensor.item(), to_cpu)))
    first, second, third = (torch.tensor(i) for i in range(3))
    manager.register(first)
    manager.paged_tensors += [second, third]

    manager.prefetch_all(to_cpu=True)

    assert seen == [(2, True), (1, True), (0, True)]


def test_the_manager_keeps_no_registered_tensor_alive(manager, monkeypatch):
    seen = []
    monkeypatch.setattr(paged, "prefetch_tensor", lambda tensor, to_cpu: seen.append(tensor))
    tensor = torch.ones(3)
    manager.register(tensor)
    del tensor

    manager.prefetch_all()

    assert seen == []


class _ManagedMemory:
    """Stands in for the GPU library: ordinary memory, and a list of what was freed."""

    def __init__(self) -> None:
        self.held: dict[int, torch.Tensor] = {}
        self.freed: list[int] = []

    def bnb_cuda_managed_alloc(self, memory, size: int) -> None:
        block = torch.zeros(size, dtype=torch.uint8)
        self.held[block.data_ptr()] = block
        memory._obj.value = block.data_ptr()

    def bnb_cuda_managed_free(self, address: int) -> None:
        self.freed.append(address)


def test_memory_is_freed_with_the_last_view(monkeypatch):
    memory = _ManagedMemory()
    monkeypatch.setattr(_native, "lib", memory)
    gc.disable()  # reference counting must be enough
    try:
        tensor = get_paged(3, 5, dtype=torch.float16)
        assert (tensor.shape, tensor.dtype, tensor.device.type) == ((3, 5), torch.float16, "cpu")
        assert (tensor.is_paged, tensor.page_deviceid) == (True, 0)
        address = tensor.data_ptr()
        row = tensor[1]
        del tensor
        assert memory.freed == []
        del row
        assert memory.freed == [address]
    finally:
        gc.enable()


def test_an_empty_paged_tensor(monkeypatch):
    monkeypatch.setattr(_native, "lib", _ManagedMemory())
    assert get_paged(0, 4).shape == (0, 4)


@needs_gpu
def test_host_and_device_see_the_same_values(manager):
    tensor = get_paged(1000, dtype=torch.float32)
    tensor.copy_(torch.arange(1000.0))
    prefetch_tensor(tensor)
    F.prefetch_tensor(tensor, to_cpu=True)
    torch.cuda.synchronize()
    assert torch.equal(tensor, torch.arange(1000.0))
    assert F.is_on_gpu([tensor, torch.ones(1, device="cuda")])


@pytest.mark.parametrize(
    "tensors", [[], [None], [torch.ones(1)], [torch.ones(1), None], [torch.ones(1, device="meta")]]
)
def test_tensors_that_can_meet(tensors):
    assert F.is_on_gpu(tensors) is True


def test_tensors_that_cannot_meet_are_listed():
    with pytest.raises(RuntimeError, match=r"(?s)on the same device.*\(2,\)"):
        F.is_on_gpu([torch.ones(2), torch.ones(1, device="meta")])


def test_pointers():
    tensor = torch.ones(3)
    assert F.get_ptr(None) is None
    assert F.get_ptr(tensor).value == tensor.data_ptr()
