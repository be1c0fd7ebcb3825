"""The layers, budgets and forbidden calls of this library, held by reading its sources.

Nothing here runs the library: imports are walked with ``ast`` and includes with a regular expression, so the rules
also hold for backends this machine cannot load.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "bitsandbytes"
CSRC = ROOT / "csrc"

MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 80
MAX_PARAMETERS = 8

# Re-exports for users; the library itself never imports them.
FACES = {
    "autograd._functions",
    "cextension",
    "consts",
    "cuda_specs",
    "functional",
    "nn.modules",
    "nn.triton_based_modules",
    "optim.optimizer",
    "utils",
}

# Layer of the longest matching prefix; a module may import lower layers and its own package.
LAYERS = {
    "": 7,
    "__main__": 7,
    "_cli": 7,
    "diagnostics": 7,
    **dict.fromkeys(FACES, 7),
    "research": 6,
    "nn": 6,
    "optim": 6,
    "autograd": 5,
    "triton": 4,
    "_quant": 4,
    "backends": 3,
    "_operator": 2,
    "_ops": 2,
    "_ops_grouped": 2,
    "_ops_int8": 2,
    "_ops_shortcuts": 2,
    "_checks": 2,
    "_alike": 1,
    "_formats": 1,
    "_native": 1,
    "_overrides": 1,
}


class Import(NamedTuple):
    importer: str
    imported: str
    line: int

    def __str__(self) -> str:
        return f"{self.importer or '__init__'}:{self.line} imports {self.imported}"


def python_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def native_files() -> list[Path]:
    return sorted(f for f in CSRC.rglob("*") if f.suffix in {".h", ".cuh", ".cpp", ".cu", ".inl"})


def module_name(path: Path) -> str:
    """Dotted name below the package: ``""`` for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in python_files()}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def walk(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes that can run: everything but the blocks for type checkers."""
    yield node
    if is_type_checking(node):
        return
    for child in ast.iter_child_nodes(node):
        yield from walk(child)


def all_imports(name: str) -> Iterator[tuple[str, list[str], int]]:
    """``(absolute module, imported names, line)`` of every import statement, at any depth."""
    is_package = MODULES[name].name == "__init__.py"
    package = ["bitsandbytes", *(name.split(".") if name else [])]
    if not is_package:
        package.pop()
    for node in walk(TREES[name]):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, [], node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            target = ".".join([*base, *([node.module] if node.module else [])])
            yield target, [alias.name for alias in node.names], node.lineno


def own_imports(name: str) -> Iterator[Import]:
    """Imports of modules of this package; ``from package import module`` names the module."""
    for target, names, line in all_imports(name):
        if target != "bitsandbytes" and not target.startswith("bitsandbytes."):
            continue
        target = target.removeprefix("bitsandbytes").removeprefix(".")
        inner = [f"{target}.{n}" if target else n for n in names]
        submodules = [n for n in inner if n in MODULES]
        yield from (Import(name, submodule, line) for submodule in submodules)
        if len(submodules) < len(names) or not names:
            yield Import(name, target, line)


IMPORTS = [found for name in MODULES for found in own_imports(name)]


def layer(name: str) -> int:
    while name and name not in LAYERS:
        name = name.rpartition(".")[0]
    return LAYERS[name]


def unit(name: str) -> str:
    """What may import itself freely: a backend, a top-level package or module, the operators with their checks."""
    parts = name.split(".")
    if name in ("_checks", "_operator", "_ops_grouped", "_ops_int8", "_ops_shortcuts"):
        return "_ops"
    if name == "backends.utils":
        return "backends"
    return ".".join(parts[:2]) if parts[0] == "backends" and len(parts) > 1 else parts[0]


def is_public(name: str) -> bool:
    return not any(part.startswith("_") for part in name.split(".")) or name in FACES


def test_imports_go_downward():
    wrong = [
        str(found)
        for found in IMPORTS
        if unit(found.importer) != unit(found.imported)
        and found.importer not in FACES
        and layer(found.importer) < 7
        and layer(found.imported) >= layer(found.importer)
        and not (
            unit(found.importer).startswith("backends.") and found.imported.startswith("backends.default")
        )
    ]

    assert wrong == []


def test_packages_of_one_layer_do_not_import_each_other():
    """Research builds on the layers of nn; nothing else in layer 6 sees its neighbours."""
    wrong = [
        str(found)
        for found in IMPORTS
        if {unit(found.importer), unit(found.imported)} == {"nn", "optim"} and found.importer not in FACES
    ]

    assert wrong == []


def test_devices_are_reached_through_operators_only():
    """Above the operators only the package itself and the tools may know that backends exist."""
    wrong = [
        str(found)
        for found in IMPORTS
        if unit(found.imported).startswith("backends")
        and not unit(found.importer).startswith("backends")
        and layer(found.importer) < 7
    ]

    assert wrong == []


def test_backends_do_not_know_each_other():
    wrong = [
        str(found)
        for found in IMPORTS
        if unit(found.importer).startswith("backends.")
        and unit(found.imported).startswith("backends.")
        and unit(found.imported) not in (unit(found.importer), "backends.default")
        and found.importer not in FACES
        and not found.imported.startswith("backends.triton")
    ]

    assert wrong == []


def test_faces_are_not_imported_inside_the_library():
    """But by the package and its tools, and by the ``__init__`` of the package whose face it is."""
    wrong = [
        str(found)
        for found in IMPORTS
        if found.imported in FACES
        and layer(found.importer) < 7
        and found.importer != found.imported.rpartition(".")[0]
    ]

    assert wrong == []


@pytest.mark.parametrize("name", sorted(FACES & MODULES.keys()))
def test_faces_hold_no_logic(name):
    """Imports, constants, and at most the ``__getattr__`` that makes some of them lazy."""
    allowed = (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.Expr)
    logic = [
        f"{name}:{node.lineno}"
        for node in TREES[name].body
        if not isinstance(node, allowed)
        and not is_type_checking(node)
        and getattr(node, "name", None) not in {"__getattr__", "__dir__"}
    ]

    assert logic == []


def test_no_star_imports():
    stars = [f"{name}:{line}" for name in MODULES for _, names, line in all_imports(name) if "*" in names]

    assert stars == []


def test_only_the_native_package_imports_ctypes():
    users = {
        name for name in MODULES for target, _, _ in all_imports(name) if target.split(".")[0] == "ctypes"
    }

    assert {name for name in users if unit(name) != "_native"} == set()


def test_module_level_imports_are_torch_and_the_standard_library():
    """Everything else is optional, so it is imported where it is used."""
    optional = {"backends.triton": {"triton"}, "triton": {"triton"}}
    wrong = []
    for name, tree in TREES.items():
        allowed = {"torch", "bitsandbytes"} | next(
            (v for k, v in optional.items() if name.startswith(k)), set()
        )
        for node in tree.body:
            targets = []
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                targets = [node.module or ""]
            roots = {target.split(".")[0] for target in targets}
            wrong += [f"{name}:{node.lineno} {root}" for root in roots - allowed - sys.stdlib_module_names]

    assert wrong == []


def _assigns(node: ast.AST, name: str) -> bool:
    targets = getattr(node, "targets", [getattr(node, "target", None)])
    return any(isinstance(target, ast.Name) and target.id == name for target in targets)


def defines_public_names(tree: ast.Module) -> bool:
    """Not so a module that only registers kernels, or a package that only holds modules."""
    definitions = (ast.FunctionDef, ast.ClassDef)
    return any(
        (isinstance(node, definitions) and not node.name.startswith("_")) or _assigns(node, "__all__")
        for node in tree.body
    )


@pytest.mark.parametrize(
    "name", sorted(name for name in MODULES if is_public(name) and defines_public_names(TREES[name]))
)
def test_public_modules_state_their_names(name):
    """``__all__`` is a literal list of names that the module defines, imports or provides lazily."""
    tree = TREES[name]
    exported = [node.value for node in tree.body if _assigns(node, "__all__")]

    assert len(exported) == 1, f"{name} has no __all__"
    names = ast.literal_eval(exported[0])
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", sorted(MODULES))
def test_modules_open_with_a_docstring(name):
    assert ast.get_docstring(TREES[name]), f"{name} does not say what it is for"


def test_only_the_command_line_prints():
    printing = [
        f"{name}:{node.lineno}"
        for name, tree in TREES.items()
        if unit(name) not in {"__main__", "_cli", "diagnostics"}
        for node in walk(tree)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func)
        in {"print", "exit", "quit", "sys.exit", "os._exit", "os.abort", "sys.stdout.write"}
    ]

    assert printing == []


def test_no_bare_except():
    bare = [
        f"{name}:{node.lineno}"
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ExceptHandler) and node.type is None
    ]

    assert bare == []


def test_files_stay_within_their_budget():
    tests = sorted((ROOT / "tests").rglob("*.py"))
    lengths = {str(f.relative_to(ROOT)): _line_count(f) for f in [*python_files(), *native_files(), *tests]}

    assert {name: n for name, n in lengths.items() if n > MAX_FILE_LINES} == {}


def _line_count(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_functions_stay_within_their_budget():
    lengths = {
        f"{name}.{node.name}": (node.end_lineno or 0) - node.lineno + 1
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    }

    assert {name: n for name, n in lengths.items() if n > MAX_FUNCTION_LINES} == {}


def test_native_functions_stay_within_their_budget():
    """A body runs from the line that opens it to the closing brace at the same indentation."""
    too_long = {}
    for path in native_files():
        lines = path.read_text(encoding="utf-8").splitlines()
        for start, line in enumerate(lines):
            if not re.search(r"\)[^;=]*\{$", line) or re.match(r"\s*(if|for|while|switch|\}|else)\b", line):
                continue
            indent = re.match(r"\s*", line).group()
            end = next((i for i in range(start, len(lines)) if lines[i].startswith(indent + "}")), start)
            if end - start + 1 > MAX_FUNCTION_LINES:
                too_long[f"{path.relative_to(ROOT)}:{start + 1}"] = end - start + 1

    assert too_long == {}


def test_only_contracts_have_long_parameter_lists():
    """Public signatures, operators and the kernels that fill them are fixed; every other function is ours."""
    too_many = {}
    for name, tree in TREES.items():
        if unit(name).split(".")[0] in {"_ops", "backends"}:  # schemas
            continue
        for owner, function in _functions(tree):
            arguments = function.args
            count = len(arguments.posonlyargs + arguments.args + arguments.kwonlyargs)
            # torch says what a hook is called with.
            private = re.match("_(?!_)", function.name) and not function.name.endswith("_hook")
            if count > MAX_PARAMETERS and (private or (owner or "").startswith("_")):
                too_many[f"{name}.{function.name}"] = count

    assert too_many == {}


def _functions(tree: ast.Module) -> Iterator[tuple[str | None, ast.FunctionDef]]:
    """Module-level functions, and methods with the name of their class."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield None, node
        elif isinstance(node, ast.ClassDef):
            yield from ((node.name, item) for item in node.body if isinstance(item, ast.FunctionDef))


def without_comments(source: str) -> str:
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", source, flags=re.DOTALL)


FORBIDDEN_CALLS = re.compile(
    r"\b(?:f?printf|puts|exit|_exit|quick_exit|abort|terminate|assert)\s*\(|\bstd::(?:cout|cerr|clog)\b"
)


def test_native_code_never_prints_or_ends_the_process():
    found = [
        f"{path.relative_to(ROOT)}: {match.group()}"
        for path in native_files()
        for match in FORBIDDEN_CALLS.finditer(without_comments(path.read_text(encoding="utf-8")))
    ]

    assert found == []


def test_an_nf4_value_is_spelled_out_once_per_language():
    def spelled(files: list[Path]) -> list[str]:
        return [
            str(f.relative_to(ROOT)) for f in files if re.search(r"0\.69619", f.read_text(encoding="utf-8"))
        ]

    assert spelled(native_files()) == ["csrc/common/codebooks.h"]
    assert len(spelled(python_files())) == 1


# Folder -> what its files may include besides themselves and the ABI header.
INCLUDES = {
    "common": set(),
    "cpu": {"common"},
    "cuda": {"common"},
    "abi": {"common", "cpu", "cuda"},
    "compat": set(),
}


def test_includes_go_downward():
    wrong = []
    for path in native_files():
        folder = path.relative_to(CSRC).parts[0]
        if folder not in INCLUDES:
            continue
        for included in re.findall(
            r'^\s*#\s*include\s+"([^"]+)"', path.read_text(encoding="utf-8"), re.MULTILINE
        ):
            target = (path.parent / included).resolve()
            if target == CSRC / "bnb.h":
                continue
            reached = target.relative_to(CSRC).parts[0] if target.is_relative_to(CSRC) else included
            allowed = INCLUDES[folder] | ({folder} if folder != "compat" else set())
            if reached not in allowed:
                wrong.append(f"{path.relative_to(ROOT)} includes {included}")

    assert wrong == []


def test_native_code_knows_neither_torch_nor_python():
    wrong = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in native_files()
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.match(r"\s*#\s*include\s*[<\"](torch|ATen|c10|Python\.h|pybind11)", line)
    ]

    assert wrong == []


def test_native_files_open_with_a_comment():
    silent = [
        str(path.relative_to(ROOT))
        for path in native_files()
        if not path.read_text(encoding="utf-8").lstrip().startswith(("//", "/*"))
    ]

    assert silent == []


def test_no_folder_of_tests_looks_like_an_optional_library():
    """The tests' root is on the module path, and there ``find_spec`` would take a folder for the library."""
    optional = {"accelerate", "peft", "safetensors", "scipy", "transformers", "triton"}

    assert {path.name for path in (ROOT / "tests").iterdir() if path.is_dir()} & optional == set()
