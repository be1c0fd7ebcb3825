"""Stepping all of an optimizer's parameters with a few launches.

Parameters that agree in rule, dtypes, device and kind of state share a table in device memory (``StepTable``), and a
step is one launch for each table. Tables stay while what they describe stays: the fast path of a step only compares
(which parameters have gradients, where parameters and state lie, how many steps they took), and anything unexpected
makes new tables. Of a DTensor the part that is here stands in the table. Parameters that no table takes (other devices,
strided ones, a subclass that defines its own update, clipped ones, sharded ones with a limited norm) are left to
``update_step``.

The device counts steps and derives the scalars of each step from the settings, so a captured step advances when its
graph is replayed. The host's ``step`` is kept beside it; once a step was captured only the device knows how often it
ran, and the host asks it when a checkpoint is made.
"""

from __future__ import annotations

import operator
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._alike import Likeness
from .._formats.table import FLOAT_DTYPES
from .._native import has_room_for_maps
from .._operator import all_plain
from .._ops import optimizer_update_many
from .._quant.optimizer_table import Hyper, StepTable, step_counters
from ._rules import scheduled
from ._sharded import is_dtensor, is_sharded, local_of, shard_offset

if TYPE_CHECKING:
    from ._base import Optimizer8bit

__all__ = ["ManySteps"]

_OWN = (
    "update_step",
    "_update",
    "get_config",
    "prefetch_state",
)  # methods whose redefinition asks for single steps

Member = tuple[int, int, Tensor]  # group, index in the group, parameter
Counter = tuple[Tensor, int]  # counts of steps on the device, and which of them


class _Launch:
    """One table, and what to compare before it may be used again."""

    def __init__(
        self, optimizer: Optimizer8bit, rows: list[list[Member]], limited: bool, rounds: bool
    ) -> None:
        members = [member for row in rows for member in row]
        self.owners = [p for _, _, p in members]
        self.params = [local_of(p) for p in self.owners]
        self.sharded = is_dtensor(self.owners[0])
        self.places = [pindex for _, pindex, _ in members]
        self.positions: range | list[int] = []  # among all the optimizer's parameters
        self.states = [optimizer.state[p] for p in self.owners]
        self.rows = [row[0] for row in rows]  # one member of each row speaks for it
        self.counts = [len(row) for row in rows]
        self.limited, self.rounds = limited, rounds
        self.g_dtype = self.owners[0].grad.dtype  # type: ignore[union-attr]
        self.addresses = [p.data_ptr() for p in self.params]
        keys = [key for key in ("state1", "state2") if key in self.states[0]]
        self.buffers = {key: [state[key] for state in self.states] for key in keys}
        self.pages = [p for p, state in zip(self.owners, self.states, strict=True) if _is_paged(state)]
        self.steps = [state["step"] for state in self.states]
        self.likeness = Likeness()

    def make_table(self, name: str, counters: dict[Tensor, Counter]) -> None:
        """Make the table; parameters that have no counter yet get one, which starts from the host's count."""
        new = [index for index, p in enumerate(self.owners) if p not in counters]
        if new:
            clock = step_counters([self.steps[index] for index in new], self.params[0].device)
            counters.update((self.owners[index], (clock, place)) for place, index in enumerate(new))
        own = [counters[p] for p in self.owners]
        addresses = [clock.data_ptr() + index * clock.itemsize for clock, index in own]
        self.clocks = {id(clock): clock for clock, _ in own}  # kept alive
        offsets = [shard_offset(p) if self.rounds else 0 for p in self.owners]
        dice = list(zip(self.places, offsets, strict=True))
        self.table = StepTable(name, self.params, self.states, addresses, self.limited, dice)

    def fits(self, counted_by_host: bool) -> bool:
        """Whether the table still describes the parameters and their state."""
        states = self.states
        return (
            list(map(Tensor.data_ptr, self._present())) == self.addresses
            and all(
                all(map(operator.is_, map(operator.itemgetter(key), states), tensors))
                for key, tensors in self.buffers.items()
            )
            and not (counted_by_host and list(map(operator.itemgetter("step"), states)) != self.steps)
        )

    def taken(self, everybody: list[Tensor | None]) -> tuple[list[Tensor], bool] | None:
        """The gradients as the kernel takes them, out of all there are, and whether they are known to be plain.

        None if they are missing or not such as the table was made for.
        """
        whole = isinstance(self.positions, range)
        grads: list[Tensor] = everybody if whole else [everybody[i] for i in self.positions]  # type: ignore[assignment, misc]
        if self.sharded:
            if not all(map(_laid_out_alike, self.owners, grads)):
                return None
            grads = list(map(local_of, grads))
        if self.likeness.holds(grads):
            return grads, True
        if any(g is None for g in grads):
            return None
        dtypes = [g.dtype for g in grads]
        if dtypes.count(self.g_dtype) != len(dtypes):
            return None
        if not all(map(Tensor.is_contiguous, grads)):
            return [g.contiguous() for g in grads], False
        plain = all_plain(grads, False) and all_plain(self.params, False)
        if plain:
            self.likeness.remember(grads)
        return grads, plain

    def _present(self) -> list[Tensor]:
        return list(map(local_of, self.owners)) if self.sharded else self.params

    def count_steps(self) -> None:
        first, count = self.steps[0], len(self.steps)
        if self.steps.count(first) == count:  # one object for all of them, which is soon counted and compared
            step = first + 1
            self.steps = [step] * count
            for state in self.states:
                state["step"] = step
            return
        self.steps = [step + 1 for step in self.steps]
        for state, step in zip(self.states, self.steps, strict=True):
            state["step"] = step


