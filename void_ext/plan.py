"""Plans: which layers run, in the prompt and in the response, and for which rows of a batch.

A plan says for each layer what happens to its attention (RUN, PROJECT or SKIP) and to its MLP (RUN or SKIP)::

    plan = VoidPlan.from_layers(model, skip=[11, 17], attention=[20], phase="response")
    plan = VoidPlan.from_trace(handle.trace, model, budget=4)
    print(plan.describe())
    plan.save("plan.json")

It is data: immutable, comparable, and a JSON file that carries the fingerprint of the model it was made for.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from void_ext import _options
from void_ext._fingerprint import Fingerprint, Weights, layer_count
from void_ext._phase_plan import Action, PhasePlan
from void_ext._selection import check_indices

if TYPE_CHECKING:
    from void_ext.trace import Trace

__all__ = ["Action", "Fingerprint", "PhasePlan", "VoidPlan", "Weights"]

_PHASES = ("prompt", "response")


@dataclass(frozen=True, repr=False)
class VoidPlan:
    """What runs in the prompt and in the response.

    Attributes:
        prompt, response: a :class:`PhasePlan` each. Where both tell rows apart, the same number of them.
        fingerprint: the model it was made for; None where none was given.
        source: how it was made, in words; two plans that do the same are equal whatever they say here.

    Raises ValueError where a layer (of a row) is SKIPped in the prompt and not in the response: the response would
    attend to keys and values that nobody computed; and for a source that is no Unicode text. Hashable; no part of it
    can be changed.
    """

    prompt: PhasePlan
    response: PhasePlan
    fingerprint: Fingerprint | None = None
    source: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        for name in _PHASES:
            if not isinstance(getattr(self, name), PhasePlan):
                raise TypeError(f"{name}: expected a PhasePlan, got {type(getattr(self, name)).__name__}")
        if self.fingerprint is not None and not isinstance(self.fingerprint, Fingerprint):
            raise TypeError(f"fingerprint: expected a Fingerprint or None, got {type(self.fingerprint).__name__}")
        if not isinstance(self.source, str):
            raise TypeError(f"source: expected text, got {type(self.source).__name__}")
        if _options.has_half_pair(self.source):  # could be saved, and not be loaded
            raise ValueError(
                f"source: expected text, got half of a surrogate pair in {self.source!r:.200}; take it out, or encode "
                "the name that it came from with errors='backslashreplace'"
            )
        if self.prompt.layers != self.response.layers:
            raise ValueError(
                f"response: expected the {self.prompt.layers} layers of prompt, got {self.response.layers}"
            )
        if self.fingerprint is not None and self.fingerprint.layers != self.layers:
            raise ValueError(f"fingerprint: expected a model of {self.layers} layers, got {self.fingerprint.layers}")
        rows = {phase.rows for phase in (self.prompt, self.response)} - {None}
        if len(rows) > 1:
            raise ValueError(f"response: expected {self.prompt.rows} rows, as in prompt, got {self.response.rows}")
        self._refuse_holes()

    def _refuse_holes(self) -> None:
        before, after = self.prompt.table(), self.response.table()
        for row in range(self.rows or 1):
            # A phase that tells no rows apart has one entry for all of them.
            first, then = (table[row if len(table) > 1 else 0][0] for table in (before, after))
            for layer in range(self.layers):
                if first[layer] == Action.SKIP and then[layer] != Action.SKIP:
                    where = f"layer {layer}" + ("" if self.rows is None else f" of row {row}")
                    raise ValueError(
                        f"prompt: {where} SKIPs its attention, a hole in the cache where the response's attention is "
                        f"{then[layer].name}; expected PROJECT or RUN, or SKIP in the response too"
                    )

    def __repr__(self) -> str:
        parts = [f"layers={self.layers}"]
        parts += [f"rows={self.rows}"] if self.rows is not None else []
        parts += [f"{name}_skipped={self.phase(name).skipped:.4g}" for name in _PHASES]
        parts += [f"model_type={self.fingerprint.model_type!r}"] if self.fingerprint is not None else []
        parts += [f"source={self.source!r}"] if self.source else []
        return f"VoidPlan({', '.join(parts)})"

    # ---- making plans ----

    @classmethod
    def dense(cls, layers: int) -> VoidPlan:
        """Everything runs."""
        return cls(PhasePlan.dense(layers), PhasePlan.dense(layers), source="dense")

    @classmethod
    def from_layers(
        cls,
        model: nn.Module | int,
        *,
        skip: Iterable[int] = (),
        attention: Iterable[int] = (),
        mlp: Iterable[int] = (),
        phase: str = "both",
    ) -> VoidPlan:
        """The plan that leaves out the layers named, all other ones run.

        Args:
            model: a transformers model; or a number of layers, and the plan carries no fingerprint.
            skip: whole layers. Same as naming them in both of the next two.
            attention: layers that go without their attention: SKIP in both phases (``phase="both"``), SKIP in the
                response (``"response"``), or PROJECT in the prompt (``"prompt"``), whose keys and values the response
                needs.
            mlp: layers that go without their MLP, in the phases named.
            phase: ``"both"``, ``"prompt"`` or ``"response"``.

        Indices count from 0; negative ones, ones out of range and ones given twice in one list are refused. All layers
        may be named: what is left is the final norm and the head on the embedding.

        A response layer whose attention is SKIPped after it ran in the prompt cannot run in a later turn on the same
        cache; make that PhasePlan by hand with PROJECT where it should.
        """
        _options.check_choice("phase", phase, ("both", *_PHASES))
        layers, fingerprint = layers_of(model)
        whole = check_indices("skip", skip, layers)
        halves = [
            frozenset(whole) | frozenset(check_indices(name, given, layers))
            for name, given in (("attention", attention), ("mlp", mlp))
        ]
        rest = [sorted(half - set(whole)) for half in halves]
        source = f"from_layers(skip={list(whole)}, attention={rest[0]}, mlp={rest[1]}, phase={phase!r})"
        off: list[Sequence[frozenset[int]]] = [
            halves if phase in ("both", name) else (frozenset(), frozenset()) for name in _PHASES
        ]
        return plan_of_sets(layers, off[0], off[1], fingerprint=fingerprint, source=source)

    @classmethod
    def from_trace(
        cls,
        trace: Trace | Sequence[Trace],
        model: nn.Module | None = None,
        *,
        signal: str = "delta",
        alpha: float | None = None,
        budget: float | None = None,
        at_least: float | None = None,
        protect: Iterable[int] = (),
        protect_default: bool = True,
        halves: bool = False,
        phase: str = "both",
        action: str | None = None,
    ) -> VoidPlan:
        """The plan that leaves out the layers which hardly changed the stream of the traced tokens.

        Args:
            trace: one trace, or several, of a model that ran dense. Their real tokens are taken together.
            model: what was traced, for the plan's fingerprint; without it the plan carries none.
            signal: what layers are ranked by, over the tokens for which they ran:

                - ``"delta"``: the share of tokens for which the layer was a void, the greatest first. Without a budget
                  the layers go that are void in more than half of the tokens; with one, the first of those that are
                  void at all;
                - ``"abs_delta"``: the mean of ``|n_{l+1} - n_l|``, the smallest first;
                - ``"relative_update"``: the mean of ``||h_{l+1} - h_l|| / ||h_l||``, the smallest first;
                - ``"cosine"``: the mean of ``1 - cos(h_l, h_{l+1})`` (ShortGPT's block influence), the smallest first.

                Ties go to the smaller mean ``|n_{l+1} - n_l|``, then to the lower index. The last three need a budget,
                the last two a trace with updates (``patch(…, updates=True)``).
            alpha: for ``"delta"``, finite and >= 0; None takes the traces' own, if they have the same.
            budget: at most so many layers, a half as 0.5. Without ``halves`` only whole layers go.
            at_least: at least so many layers, taken by rank whether void or not; ``budget=k, at_least=k`` is exactly k.
            protect: layers that run whatever their rank, beside the default ones.
            protect_default: the first two layers and the last one always run.
            halves: rank attention and MLP halves apart; needs a trace with halves (``patch(…, halves=True)``), tokens
                judged one by one, and a signal that norms alone give. Thresholds then range over the halves before.
            phase: ``"both"``: one set of layers for both phases, ranked on the tokens of both; ``"prompt"`` or
                ``"response"``: ranked on that phase's tokens, and all layers run in the other; ``"each"``: two sets,
                each within the bounds.
            action: ``"skip"`` or ``"project"``: what happens to the attention of these layers. None is ``"project"``
                for ``phase="prompt"`` (skipping there would leave the response holes in the cache) and ``"skip"``
                otherwise. With ``phase="each"``, a layer that only the prompt goes without is PROJECTed there.

        Raises:
            TypeError, ValueError: an argument that is none of the above; no real token; a trace without the table that
                the signal needs; a model with another number of layers; bounds that no choice of layers meets.
        Cost: reads the trace, one pass over its norms; waits for the device.
        """
        from void_ext._calibration import plan_from_trace

        options: dict[str, Any] = {"alpha": alpha, "budget": budget, "at_least": at_least}
        options |= {"protect": check_indices("protect", protect), "protect_default": protect_default}
        return plan_from_trace(trace, model, signal=signal, halves=halves, phase=phase, action=action, options=options)

    # ---- what it says ----

    @property
    def layers(self) -> int:
        return self.prompt.layers

    @property
    def rows(self) -> int | None:
        """How many rows the plan tells apart; None: one plan for all."""
        return self.response.rows if self.prompt.rows is None else self.prompt.rows

    @property
    def is_dense(self) -> bool:
        return self.prompt.is_dense and self.response.is_dense

    def phase(self, name: str) -> PhasePlan:
        """The plan of ``"prompt"`` or ``"response"``."""
        return self.prompt if _options.check_choice("phase", name, _PHASES) == "prompt" else self.response

    def collapse(self) -> VoidPlan:
        """One plan for all rows in the phases where they are all the same."""
        return self._with(PhasePlan.collapse)

    def row(self, index: int) -> VoidPlan:
        """The plan of one row alone."""
        return self._with(lambda phase: phase.row(index))

    def select_rows(self, indices: Sequence[int]) -> VoidPlan:
        """The plan of these rows, in this order; a plan that tells no rows apart stays as it is."""
        return self._with(lambda phase: phase.select_rows(indices))

    def _with(self, change: Callable[[PhasePlan], PhasePlan]) -> VoidPlan:
        return VoidPlan(change(self.prompt), change(self.response), self.fingerprint, self.source)

    def check(self, model: nn.Module, force: bool = False) -> None:
        """Raise ValueError where the plan was made for another model.

        The architecture (model type, layers, sizes) must be the plan's, ``force`` or not; the hash over the norm
        weights too, unless ``force``. Where either model is quantised, another hash only warns. A plan without a
        fingerprint is held to the number of layers alone. Other matrices beside the same norm weights are not noticed.
        """
        _options.check_flag("force", force)
        if self.fingerprint is None:
            if layer_count(model) != self.layers:
                raise ValueError(f"model: the plan was made for {self.layers} layers, got {layer_count(model)}")
            return
        found = Fingerprint.of(model)
        if different := self.fingerprint.differences(found):
            raise ValueError(f"model: the plan was made for another architecture; got {', '.join(different)}")
        known = bool(found.norms and self.fingerprint.norms)
        same = found.norms == self.fingerprint.norms
        if found.quantised or self.fingerprint.quantised:
            if found.quantised != self.fingerprint.quantised or not same:
                kinds = ["a quantised" if side.quantised else "an unquantised" for side in (self.fingerprint, found)]
                norms = "" if same else ", its norm weights are others"
                text = f"the plan was made for {kinds[0]} model, this is {kinds[1]} one{norms}; voids may differ"
                warnings.warn(text, stacklevel=2)
        elif not known:
            warnings.warn("norm weights could not be read (meta device): the checkpoint is not checked", stacklevel=2)
        elif not same and not force:
            raise ValueError(
                "model: its norm weights are not those of the model the plan was made for (another checkpoint, or the "
                f"same one in another dtype): expected sha256 {self.fingerprint.norms[:12]}…, got {found.norms[:12]}…; "
                "force accepts it"
            )

    def describe(self) -> str:
        """The plan as text: a strip of layers for each phase and half, and what it saves."""
        from void_ext._plan_text import describe

        return describe(self)

    # ---- files ----

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain lists, numbers and text: what :meth:`save` writes."""
        from void_ext import _plan_file

        return _plan_file.to_dict(self)

    @classmethod
    def from_dict(cls, value: Any) -> VoidPlan:
        """What :meth:`to_dict` gave. Raises ValueError, naming the entry, for anything else."""
        from void_ext import _plan_file

        return _plan_file.from_dict(value)

    def save(self, path: str | os.PathLike[str], force: bool = False) -> Path:
        """Write the plan as JSON, under a temporary name, synced, renamed.

        Raises FileExistsError where ``path`` exists and not ``force``, the other OSErrors of a place that cannot be
        written, and ValueError for a plan of more rows than a plan file may hold.
        """
        from void_ext import _plan_file

        return _plan_file.save(self, _options.check_path("path", path), force=force)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> VoidPlan:
        """Read what :meth:`save` wrote. Raises ValueError, naming the path and what is wrong, for any other file."""
        from void_ext import _plan_file

        return _plan_file.load(_options.check_path("path", path))


def plan_of_sets(
    layers: int,
    prompt: Sequence[frozenset[int]],
    response: Sequence[frozenset[int]],
    *,
    action: Action = Action.SKIP,
    fingerprint: Fingerprint | None = None,
    source: str = "",
) -> VoidPlan:
    """The plan without these halves: for each phase, the layers without attention and the layers without MLP.

    Attention off in the response becomes ``action``; in the prompt it becomes SKIP where the response SKIPs too, and
    else PROJECT.
    """
    every = range(layers)
    later = [action if layer in response[0] else Action.RUN for layer in every]
    first = [
        Action.RUN if layer not in prompt[0] else Action.SKIP if later[layer] == Action.SKIP else Action.PROJECT
        for layer in every
    ]
    mlps = [tuple(Action.SKIP if layer in off[1] else Action.RUN for layer in every) for off in (prompt, response)]
    return VoidPlan(PhasePlan(tuple(first), mlps[0]), PhasePlan(tuple(later), mlps[1]), fingerprint, source)


def layers_of(model: nn.Module | int) -> tuple[int, Fingerprint | None]:
    """How many layers, and whose."""
    if isinstance(model, int) and not isinstance(model, bool):
        if model < 1:
            raise ValueError(f"model: expected a transformers model or a number of layers >= 1, got {model}")
        return model, None
    fingerprint = Fingerprint.of(cast("nn.Module", model))  # True is no module, and told so there
    return fingerprint.layers, fingerprint
