"""Pointers, devices, streams and pages: what programs that call the native library themselves go through."""

from __future__ import annotations

import contextlib
import ctypes

import pytest
import torch

from bitsandbytes import functional as F

# --- pointers --------------------------------------------------------------------------------------------------


def test_pointer_of_nothing_is_nothing():
    assert F.get_ptr(None) is None


def test_pointer_is_the_address_of_the_first_element(device):
    values = torch.zeros(8, device=device)

    for tensor in (values, values[3:]):
        pointer = F.get_ptr(tensor)
        assert type(pointer) is ctypes.c_void_p
        assert pointer.value == tensor.data_ptr()


# --- devices ---------------------------------------------------------------------------------------------------


class Elsewhere:
    """Stands for a tensor on another device."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.shape = torch.Size([2])
        self.is_paged = False


def test_tensors_on_one_device_are_accepted(device):
    values = torch.zeros(2, device=device)

    assert F.is_on_gpu([]) is True
    assert F.is_on_gpu([None, None]) is True
    assert F.is_on_gpu([values, None, values]) is True


@pytest.mark.parametrize("devices", [("cpu", "cuda:0"), ("cuda:1", "cpu"), ("cpu", "xpu:0")], ids=str)
def test_cpu_and_accelerator_do_not_mix(devices):
    with pytest.raises(RuntimeError, match="on the same device") as raised:
        F.is_on_gpu([Elsewhere(device) for device in devices])
    for device in devices:
        assert device.partition(":")[0] in str(raised.value)


def test_two_accelerators_do_not_mix():
    with pytest.raises(RuntimeError, match="on the same GPU"):
        F.is_on_gpu([Elsewhere("cuda:0"), Elsewhere("cuda:1")])


def test_paged_tensors_are_everywhere():
    paged = torch.zeros(2)
    paged.is_paged = True

    assert F.is_on_gpu([paged, Elsewhere("cuda:0")]) is True


def test_real_devices_do_not_mix(accelerators):
    if not accelerators:
        pytest.skip("needs a device beside the CPU")
    with pytest.raises(RuntimeError, match="on the same device"):
        F.is_on_gpu([torch.zeros(1), torch.zeros(1, device=accelerators[0])])


def test_first_cuda_device_is_named_without_touching_it():
    assert torch.device("cuda", 0) == F.FIRST_CUDA_DEVICE


def test_selecting_a_tensors_device(device):
    with F._cuda_device_of(torch.zeros(1, device=device)) as _:
        pass
    if torch.cuda.device_count() <= 1:
        assert isinstance(F._cuda_device_of(torch.zeros(1)), contextlib.AbstractContextManager)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_stream_of_a_tensor_is_the_current_one():
    stream = torch.cuda.Stream()
    values = torch.zeros(1, device="cuda")
    with torch.cuda.stream(stream):
        found = F._get_tensor_stream(values)

    assert type(found) is ctypes.c_void_p
    assert (found.value or 0) == stream.cuda_stream


def test_the_kind_of_cpu_is_known_or_false():
    assert F.has_avx512bf16() in (True, False)


# --- pages -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("manager", [F.GlobalPageManager, F.CUBLAS_Context, F.Cusparse_Context])
def test_managers_are_singletons(manager):
    with pytest.raises(RuntimeError, match=r"Call get_instance\(\) instead"):
        manager()
    assert manager.get_instance() is manager.get_instance()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_paged_memory_needs_a_gpu_library():
    with pytest.raises(RuntimeError, match="(?s)not available|native"):
        F.get_paged(4, 4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8], ids=str)
def test_paged_tensors_are_cpu_tensors_that_kernels_reach(dtype):
    paged = F.get_paged(8, 16, dtype=dtype)

    assert paged.shape == (8, 16) and paged.dtype == dtype and paged.device.type == "cpu"
    assert paged.is_paged and paged.page_deviceid == 0
    F.fill(paged, 3)
    assert (paged == 3).all()
    F.prefetch_tensor(paged)
    F.prefetch_tensor(paged, to_cpu=True)
    torch.cuda.synchronize()
    assert (paged == 3).all()


def test_only_paged_tensors_are_prefetched():
    plain = torch.zeros(4)
    with pytest.raises(AttributeError):
        F.prefetch_tensor(plain)
    plain.is_paged = False
    with pytest.raises(AssertionError):
        F.prefetch_tensor(plain)


def test_pages_are_prefetched_last_first(monkeypatch):
    manager = F.GlobalPageManager.get_instance()
    kept = list(manager.paged_tensors)
    fetched = []
    module = __import__(F.prefetch_tensor.__module__, fromlist=["prefetch_tensor"])
    monkeypatch.setattr(module, "prefetch_tensor", lambda A, to_cpu=False: fetched.append((A, to_cpu)))
    try:
        manager.initialize()
        assert manager.paged_tensors == []
        manager.paged_tensors.extend(["first", "second", "third"])
        manager.prefetch_all(to_cpu=True)
    finally:
        manager.paged_tensors[:] = kept

    assert fetched == [("third", True), ("second", True), ("first", True)]
