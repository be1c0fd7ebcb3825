"""Which tensors to quantize, from the model itself: transformers builds it on the meta device and is asked.

A loader of the result will replace the linear layers it finds and expect quantized weights for exactly those. So the
layers are found the way transformers finds them, checkpoint names are resolved with transformers' own renaming, and
the outcome is checked against every class that people load (the one in config.json, and the bare model under it).
What a loader could not resolve is left unquantized, and named in the config's list of skipped modules.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import Checkpoint
from .errors import CliError
from .plan import Item, Plan, Stored, Whole, first_float_dtype

__all__ = ["Unplannable", "plan_by_model"]

_WEIGHT = ".weight"


class Unplannable(Exception):
    """transformers is missing, too old, or cannot build this model; the text says which."""


def plan_by_model(
    checkpoint: Checkpoint, config_file: dict, skip: Sequence[str], keys: Sequence[str]
) -> Plan:
    """Plan with the model that ``config.json`` describes.

    ``skip`` are the user's names of modules to leave alone. ``keys`` are the names a quantized weight's tensors have
    in a checkpoint, below their module; the first is the weight itself.

    Raises:
        Unplannable: see there.
        CliError: the weights do not fit the config.
    """
    transformers = _Transformers()
    config, classes = _load_config(transformers, checkpoint, config_file)
    dtype = getattr(config, "dtype", None)
    if not isinstance(dtype, torch.dtype):
        dtype = first_float_dtype(checkpoint)
    models = [_MetaModel(transformers, cls, config, dtype, keys) for cls in classes]
    main = models[0]
    if (rebuilt := main.rebuilt_module()) is not None:
        raise CliError(
            f"this model has {rebuilt}, which transformers expects in another form in a quantized checkpoint than in "
            "a plain one; such models can only be quantized while loading"
        )
    notes = [f"--skip {name} matches no layer" for name in skip if main.replaced([]) == main.replaced([name])]

    skip_modules = sorted({*main.automatic_skips(), *skip}) if skip else None
    banned: set[str] = set()
    while True:
        items = _items(checkpoint, main, main.replaced(skip_modules) - banned)
        surplus: set[str] = set()
        stray: set[str] = set()
        for model in models:
            quantized = model.modules_of(items)
            replaced = model.replaced(skip_modules)
            surplus |= replaced - set(quantized)
            stray |= {quantized[name] for name in set(quantized) - replaced}
        if not surplus and not stray:
            return Plan(items, dtype, skip_modules, notes)
        # A layer that some loader would replace without having a quantized weight must be named. A name may catch
        # other layers too, which then must not be quantized. Both sets only grow, so this ends.
        if skip_modules is None:
            skip_modules = main.automatic_skips()
        elif not surplus:
            banned |= stray
        skip_modules = sorted({*skip_modules, *surplus})


class _Transformers:
    """The parts of transformers that decide how a checkpoint is loaded.

    Raises:
        Unplannable: one of them is not there.
    """

    def __init__(self) -> None:
        try:
            self.root = importlib.import_module("transformers")
            loading = importlib.import_module("transformers.core_model_loading")
            self.rename_source_key: Callable = loading.rename_source_key
            self.WeightRenaming, self.WeightConverter = loading.WeightRenaming, loading.WeightConverter
            self.ConversionOps = loading.ConversionOps
            self.natural_order: Callable = loading.dot_natural_key
            mapping = importlib.import_module("transformers.conversion_mapping")
            self.conversions: Callable = mapping.get_model_conversion_mapping
            base = importlib.import_module("transformers.quantizers.base")
            self.quantizer = base.HfQuantizer
            self.rebuilt: dict = getattr(base, "MODULES_TO_PATCH_FOR_QUANTIZATION", {})
            utils = importlib.import_module("transformers.quantizers.quantizers_utils")
            self.should_convert: Callable = utils.should_convert_module
            self.Conv1D: type = importlib.import_module("transformers.pytorch_utils").Conv1D
            self.config_types = self.root.CONFIG_MAPPING
        except ModuleNotFoundError as error:
            if error.name == "transformers":
                raise Unplannable("transformers is not installed (pip install bitsandbytes[cli])") from error
            raise Unplannable(f"this transformers lacks {error.name}; version 5 is needed") from error
        except (ImportError, AttributeError) as error:
            raise Unplannable(f"transformers 5 is needed ({error})") from error


def _load_config(
    transformers: _Transformers, checkpoint: Checkpoint, config_file: dict
) -> tuple[Any, list[type]]:
    """The model's config, and its classes: the one config.json names first, then the bare model."""
    root = transformers.root
    root.logging.set_verbosity_error()
    model_type = config_file.get("model_type")
    if model_type is None:
        raise Unplannable("config.json names no model_type")
    if model_type not in transformers.config_types:
        raise Unplannable(f"transformers {root.__version__} has no model_type {model_type!r}")
    try:
        config = root.AutoConfig.from_pretrained(
            checkpoint.path, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # whatever the config class objects to
        raise CliError(
            f"transformers rejects {checkpoint.path / 'config.json'}: {_first_line(error)}"
        ) from error
    names = config_file.get("architectures") or []
    classes = [getattr(root, name) for name in names[:1] if hasattr(root, name)]
    try:
        bare = root.AutoModel._model_mapping[type(config)]
    except KeyError:
        bare = None
    if isinstance(bare, (tuple, list)):
        bare = bare[0]
    if bare is not None and bare not in classes:
        classes.append(bare)
    if not classes:
        raise Unplannable(f"transformers has no model class for model_type {model_type!r}")
    return config, classes


class _MetaModel:
    """One model class without weights: its linear layers, and where its loader puts each checkpoint name."""

    def __init__(
        self, transformers: _Transformers, cls: Any, config: Any, dtype: torch.dtype, keys: Sequence[str]
    ):
        self._transformers = transformers
        try:
            with ExitStack() as stack:
                for context in cls.get_init_context(dtype, False, False, None):
                    stack.enter_context(context)
                self.model = cls(deepcopy(config))
        except Exception as error:  # a model's constructor may raise anything, a missing package above all
            raise Unplannable(f"transformers cannot build {cls.__name__}: {_first_line(error)}") from error
        self.parameters = self.model.state_dict()
        self.tied: dict[str, str] = dict(getattr(self.model, "all_tied_weights_keys", {}))
        conversions = transformers.conversions(self.model)
        self._renamings = [c for c in conversions if isinstance(c, transformers.WeightRenaming)]
        self._converters = [c for c in conversions if isinstance(c, transformers.WeightConverter)]
        self._keys = list(keys)
        collect = type(
            "Collect", (transformers.ConversionOps,), {"convert": lambda self, tensors, **_: tensors}
        )
        self._deserializer = transformers.WeightConverter(list(keys), "weight", [collect()])
        self._resolved: dict[str, tuple[str | None, str | None]] = {}
        # name -> whether the weight is stored the other way round; subclasses of nn.Linear stay as they are
        self.linears = {
            name: isinstance(module, transformers.Conv1D)
            for name, module in self.model.named_modules()
            if type(module) is nn.Linear or isinstance(module, transformers.Conv1D)
        }

    def rebuilt_module(self) -> str | None:
        """Name of a class that loading a quantized checkpoint replaces by something with other weights, if any."""
        for module in self.model.modules():
            methods = self._transformers.rebuilt.get(type(module).__name__, {}).get(
                "quantization_methods", ()
            )
            if "bitsandbytes" in methods:
                return type(module).__name__
        return None

    def automatic_skips(self) -> list[str]:
        """The modules a loader leaves alone when the config names none: heads, tied weights, the last layer."""
        return sorted(self._transformers.quantizer.get_modules_to_not_convert(self.model, None, None))

    def replaced(self, skip_modules: list[str] | None) -> set[str]:
        """The layers a loader turns into quantized ones, given the config's ``llm_int8_skip_modules``."""
        patterns = self._transformers.quantizer.get_modules_to_not_convert(
            self.model, skip_modules, self.model._keep_in_fp32_modules
        )
        return {name for name in self.linears if self._transformers.should_convert(name, patterns)}

    def in_loading_order(self, names: Iterable[str]) -> list[str]:
        """Conversions of several tensors depend on it: layer 10 comes after layer 9."""
        return sorted(names, key=self._transformers.natural_order)

    def resolve(self, name: str) -> tuple[str | None, str | None]:
        """The parameter a checkpoint tensor is loaded into, and the pattern of its conversion if it has one."""
        if name not in self._resolved:
            self._resolved[name] = self._rename(name, self._converters)
        return self._resolved[name]

    def resolve_quantized(self, name: str) -> str | None:
        """The layer that the quantized weight ``name`` and its statistics are loaded into, None if they go astray."""
        below = name.removesuffix("weight")
        found = {self._rename(below + key, [*self._converters, self._deserializer]) for key in self._keys}
        parameters = {parameter for parameter, _ in found}
        if len(parameters) != 1 or not {pattern for _, pattern in found} <= set(
            self._deserializer.source_patterns
        ):
            return None
        parameter = parameters.pop()
        return parameter.removesuffix(_WEIGHT) if parameter is not None else None

    def _rename(self, name: str, converters: list) -> tuple[str | None, str | None]:
        prefix = self.model.base_model_prefix
        rename = self._transformers.rename_source_key
        renamed, pattern = rename(name, self._renamings, converters, prefix, self.parameters)
        if renamed not in self.parameters and name in self.parameters:
            renamed, pattern = rename(name, [], [], prefix, self.parameters)
        return (renamed if renamed in self.parameters else None), pattern

    def modules_of(self, items: Iterable[Item]) -> dict[str, str]:
        """This model's layers that get a quantized weight from ``items``: name here -> name in the plan."""
        modules: dict[str, str] = {}
        for item in items:
            if item.module is not None:
                name = self.resolve_quantized(item.name)
                if name is not None and name in self.linears:
                    modules[name] = item.module
        return modules

    def convert(self, parameter: str, tensors: Sequence[tuple[str, str, Tensor]]) -> dict[str, Tensor]:
        """Run the conversion that makes ``parameter``, and maybe others, of ``(name, pattern, tensor)`` triples."""
        pattern = tensors[0][1]
        converter = deepcopy(next(c for c in self._converters if pattern in c.source_patterns))
        for name, its_pattern, tensor in tensors:
            converter.add_tensor(parameter, name, its_pattern, tensor)
        results = converter.convert(parameter, model=self.model, config=self.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in results.items()}


class _Group:
    """Stored tensors that a conversion turns into several parameters; converted once, when the first is needed."""

    def __init__(
        self, checkpoint: Checkpoint, model: _MetaModel, parameter: str, members: list[tuple[str, str]]
    ):
        self._checkpoint, self._model = checkpoint, model
        self._parameter, self._members = parameter, members
        self._results: dict[str, Tensor] = {}
        stand_ins = [(name, pattern, _stand_in(checkpoint, name)) for name, pattern in members]
        self.targets = model.convert(parameter, stand_ins)

    def make(self, target: str) -> Tensor:
        if target not in self._results:
            read = [(name, pattern, self._checkpoint.read_whole(name)) for name, pattern in self._members]
            self._results = self._model.convert(self._parameter, read)
        return self._results[target]

    def done(self, target: str) -> None:
        self._results.pop(target, None)
        for name, _ in self._members:
            self._checkpoint.release(name)


def _stand_in(checkpoint: Checkpoint, name: str) -> Tensor:
    dtype, shape = checkpoint.entries[name]
    return torch.empty(shape, dtype=dtype, device="meta")


def _items(checkpoint: Checkpoint, model: _MetaModel, wanted: set[str]) -> list[Item]:
    """Everything the result holds, when the layers ``wanted`` are to be quantized."""
    doubles = _doubled_ties(checkpoint, model)
    groups: dict[str, list[tuple[str, str]]] = {}
    items: list[Item] = []
    for name in model.in_loading_order(checkpoint):
        if name in doubles:
            continue
        parameter, pattern = model.resolve(name)
        if parameter is not None and pattern is not None:
            groups.setdefault(parameter, []).append((name, pattern))
        else:
            items.append(_item(checkpoint, model, name, parameter, wanted))
    for parameter, members in groups.items():
        items += _converted_items(checkpoint, model, parameter, members, wanted)
    return items


def _doubled_ties(checkpoint: Checkpoint, model: _MetaModel) -> set[str]:
    """Tied weights a PyTorch file holds a second time; safetensors files leave these out."""
    doubles = set()
    for pair in checkpoint.same_memory().items():
        later, earlier = (model.resolve(name)[0] or name for name in pair)
        if later in model.tied and model.tied[later] == model.tied.get(earlier, earlier):
            doubles.add(pair[0])
        elif model.tied.get(earlier) == later:
            doubles.add(pair[1])
    return doubles


def _item(
    checkpoint: Checkpoint, model: _MetaModel, name: str, parameter: str | None, wanted: set[str]
) -> Item:
    stored = Stored(checkpoint, name)
    module = parameter.removesuffix(_WEIGHT) if parameter and parameter.endswith(_WEIGHT) else None
    if module not in wanted or not stored.dtype.is_floating_point:
        return Item(name, stored)
    assert parameter is not None
    expected = tuple(model.parameters[parameter].shape)
    if stored.shape != expected:
        raise CliError(f"{name} has shape {list(stored.shape)}, but config.json makes it {list(expected)}")
    for candidate in (name, parameter):
        if candidate.endswith("weight") and model.resolve_quantized(candidate) == module:
            break
    else:
        return Item(name, stored)
    if not model.linears[module]:
        return Item(candidate, stored, module)

    def make() -> Tensor:
        return checkpoint.read_whole(name).t()

    whole = Whole(expected[::-1], stored.dtype, make, stored.done)
    return Item(candidate, whole, module, transposed=True)


def _converted_items(
    checkpoint: Checkpoint,
    model: _MetaModel,
    parameter: str,
    members: list[tuple[str, str]],
    wanted: set[str],
) -> list[Item]:
    """Convert a group if that makes a layer to quantize; otherwise copy it, and let the loader convert."""
    copies = [Item(name, Stored(checkpoint, name)) for name, _ in members]
    try:
        group = _Group(checkpoint, model, parameter, members)
    except Exception:  # no conversion without values: then the loader's own is the only one
        return copies
    modules = {name: name.removesuffix(_WEIGHT) for name in group.targets if name.endswith(_WEIGHT)}
    chosen = {name: module for name, module in modules.items() if module in wanted}
    if not chosen or any(model.resolve_quantized(name) != module for name, module in chosen.items()):
        return copies

    items = []
    for name, stand_in in group.targets.items():
        make, done = (lambda n=name: group.make(n)), (lambda n=name: group.done(n))
        whole = Whole(tuple(stand_in.shape), stand_in.dtype, make, done)
        items.append(Item(name, whole, chosen.get(name)))
    return items


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
