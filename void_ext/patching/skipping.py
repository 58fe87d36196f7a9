"""Drives a policy: asks it at the stated moments, and turns what it says into the schedule of each forward call."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from void_ext.counters import Counters, PhaseCounters
from void_ext.dispatch import CostModel
from void_ext.patching import schedule as schedules
from void_ext.patching.agreement import Agreement
from void_ext.patching.call import Call
from void_ext.patching.projection import KeyForm
from void_ext.patching.registry import LayerForm
from void_ext.patching.schedule import ALL, NONE, PROJECT, SOME, Schedule
from void_ext.plan import Action, PhasePlan, VoidPlan
from void_ext.policies import History, check_decision
from void_ext.store import PHASES, PROMPT, RESPONSE, TraceStore

if TYPE_CHECKING:
    from void_ext.patching.running import Generation


@dataclass(frozen=True)
class HalfBytes:
    """Bytes of parameters that launching a half of a layer reads, its norm included."""

    attention: int
    project: int
    mlp: int

    @classmethod
    def of(cls, layer: nn.Module, form: LayerForm, keys: KeyForm) -> HalfBytes:
        def size(*modules: nn.Module) -> int:
            return sum(_weight_bytes(part) for module in modules for part in module.modules())

        def named(*names: str | None) -> list[nn.Module]:
            return [getattr(layer, name) for name in names if name is not None]

        attention: nn.Module = getattr(layer, form.attention)
        return cls(
            attention=size(attention, *named(form.input_norm, *form.attention_after)),
            project=size(*named(form.input_norm), *keys.parts(attention)),
            mlp=size(*named(form.mlp, form.post_norm, *form.mlp_after)),
        )


def _weight_bytes(module: nn.Module) -> int:
    """Of a module itself, without its children. Quantised linears keep weights in buffers, or show them on request."""
    held = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    shown: Any = getattr(module, "weight", None)
    if isinstance(getattr(module, "in_features", None), int) and callable(shown):
        held.append(shown())
    return sum(tensor.numel() * tensor.element_size() for tensor in held)


_COUNTING = threading.Lock()  # threads that share a model share its counters


class Skipper:
    """What is skipped in the calls of one patched model: the policy, the plan in force and its schedules."""

    def __init__(
        self,
        policy: Any,
        layers: int,
        weight_bytes: tuple[HalfBytes, ...],
        costs: CostModel | None = None,
        agreement: Agreement | None = None,
    ):
        self.costs = costs
        self.agreement = agreement  # None: the model is in one process
        self.policy = policy
        self.layers = layers
        self.weight_bytes = weight_bytes
        self.counters = Counters()
        self.plan = VoidPlan.dense(layers)
        self._schedules: list[Schedule] = []
        self._pending = _Arriving()  # a table that governs from the next call on
        self._responding = False
        self._ended = _Arriving()
        # The last call's schedule, shape and launches, and what they sum to.
        self._tallied: tuple[Schedule, Any, PhaseCounters] | None = None
        self._live: tuple[list[bool], Schedule] | None = None  # the rows that ended, the schedule of the others
        self._adopt(self.plan)

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("policy", "layers", "weight_bytes", "costs", "agreement")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Skipper.__init__(self, **state)

    def twin(self) -> Skipper:
        """The same for another thread: what a policy keeps of a sequence in its attributes is not shared."""
        twin = Skipper(**{**self.__getstate__(), "policy": copy.copy(self.policy)})
        twin.counters = self.counters
        return twin

    @property
    def halts(self) -> bool:
        return bool(getattr(self.policy, "halts", False))

    @property
    def by_row(self) -> bool:
        return bool(getattr(self.policy, "by_row", False))

    @property
    def not_compiled(self) -> str | None:
        """Why calls under this policy cannot be compiled; None where they can."""
        name = type(self.policy).__name__
        if self.halts:
            return f"{name} decides inside of a call, from what was computed"
        if getattr(self.policy, "every_token", False):
            return f"{name} decides for every token, and each decision would have to be compiled"
        return None

    def check_compiled(self, schedule: Schedule) -> None:
        """Raises ValueError where this call cannot be compiled."""
        how = "use StaticPlan or PromptPlan, or run the model without torch.compile"
        if self.not_compiled is not None:
            raise ValueError(f"policy: {self.not_compiled}; {how}")
        if schedule.rows is not None:
            raise ValueError(
                "plan: its rows, or its prompt and response in one call, differ; a compiled forward runs what is the "
                "same for all. Use granularity='batch' or one row at a time, or run the model without torch.compile"
            )

    def count(self, phase: int) -> PhaseCounters:
        """The counters of a phase; one more call."""
        counters = self.counters.response if phase == RESPONSE else self.counters.prompt
        with _COUNTING:
            counters.calls += 1
        return counters

    def tally(self, call: Call) -> None:
        """Add what the layers of ``call`` launched, noted as they did, to its counters."""
        counters, schedule = call.counters, call.schedule
        if counters is None or schedule is None:
            return
        # One decode step launches what the one before did, and is as long as a few additions should be.
        kept, launches = self._tallied, (call.batch, call.length, call.begun, call.launched)
        if kept is None or kept[0] is not schedule or kept[1] != launches:
            kept = self._tallied = (schedule, launches, self._sum(call, schedule))
        with _COUNTING:
            counters.add(kept[2])
        call.launched, call.begun = [], 0

    def _sum(self, call: Call, schedule: Schedule) -> PhaseCounters:
        counters = PhaseCounters()
        rows = call.batch * call.length
        for index, attention, mlp, mlp_rows in call.launched or [(layer, ALL, ALL, 0) for layer in range(call.begun)]:
            sizes = self.weight_bytes[index]
            if attention == ALL and mlp == ALL:
                counters.attention_run += 1
                counters.mlp_run += 1
                counters.layers_run += 1
                counters.rows_needed += 2 * rows
                counters.rows_computed += 2 * rows
                counters.weight_bytes += sizes.attention + sizes.mlp
                continue
            needed = schedule.counts(index, call.batch, call.length)
            counters.rows_needed += needed[1] + (needed[0] if attention != NONE else 0)
            if attention == NONE:
                counters.attention_skipped += 1
            else:
                counters.rows_computed += rows
                if attention == PROJECT:
                    counters.attention_projected += 1
                    counters.weight_bytes += sizes.project
                else:
                    counters.attention_run += 1
                    counters.weight_bytes += sizes.attention
            if mlp == NONE:
                counters.mlp_skipped += 1
            else:
                counters.mlp_run += 1
                counters.rows_computed += mlp_rows
                counters.weight_bytes += sizes.mlp
            if attention in (ALL, SOME) or mlp != NONE:
                counters.layers_run += 1
            elif attention == PROJECT:
                counters.layers_projected += 1
            else:
                counters.layers_skipped += 1
        return counters

    def restart(self, batch: int) -> None:
        """A new trace begins."""
        self._pending.take()
        self._ended.take()
        self._responding = False
        self._adopt(VoidPlan.dense(self.layers))
        self._decide(None, PROMPT, batch)

    def end_generation(self) -> None:
        """Rows that ended there may go on elsewhere."""
        self._ended.take()
        self._live = None

    def schedule(
        self,
        store: TraceStore | None,
        phases: Sequence[int],
        batch: int,
        start: int,
        cached: bool,
        generation: Generation | None = None,
    ) -> Schedule:
        """Ask the policy what is due, and give the schedule of a call over positions with these phases.

        Nothing is read from the device here: a table that a policy left there, and which rows of ``generation`` have
        ended, were copied in the background since the call before, and that copy is awaited.
        """
        table = self._pending.take()
        if table is not None:
            plan = plan_of_table(table)
            self._agree(plan)
            if plan.rows is not None and not self.by_row:
                # By that word beams were allowed, and rows that the caller moves (reorder_cache).
                raise ValueError(
                    f"decide: expected a table that is the same for all rows from {type(self.policy).__name__}, which "
                    "says by_row = False"
                )
            self._adopt(plan)
        gone = self._ended.take()
        every_token = bool(getattr(self.policy, "every_token", False))
        # A call with candidates behind its prompt (assisted generation) is not asked about: there is no history yet.
        mixed = PROMPT in phases and RESPONSE in phases
        if RESPONSE in phases and not (mixed and (cached or store is None)):
            if every_token and not cached:
                raise ValueError(
                    f"policy: {type(self.policy).__name__} decides for every token and needs a KV cache, so that what "
                    "was decided for a token stays; got a call without one (use_cache=False)"
                )
            if not self._responding or every_token:
                self._decide(_history(store, batch, self.layers, start if cached else None), RESPONSE, batch)
                self._responding = True
        elif self._responding and not mixed:
            self._decide(_history(store, batch, self.layers, start if cached else None), PROMPT, batch)
            self._responding = False
        chosen = self._chosen(phases, batch)
        if chosen.rows == batch and phases[0] == RESPONSE:
            ended = None if generation is None else generation.ended
            if ended is not None and len(ended) == batch:
                self._ended.send(ended)
            # Ranks learn of an end each for itself: what they launch does not depend on it.
            flags = gone.tolist() if self.agreement is None and gone is not None and len(gone) == batch else []
            if any(flags):
                # No half is launched that every row still going on goes without.
                if self._live is None or self._live[0] != flags:
                    self._live = (flags, schedules.of_phase(self.plan.response, RESPONSE, flags))
                chosen = self._live[1]
        _check_rows(chosen, batch, batch * len(phases))
        return chosen

    def in_force(self, phase: int, batch: int) -> Schedule:
        """The schedule of a call that is no token's: of a processor that runs the model for itself, say."""
        chosen = self._schedules[phase]
        _check_rows(chosen, batch, batch)
        return chosen

    def _chosen(self, phases: Sequence[int], batch: int) -> Schedule:
        first, last = phases[0], phases[-1]
        if first == last or self.plan.prompt == self.plan.response:
            return self._schedules[last]
        return schedules.of_phases([self.plan.phase(PHASES[phase]) for phase in phases], last, batch)

    def _decide(self, history: History | None, phase: int, batch: int) -> None:
        try:
            decision = self.policy.decide(history, PHASES[phase])
            if decision is not None:
                check_decision(decision, batch, self.layers, by_row=self.by_row)
        except Exception as error:
            self._agree(error, batch, phase)
            raise
        self._agree(decision, batch, phase)
        if decision is None:
            return
        if isinstance(decision, VoidPlan):
            self._adopt(decision)
            return
        # Deterministic: this call goes on as before, the next one follows the table, however fast the machine is.
        self._pending.send(decision)

    def _agree(self, decision: Any, *circumstances: int) -> None:
        """Raises DivergenceError, on every rank, where another rank decided otherwise, or in other circumstances."""
        if self.agreement is None:
            return
        if isinstance(decision, VoidPlan):
            what: Any = (decision.prompt.table(), decision.response.table())
            words = repr(decision)
        elif isinstance(decision, Tensor):  # its values are compared once they are on the host
            what, words = (tuple(decision.shape), decision.dtype), f"a table {list(decision.shape)}"
        else:
            what, words = type(decision).__name__, "an error" if decision is not None else "no new decision"
        if circumstances:
            words += f" for {circumstances[0]} rows of the {PHASES[circumstances[1]]}"
        # Other costs may send the rows of an MLP another way, into products that the ranks make together.
        self.agreement.check(
            (what, circumstances, self.costs), words + ("" if self.costs is None else f", {self.costs}")
        )

    def _adopt(self, plan: VoidPlan) -> None:
        if plan is self.plan and self._schedules:
            return
        self.plan = plan
        self._live = None
        self._schedules = [schedules.of_phase(plan.phase(name), phase) for phase, name in enumerate(PHASES)]