class _Layout:
    """Which parameters, gradients, states and settings of their own there were; decides which tables there are."""

    def __init__(self, optimizer: Optimizer8bit, params: list[Tensor], grads: list[Tensor | None]) -> None:
        self.params, self.states = params, list(optimizer.state.values())
        self.idle = [i for i, g in enumerate(grads) if g is None]
        self.lengths, self.overridden = _lengths(optimizer), _overridden(optimizer)

    def holds(self, optimizer: Optimizer8bit, params: list[Tensor], grads: list[Tensor | None]) -> bool:
        """Whether that is so still, as far as the launches do not look themselves."""
        return (
            self.lengths == _lengths(optimizer)
            and all(map(operator.is_, self.params, params))
            and all(grads[i] is None for i in self.idle)
            and len(self.states) == len(optimizer.state)
            and all(map(operator.is_, self.states, optimizer.state.values()))
            and self.overridden == _overridden(optimizer)
        )


class ManySteps:
    """The tables of one optimizer."""

    def __init__(self, earlier: ManySteps | None = None) -> None:
        self._launches: list[_Launch] = []
        self._rest: list[Member] = []
        self._layout: _Layout | None = None
        self._was_captured = False
        self._counters: dict[Tensor, Counter] = {}
        # Graphs go on using the memory they captured, so it must outlive a new state.
        self._captured: list[_Launch] = [] if earlier is None else earlier._captured

    def step(self, optimizer: Optimizer8bit) -> list[Member] | None:
        """Step on all parameters that tables take; the others are returned, None if no table can take any.

        Raises:
            RuntimeError: the current stream is being captured and the step cannot be.
        """
        if not _may_share(optimizer):
            return None
        params = list(chain.from_iterable([group["params"] for group in optimizer.param_groups]))
        grads = [p.grad for p in params]
        # A forked process may step on CPU parameters, but must not ask CUDA anything.
        capturing = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
        ready = self._ready(optimizer, params, grads)
        if ready is None:
            if capturing:
                raise RuntimeError(
                    "the first step, or one on other parameters or gradients than before, cannot be captured into a "
                    "CUDA graph: take a step first"
                )
            self._make(optimizer, params, grads)
            ready = self._ready(optimizer, params, grads)
            assert ready is not None, "tables that were just made fit"
        if capturing:
            self._note_capture()
        for launch, arguments in ready:
            if not capturing:
                for p in launch.pages:
                    optimizer.prefetch_state(p)
            launch.table.step(*arguments)
            if not self._was_captured:
                launch.count_steps()
        return self._rest

    def refresh_steps(self, optimizer: Optimizer8bit) -> None:
        """Write to the state how many steps the device has counted, where only the device knows."""
        if not self._was_captured:
            return
        counts = {id(clock): clock.tolist() for clock, _ in self._counters.values()}
        for p, (clock, index) in self._counters.items():
            optimizer.state[p]["step"] = counts[id(clock)][index]

    # --- what may have changed ---------------------------------------------------------------------------------

    def _ready(
        self, optimizer: Optimizer8bit, params: list[Tensor], grads: list[Tensor | None]
    ) -> list[tuple[_Launch, tuple]] | None:
        """The launches with all that their steps take, or None if new tables are needed."""
        if self._layout is None or not self._layout.holds(optimizer, params, grads):
            return None
        ready, counted_by_host = [], not self._was_captured
        for launch in self._launches:
            configs = [optimizer.get_config(g, i, optimizer.param_groups[g]) for g, i, _ in launch.rows]
            if any((config["max_unorm"] > 0.0) != launch.limited for config in configs):
                return None
            if any(_rounds(config, launch.params[0]) != launch.rounds for config in configs):
                return None
            if any(_asks_for_more(config) for config in configs):
                return None
            taken = launch.taken(grads)
            if taken is None or not launch.fits(counted_by_host):
                return None
            device = launch.params[0].device
            hypers = [_hyper_of(config, launch.steps[0] + 1) for config in configs]
            lrs = [_lr_tensor(config["lr"], device) for config in configs]
            seeds = [_signed(config["rounding_seed"]) for config in configs] if launch.rounds else []
            gradients, plain = taken
            ready.append((launch, (gradients, launch.counts, hypers, lrs, seeds, plain)))
        return ready

    def _note_capture(self) -> None:
        if self._rest:
            raise RuntimeError(
                f"{len(self._rest)} parameters step one by one and cannot be captured into a CUDA graph: they or their "
                "gradients are strided, of unequal dtypes, on the CPU, clipped, or sharded with a limited norm"
            )
        self._was_captured = True
        for launch in self._launches:
            if not any(launch is kept for kept in self._captured):
                self._captured.append(launch)

    # --- tables ------------------------------------------------------------------------------------------------

    def _make(self, optimizer: Optimizer8bit, params: list[Tensor], grads: list[Tensor | None]) -> None:
        """Sort the parameters with gradients into tables; state that is missing is made."""
        self.refresh_steps(optimizer)
        if not self._was_captured:
            self._counters = {}
        self._rest = []
        kinds: dict[tuple, dict[tuple, list[Member]]] = {}
        groups = enumerate(optimizer.param_groups)
        members = [
            (gindex, pindex, p) for gindex, group in groups for pindex, p in enumerate(group["params"])
        ]
        for member in members:
            gindex, pindex, p = member
            if p.grad is None:
                continue
            group = optimizer.param_groups[gindex]
            if not optimizer.state.get(p):
                optimizer.init_state(group, p, gindex, pindex)
            config = optimizer.get_config(gindex, pindex, group)
            state = optimizer.state[p]
            if not _fits_a_table(p, state, config):
                self._rest.append(member)
                continue
            limited = config["max_unorm"] > 0.0
            if limited and "unorm_vec" not in state:  # asked for after the state was made
                state["unorm_vec"] = torch.zeros(1, dtype=torch.float32, device=p.device)
            first = state["state1"]
            maps = tuple(id(state.get(key)) for key in ("qmap1", "qmap2"))
            flags = (limited, _rounds(config, p))
            kind = (p.device, p.dtype, p.grad.dtype, first.dtype, is_dtensor(p), maps, flags)
            row = (
                gindex,
                id(optimizer.mng.pid2config.get(id(p))),
                id(optimizer.mng.index2config.get((gindex, pindex))),
            )
            kinds.setdefault(kind, {}).setdefault(row, []).append(member)
        self._launches = []
        places = {p: place for place, p in enumerate(params)}
        for kind, rows in kinds.items():
            launch = _Launch(optimizer, list(rows.values()), *kind[-1])
            launch.make_table(optimizer.optimizer_name, self._counters)
            positions = [places[p] for p in launch.owners]
            everybody = range(len(params))
            launch.positions = everybody if positions == list(everybody) else positions
            self._launches.append(launch)
        self._layout = _Layout(optimizer, params, grads)


