"""Our safetensors reader and writer against the format's own library, and against damaged files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bitsandbytes._cli.errors import CliError
from bitsandbytes._cli.tensor_files import DTYPES, Entry, PickleFile, SafetensorsFile, SafetensorsWriter

safetensors = pytest.importorskip("safetensors.torch")


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    found = {"empty": torch.empty(0, 3), "scalar": torch.tensor(7, dtype=torch.uint8)}
    for name, dtype in DTYPES.items():
        found[name] = torch.randint(0, 2, (3, 5), generator=generator).to(dtype)
    return found


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def test_reads_what_the_format_s_library_wrote(tmp_path: Path):
    safetensors.save_file(tensors(), tmp_path / "a.safetensors", metadata={"k": "v"})
    file = SafetensorsFile(tmp_path / "a.safetensors")
    assert file.metadata == {"k": "v"}
    assert set(file.entries) == set(tensors())
    for name, tensor in tensors().items():
        assert file.entries[name] == Entry(tensor.dtype, tuple(tensor.shape))
        assert torch.equal(bits(file.read(name)), bits(tensor))
        if tensor.numel() > 3:
            assert torch.equal(bits(file.read(name, 2, 9)), bits(tensor.reshape(-1)[2:9]))
    file.close()


def test_the_format_s_library_reads_what_we_wrote(tmp_path: Path):
    """Pieces in any order, values straight from strided tensors, and late tensors of unknown size."""
    path = tmp_path / "a.safetensors"
    entries = {name: Entry(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors().items()}
    writer = SafetensorsWriter(path, entries, {"late": 1000, "later": 10}, {"k": "v"})
    assert path.read_bytes()[:8] in (b"", bytes(8))
    for name, tensor in reversed(tensors().items()):
        writer.write(name, tensor.reshape(-1)[4:], 4)
        writer.write(name, tensor.reshape(-1)[:4], 0)
    writer.write_late("later", torch.tensor([4], dtype=torch.uint8))
    writer.write_late("late", torch.arange(33, dtype=torch.uint8))
    size = writer.finish()

    loaded = safetensors.load_file(path)
    expected = tensors() | {
        "late": torch.arange(33, dtype=torch.uint8),
        "later": torch.tensor([4], dtype=torch.uint8),
    }
    assert set(loaded) == set(expected)
    for name, tensor in expected.items():
        assert loaded[name].dtype == tensor.dtype and loaded[name].shape == tensor.shape
        assert torch.equal(bits(loaded[name]), bits(tensor))
    assert size == sum(t.numel() * t.element_size() for t in expected.values())


def test_every_tensor_is_aligned_for_its_dtype(tmp_path: Path):
    path = tmp_path / "a.safetensors"
    entries = {
        "a": Entry(torch.uint8, (3,)),
        "b": Entry(torch.float32, (2,)),
        "c": Entry(torch.bfloat16, (1,)),
    }
    writer = SafetensorsWriter(path, entries, {}, {})
    for name, entry in entries.items():
        writer.write(name, torch.zeros(entry.shape, dtype=entry.dtype))
    writer.finish()
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    for name, entry in entries.items():
        assert (8 + length + header[name]["data_offsets"][0]) % entry.dtype.itemsize == 0


def test_an_unfinished_file_does_not_read_as_whole(tmp_path: Path):
    path = tmp_path / "a.safetensors"
    writer = SafetensorsWriter(path, {"a": Entry(torch.float32, (1000,))}, {}, {})
    writer.write("a", torch.zeros(1000))
    writer.close()
    with pytest.raises(CliError, match="damaged or truncated"):
        SafetensorsFile(path)
    with pytest.raises(safetensors.SafetensorError if hasattr(safetensors, "SafetensorError") else Exception):
        safetensors.load_file(path)


def test_a_forgotten_piece_is_noticed(tmp_path: Path):
    writer = SafetensorsWriter(tmp_path / "a.safetensors", {"a": Entry(torch.float32, (10,))}, {}, {})
    writer.write("a", torch.zeros(9))
    with pytest.raises(AssertionError):
        writer.finish()
    writer.close()


def header_of(**fields: object) -> bytes:
    text = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | fields}).encode()
    return len(text).to_bytes(8, "little") + text + bytes(8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged or truncated"),
        (b"\x10\0\0", "damaged or truncated"),
        (bytes(8), "damaged or truncated"),
        (b"\xff" * 8 + b"{}", "damaged or truncated"),
        (b"\x02\0\0\0\0\0\0\0[]", "damaged"),
        (b"\x02\0\0\0\0\0\0\0{}"[:-1], "damaged or truncated"),
        (b"\x03\0\0\0\0\0\0\0{]}", "damaged"),
        (b"\x02\0\0\0\0\0\0\0\xff\xfe", "damaged"),
        (header_of(dtype="F4"), "dtype F4"),
        (header_of(shape=[3]), "does not have the bytes"),
        (header_of(shape="x"), "damaged"),
        (header_of(shape=[-2]), "damaged"),
        (header_of(data_offsets=[0]), "damaged"),
        (header_of(data_offsets=[8, 16]), "truncated"),
        (header_of(data_offsets=[-8, 0]), "damaged"),
        (header_of()[:-1], "truncated"),
    ],
)
def test_a_damaged_file_is_one_clear_error(tmp_path: Path, content: bytes, message: str):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(CliError, match=message) as error:
        SafetensorsFile(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_pytorch_files_are_read_in_runs_and_mapped_anew(tmp_path: Path):
    path = tmp_path / "pytorch_model.bin"
    big = torch.arange(20_000_000, dtype=torch.float32)
    torch.save({"big": big, "strided": big[:12].view(3, 4).t(), "same": big, "note": "text"}, path)
    file = PickleFile(path)
    assert file.entries["strided"] == Entry(torch.float32, (4, 3))
    assert set(file.entries) == {"big", "strided", "same"}
    assert file.same_memory() == {"same": "big"}
    first = file.read("big", 0, 19_000_000)
    file.release()
    assert torch.equal(file.read("big", 5, 9), big[5:9])
    assert torch.equal(first[-3:], big[18_999_997:19_000_000])
    assert torch.equal(file.read("strided"), big[:12].view(3, 4).t().reshape(-1))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no zip", b"no pickle"])
def test_a_damaged_pytorch_file_is_one_clear_error(tmp_path: Path, content: bytes):
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(content)
    with pytest.raises(CliError, match="pytorch_model") as error:
        PickleFile(path)
    assert "\n" not in str(error.value)


def test_a_pytorch_file_runs_no_code(tmp_path: Path):
    class Evil:
        def __reduce__(self):
            return (exec, ("raise SystemExit('ran')",))

    torch.save({"a": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CliError):
        PickleFile(tmp_path / "pytorch_model.bin")
