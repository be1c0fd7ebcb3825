"""Every public module, name and signature, against the list that programs rely on (``public_api.json``).

In that file a name maps to null (it exists), to a signature, or to an object: ``signature`` and ``members`` of a class,
or ``same_as`` for a name that another module defines. Signatures leave out annotations. A function may accept more
than its signature says, by keyword; order, names and defaults of what is listed are fixed.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import json
from pathlib import Path

import pytest
import torch

import bitsandbytes
from bitsandbytes import functional as F

API = json.loads((Path(__file__).parent / "public_api.json").read_text())
NEEDS = {"bitsandbytes.backends.triton.ops": "triton"}


def imported(module: str):
    package = NEEDS.get(module)
    if package is not None and importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}")
    return importlib.import_module(module)


def parameters_of(callable_) -> list[inspect.Parameter]:
    """Parameters as a caller sees them; a tensor subclass is built by its ``__new__``."""
    if isinstance(callable_, type) and issubclass(callable_, torch.Tensor):
        parameters = list(inspect.signature(callable_.__new__).parameters.values())[1:]
    else:
        parameters = list(inspect.signature(callable_).parameters.values())
    return [p for p in parameters if p.name not in ("self", "cls")]


def described(parameter: inspect.Parameter) -> str:
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}.get(
        parameter.kind, ""
    )
    default = "" if parameter.default is inspect.Parameter.empty else f"={parameter.default!r}"
    return f"{stars}{parameter.name}{default}"


def listed(signature: str) -> list[inspect.Parameter]:
    scope = {"torch": torch}
    exec(f"def function{signature}: ...", scope)
    return list(inspect.signature(scope["function"]).parameters.values())


def assert_signature(name: str, callable_, signature: str) -> None:
    expected, actual = listed(signature), parameters_of(callable_)
    open_ended = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    optional = (inspect.Parameter.KEYWORD_ONLY, *open_ended)

    wanted = [described(p) for p in expected if p.kind not in optional]
    found = [described(p) for p in actual if p.kind not in optional]
    assert found == wanted, f"{name}{tuple(found)}, expected {tuple(wanted)}"
    for parameter in actual:  # what is accepted beyond the list must not be required
        assert (
            parameter.kind not in optional
            or parameter.kind in open_ended
            or (parameter.default is not inspect.Parameter.empty)
        )
    for parameter in expected:
        if parameter.kind in optional:
            assert described(parameter) in {described(p) for p in actual}


@pytest.mark.parametrize("module", API)
def test_module_imports(module):
    imported(module)


NAMES = [(module, name) for module, names in API.items() for name in names]


@pytest.mark.parametrize(("module", "name"), NAMES, ids=[f"{module}.{name}" for module, name in NAMES])
def test_name_and_signature(module, name):
    entry = API[module][name]
    found = getattr(imported(module), name)

    if isinstance(entry, str):
        assert_signature(name, found, entry)
    elif isinstance(entry, dict) and "same_as" in entry:
        origin, _, attribute = entry["same_as"].rpartition(".")
        assert found is getattr(imported(origin), attribute)
    elif isinstance(entry, dict):
        assert isinstance(found, type) and found.__name__ == name
        if entry["signature"] is not None:
            assert_signature(name, found, entry["signature"])
        for member, signature in entry["members"].items():
            value = inspect.getattr_static(found, member)
            if signature is not None:
                assert not isinstance(value, property)
                assert_signature(f"{name}.{member}", getattr(found, member), signature)


# --- all of it -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [m for m in API if not m.startswith("bitsandbytes.backends.triton")])
def test_public_modules_list_only_names_they_have(module):
    found = imported(module)

    names = getattr(found, "__all__", None)
    assert names is not None, f"{module} has no __all__"
    assert len(set(names)) == len(names)
    for name in names:
        assert hasattr(found, name), f"{module}.__all__ lists {name}"


def test_root_names_are_reachable_without_further_imports():
    from processes import run_python

    run_python(
        """
        import bitsandbytes as bnb
        bnb.nn.Linear4bit, bnb.optim.AdamW8bit, bnb.functional.quantize_4bit, bnb.research.nn.LinearFP8Mixed
        bnb.modules.Params4bit, bnb.adam.Adam, bnb.utils.replace_linear, bnb.autograd._functions.matmul
        bnb.backends.utils, bnb.cextension.lib, bnb.consts.PACKAGE_DIR, bnb.cuda_specs.get_cuda_specs
        assert bnb.modules is bnb.nn.modules and bnb.adam is bnb.optim.adam
        """
    )


@pytest.mark.parametrize("module", ["bitsandbytes.optim", "bitsandbytes.nn", "bitsandbytes.functional"])
def test_parts_import_on_their_own(module):
    from processes import run_python

    assert run_python(f"import {module} as part; assert part.__name__ == {module!r}").stderr == ""


def test_constants_of_the_root():
    assert bitsandbytes.features == {"multi_backend"}
    assert bitsandbytes.supported_torch_devices == {"cpu", "cuda", "xpu", "hpu", "npu", "mps"}
    assert bitsandbytes.__pdoc__ == {
        "libbitsandbytes": False,
        "optim.optimizer.Optimizer8bit": False,
        "optim.optimizer.MockArgs": False,
    }
    assert bitsandbytes.__version__ == "0.50.0.dev0"


def test_version_is_the_distributions():
    try:
        version = importlib.metadata.version("bitsandbytes")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs an installed distribution")
    assert bitsandbytes.__version__ == version


def test_the_native_library_is_never_none():
    """Programs ask ``hasattr(lib.<symbol>, "restype")`` whether 4-bit kernels are there; asking must not raise."""
    assert F.lib is not None
    missing = F.lib.cno_such_symbol

    assert callable(missing) and not hasattr(missing, "restype")
    with pytest.raises(RuntimeError, match="cno_such_symbol"):
        missing()


@pytest.mark.parametrize(
    ("name", "face"),
    [
        ("functional.QuantState", "bitsandbytes.functional"),
        ("nn.Params4bit", "bitsandbytes.nn.modules"),
        ("nn.Int8Params", "bitsandbytes.nn.modules"),
        ("nn.Linear4bit", "bitsandbytes.nn.modules"),
        ("nn.Linear8bitLt", "bitsandbytes.nn.modules"),
        ("nn.Embedding4bit", "bitsandbytes.nn.modules"),
        ("nn.StableEmbedding", "bitsandbytes.nn.modules"),
        ("MatmulLtState", "bitsandbytes.autograd._functions"),
    ],
)
def test_classes_record_the_module_users_import_them_from(name, face):
    found = functools.reduce(getattr, name.split("."), bitsandbytes)

    assert found.__module__ == face
    assert getattr(importlib.import_module(face), found.__name__) is found


@pytest.mark.parametrize(
    "name",
    [n for n in API["bitsandbytes.optim"] if isinstance(getattr(bitsandbytes.optim, n, None), type)],
)
def test_optimizers_say_where_they_come_from(name):
    """Trainers look for the library's name in the class's text."""
    assert "bitsandbytes" in str(getattr(bitsandbytes.optim, name))


@pytest.mark.parametrize(
    ("name", "child", "parent"),
    [
        ("optim", "Adam8bit", "Optimizer2State"),
        ("optim", "AdamW", "Optimizer2State"),
        ("optim", "AdEMAMix", "Optimizer2State"),
        ("optim", "LAMB", "Optimizer2State"),
        ("optim", "Lion8bit", "Optimizer1State"),
        ("optim", "SGD", "Optimizer1State"),
        ("optim", "LARS", "Optimizer1State"),
        ("optim", "RMSprop", "Optimizer1State"),
        ("optim", "Adagrad", "Optimizer1State"),
        ("optim", "AdEMAMix8bit", "AdEMAMix"),
    ],
)
def test_optimizer_families(name, child, parent):
    optim = bitsandbytes.optim
    base = getattr(optim, parent, None) or getattr(optim.optimizer, parent)

    assert issubclass(getattr(optim, child), base)
    assert issubclass(base, optim.optimizer.Optimizer8bit)
    assert issubclass(base, torch.optim.Optimizer)


@pytest.mark.parametrize("name", ["Params4bit", "Int8Params"])
def test_parameters_can_be_rebuilt_from_their_attributes(name):
    """Integrations call ``type(p)(data, **p.__dict__)``; every attribute is a constructor keyword of its name."""
    cls = getattr(bitsandbytes.nn, name)
    parameter = cls(torch.randn(64, 64), requires_grad=False).to("cpu")

    rebuilt = cls(parameter.data, requires_grad=False, **parameter.__dict__)

    assert set(rebuilt.__dict__) == set(parameter.__dict__)
    known = {p.name for p in parameters_of(cls)}
    assert set(parameter.__dict__) <= known