def _may_share(optimizer: Optimizer8bit) -> bool:
    """Whether the optimizer steps as its rule says, and not under a compiler's eyes."""
    from ._base import _RuleOptimizer

    kind = type(optimizer)
    own = (
        getattr(kind, name, None) is getattr(_RuleOptimizer, name) and name not in optimizer.__dict__
        for name in _OWN
    )
    return bool(optimizer_update_many.kernels) and all(own) and not torch.compiler.is_compiling()


def _lengths(optimizer: Optimizer8bit) -> list[int]:
    return [len(group["params"]) for group in optimizer.param_groups]


def _overridden(optimizer: Optimizer8bit) -> list:
    """Which of the parameters have settings of their own; entries of others come and go."""
    mng, groups = optimizer.mng, optimizer.param_groups
    if not mng.pid2config and not mng.index2config:
        return []
    own = {id(p) for group in groups for p in group["params"]}
    places = [
        (gindex, pindex)
        for gindex, pindex in mng.index2config
        if gindex < len(groups)
        and pindex < len(groups[gindex]["params"])
        and mng.config_of(groups[gindex]["params"][pindex], (gindex, pindex))
    ]
    return [key for key in mng.pid2config if key in own] + places


def _is_paged(state: dict[str, Any]) -> bool:
    return any(getattr(state.get(key), "is_paged", False) for key in ("state1", "state2"))


