"""Backends from elsewhere: entry points, kernels registered by third parties, and built-in ones that fail to load.

All of this happens at import, so each case is a process of its own.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from processes import run_python


@pytest.fixture
def plugin(tmp_path):
    """``plugin(module, source, entry)`` installs a distribution with one entry point; returns its folder."""

    def install(source: str, entry: str = "example_backend:register", name: str = "example") -> Path:
        module = entry.partition(":")[0].split(".")[0]
        (tmp_path / f"{module}.py").write_text(textwrap.dedent(source))
        info = tmp_path / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[bitsandbytes.backends]\n{name} = {entry}\n")
        return tmp_path

    return install


QUANTIZE = """
    import torch, bitsandbytes
    packed, state = bitsandbytes.functional.quantize_4bit(torch.randn(64), quant_type="nf4")
    print("packed", packed.shape[0], int(packed[0]))
"""


def test_an_entry_point_is_called_once_without_arguments(plugin):
    folder = plugin(
        """
        def register():
            print("called")
        """
    )

    done = run_python(QUANTIZE, paths=[folder])

    assert done.stdout.count("called") == 1
    assert "packed 32" in done.stdout


def test_a_plugin_may_rely_on_operators_and_built_in_backends(plugin):
    folder = plugin(
        """
        import torch

        def register():
            result = torch.ops.bitsandbytes.int8_linear_matmul(
                torch.ones(2, 8, dtype=torch.int8), torch.ones(3, 8, dtype=torch.int8)
            )
            print("sum", int(result.sum()))
        """
    )

    assert "sum 48" in run_python("import bitsandbytes", paths=[folder]).stdout


def test_a_plugin_can_replace_a_kernel(plugin):
    """The later registration for a device wins; the default backend serves everything else as before."""
    folder = plugin(
        """
        import torch
        from bitsandbytes._ops import register_kernel

        def register():
            @register_kernel("bitsandbytes::quantize_4bit", "cpu")
            def _(A, blocksize, quant_type, quant_storage):
                packed = torch.full(((A.numel() + 1) // 2, 1), 0x5A, dtype=torch.uint8)
                return packed, torch.zeros(-(A.numel() // -blocksize))
        """
    )

    done = run_python(QUANTIZE, paths=[folder])

    assert f"packed 32 {0x5A}" in done.stdout


def test_a_third_party_can_register_a_kernel_without_being_a_plugin():
    done = run_python(
        """
        import warnings
        warnings.simplefilter("ignore")
        import torch, bitsandbytes

        @torch.library.register_kernel("bitsandbytes::int8_vectorwise_dequant", "cpu")
        def _(A, stats):
            return torch.full(A.shape, 7.0)

        print(bitsandbytes.functional.int8_vectorwise_dequant(torch.ones(1, 2, dtype=torch.int8), torch.ones(1)).tolist())
        """
    )

    assert "[[7.0, 7.0]]" in done.stdout


def test_a_kernel_for_another_device_leaves_the_cpu_alone():
    done = run_python(
        """
        import torch, bitsandbytes
        from bitsandbytes import functional as F

        values = torch.randn(64)
        before, _ = F.quantize_4bit(values, quant_type="nf4")

        @bitsandbytes._ops.register_kernel("bitsandbytes::quantize_4bit", "xpu")
        def _(A, blocksize, quant_type, quant_storage):
            raise AssertionError

        after, _ = F.quantize_4bit(values, quant_type="nf4")
        print(torch.equal(before, after))
        """
    )

    assert "True" in done.stdout


FAILURE = """
    import importlib
    try:
        import bitsandbytes
    except RuntimeError as error:
        print("message:", error)
        print("cause:", type(error.__cause__).__name__, error.__cause__)
"""


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ("def register():\n    raise ValueError('no such accelerator')\n", "ValueError no such accelerator"),
        ("raise OSError('driver is missing')\n", "OSError driver is missing"),
        ("def register(device):\n    pass\n", "TypeError"),
    ],
    ids=["the call raises", "the module raises", "the call wants arguments"],
)
def test_a_failing_plugin_stops_the_import_and_names_itself(plugin, source, cause):
    folder = plugin(source, name="broken")

    done = run_python(FAILURE, paths=[folder])

    assert "message: bitsandbytes: failed to load backend broken: " in done.stdout
    assert f"cause: {cause}" in done.stdout


def test_an_entry_point_that_does_not_exist_stops_the_import(plugin):
    folder = plugin("", entry="example_backend:missing", name="absent")

    done = run_python(FAILURE, paths=[folder])

    assert "message: bitsandbytes: failed to load backend absent: " in done.stdout
    assert "cause: AttributeError" in done.stdout


def test_entry_points_of_other_groups_are_not_loaded(plugin, tmp_path):
    folder = plugin("raise RuntimeError('must not be imported')")
    (folder / "example_backend-1.0.dist-info" / "entry_points.txt").write_text(
        "[other.backends]\nexample = example_backend:register\n"
    )

    assert "packed 32" in run_python(QUANTIZE, paths=[folder]).stdout


def test_a_built_in_backend_that_fails_is_reported_once_and_leaves_the_others():
    done = run_python(
        """
        import sys, logging

        class Refuse:
            def find_spec(self, name, path=None, target=None):
                if name == "bitsandbytes.backends.cpu.ops":
                    raise OSError("the library is for another machine")

        sys.meta_path.insert(0, Refuse())
        logging.basicConfig(level=logging.WARNING, format="%(name)s|%(message)s")
        import torch, bitsandbytes
        from bitsandbytes import functional as F

        packed, state = F.quantize_4bit(torch.ones(64), quant_type="nf4")
        print("decoded", F.dequantize_4bit(packed, state).sum().item())
        print("cpu module", hasattr(bitsandbytes, "cpu_ops"), "default module", hasattr(bitsandbytes, "default_ops"))
        """
    )

    assert "decoded 64.0" in done.stdout
    assert "cpu module False default module True" in done.stdout
    assert done.stderr.count("the library is for another machine") == 1


def test_importing_says_nothing():
    done = run_python("import bitsandbytes")

    assert done.stdout == "" and done.stderr == ""


def test_loaded_backends_are_attributes_of_the_package():
    done = run_python(
        """
        import torch, bitsandbytes as bnb
        from bitsandbytes.backends.cpu import ops as cpu
        from bitsandbytes.backends.default import ops as default
        assert bnb.cpu_ops is cpu and bnb.default_ops is default
        assert hasattr(bnb, "cuda_ops") == torch.cuda.is_available()
        """
    )

    assert done.stderr == ""