class _Arriving:
    """A tensor on its way to the host, copied in the background; taken once, when its time has come."""

    def __init__(self) -> None:
        self._table: Tensor | None = None
        self._event: Any = None

    def send(self, table: Tensor) -> None:
        self._event = None
        if table.device.type != "cuda":
            self._table = table.clone()
            return
        with torch.cuda.device(table.device):
            self._table = torch.empty(table.shape, dtype=table.dtype, pin_memory=True)
            self._table.copy_(table, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def take(self) -> Tensor | None:
        """What was sent, on the host; None where nothing was."""
        table, self._table = self._table, None
        if table is not None and self._event is not None:
            self._event.synchronize()
        return table


def plan_of_table(table: Tensor) -> VoidPlan:
    """The plan of a host table ``[B, L]`` or ``[B, L, 2]`` (attention, MLP), True = run; K and V are always made."""
    halves = table if table.dim() == 3 else table[..., None].expand(*table.shape, 2)
    attention, mlp = halves.unbind(-1)
    phase = PhasePlan(
        tuple(tuple(Action.RUN if on else Action.PROJECT for on in row) for row in attention.tolist()),
        tuple(tuple(Action.RUN if on else Action.SKIP for on in row) for row in mlp.tolist()),
    ).collapse()
    return VoidPlan(prompt=VoidPlan.dense(table.shape[1]).prompt, response=phase, fingerprint=None, source="table")


def _check_rows(schedule: Schedule, *fitting: int) -> None:
    if schedule.rows is not None and schedule.rows not in fitting:
        raise ValueError(f"plan: it was made for {schedule.rows} batch rows; got a batch of {fitting[0]}")


def _history(store: TraceStore | None, batch: int, layers: int, end: int | None) -> History:
    """The positions below ``end``, which a cache still holds; None: all."""
    if store is None:
        empty = torch.empty(batch, 0, layers + 1)
        return History(empty, empty[..., 1:].bool(), empty[..., 0].bool(), None, [])
    return History(
        norms=store.view("norms")[:, :end],
        executed=store.view("executed")[:, :end],
        mask=store.view("mask")[:, :end],
        updates=store.view("updates")[:, :end] if store.has("updates") else None,
        phases=store.phase[:end],
    )