def _fits_a_table(p: Tensor, state: dict[str, Any], config: dict[str, Any]) -> bool:
    grad, first = p.grad, state.get("state1")
    kernel = optimizer_update_many.kernels.get(p.device.type)
    if kernel is None or not isinstance(first, Tensor):
        return False
    assert grad is not None
    plain = grad.dtype == p.dtype and not config["max_unorm"] > 0.0 and not _rounds(config, p)
    if getattr(kernel, "plain_only", False) and not plain:
        return False
    if is_dtensor(p) and not _laid_out_alike(p, grad):
        return False
    if not has_room_for_maps(p.device, sum(key in state for key in ("qmap1", "qmap2"))):
        return False
    part, part_grad = local_of(p), local_of(grad)
    tensors = [t for t in (first, state.get("state2")) if t is not None]
    return (
        part_grad.layout == part.layout == torch.strided
        and p.dtype in FLOAT_DTYPES
        and grad.dtype in (p.dtype, torch.float32)
        and part_grad.device == part.device
        and part_grad.shape == part.shape
        and part.is_contiguous()
        and all(
            t.is_contiguous() and (t.device == p.device or getattr(t, "is_paged", False)) for t in tensors
        )
        and all(
            state[key].device == p.device for key in ("qmap1", "qmap2", "absmax1", "absmax2") if key in state
        )
        and not _asks_for_more(config)
        and not (config["max_unorm"] > 0.0 and is_sharded(p))
    )


def _laid_out_alike(p: Tensor, grad: Tensor) -> bool:
    """Whether a DTensor's gradient needs no communication; all processes see the same."""
    return getattr(grad, "placements", None) == p.placements  # type: ignore[attr-defined]


def _asks_for_more(config: dict[str, Any]) -> bool:
    """Whether the settings ask for what only single steps do."""
    return config["percentile_clipping"] < 100


def _rounds(config: dict[str, Any], p: Tensor) -> bool:
    """Whether ``p`` is rounded at random."""
    return p.dtype == torch.bfloat16 and config["rounding_seed"] is not None


def _signed(seed: int) -> int:
    """The 64 bits of a seed as the signed number that operators take."""
    return (seed + (1 << 63)) % (1 << 64) - (1 << 63)


def _hyper_of(config: dict[str, Any], step: int) -> Hyper:
    betas, lr = config["betas"], config["lr"]
    scheduled(
        betas, config["alpha"], config["t_alpha"], config["t_beta3"], step
    )  # raises for what makes no sense
    return Hyper(
        lr=0.0 if isinstance(lr, Tensor) and lr.is_cuda else float(lr),
        beta1=betas[0],
        beta2=betas[1],
        beta3=betas[2] if len(betas) > 2 else 0.0,
        alpha=config["alpha"],
        eps=config["eps"],
        weight_decay=config["weight_decay"],
        gnorm_scale=1.0,
        t_alpha=config["t_alpha"] or 0.0,
        t_beta3=config["t_beta3"] or 0.0,
        max_unorm=config["max_unorm"],
        skip_zeros=bool(config["skip_zeros"]),
    )


def _lr_tensor(lr: Any, device: torch.device) -> Tensor | None:
    """A learning rate that is read on the device, when the step runs there."""
    if not isinstance(lr, Tensor) or not lr.is_cuda:
        return None
    return lr.detach().to(device=device, dtype=torch.float32)
