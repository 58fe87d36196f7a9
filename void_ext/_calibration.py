"""Plans from traces: see :meth:`void_ext.VoidPlan.from_trace`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from void_ext import _options, ops
from void_ext._ranking import Evidence, choose, gather
from void_ext._selection import Criterion
from void_ext.plan import Action, VoidPlan, layers_of, plan_of_sets
from void_ext.trace import PhaseTrace, Trace

_PHASES = ("prompt", "response")


def plan_from_trace(
    trace: Trace | Sequence[Trace],
    model: nn.Module | None,
    *,
    signal: str,
    halves: bool,
    phase: str,
    action: str | None,
    options: dict[str, Any],
) -> VoidPlan:
    """Rank, choose, and make the plan; ``options`` are the rest of a :class:`Criterion`."""
    traces = _check_traces(trace)
    _options.check_flag("halves", halves)
    _options.check_choice("phase", phase, ("both", *_PHASES, "each"))
    off = _check_action(action, phase)
    if options["alpha"] is None:
        alphas = sorted({given.alpha for given in traces})
        if signal == "delta" and len(alphas) > 1:
            made = ", ".join(map(_options.alpha_text, alphas))
            raise ValueError(
                f"alpha: expected one for all traces, which were made with {made}, got None; give the one that is to "
                "judge voids"
            )
        options = {**options, "alpha": alphas[0]}
    criterion = Criterion(signal=signal, **options)
    layers = traces[0].num_layers
    fingerprint = None
    if model is not None:
        count, fingerprint = layers_of(model)
        if count != layers:
            raise ValueError(f"model: expected the {layers} layers that were traced, got {count}")
    sets = {}
    for names in (_PHASES,) if phase == "both" else tuple((name,) for name in _PHASES if phase in (name, "each")):
        chosen = _choose(traces, names, criterion, halves)
        sets.update(dict.fromkeys(names, chosen))
    nothing = (frozenset[int](), frozenset[int]())
    return plan_of_sets(
        layers,
        sets.get("prompt", nothing),
        sets.get("response", nothing),
        action=off,
        fingerprint=fingerprint,
        source=_source(criterion, halves, phase, off),
    )


def _check_traces(trace: Trace | Sequence[Trace]) -> list[Trace]:
    traces: list[Trace] = list(trace) if isinstance(trace, (list, tuple)) else [trace]  # type: ignore[list-item]
    for given in traces:
        if not isinstance(given, Trace):
            raise TypeError(f"trace: expected a void_ext.Trace or a list of them, got {type(given).__name__}")
    if not traces:
        raise ValueError("trace: expected at least one trace, got an empty list")
    for given in traces[1:]:
        ours, theirs = ((one.model_type, one.num_layers) for one in (traces[0], given))
        if ours != theirs:
            raise ValueError(
                f"trace: expected traces of one model, got {ours[0]!r} with {ours[1]} layers and "
                f"{theirs[0]!r} with {theirs[1]}"
            )
    return traces


def _check_action(action: str | None, phase: str) -> Action:
    if action is None:
        action = "project" if phase == "prompt" else "skip"
    _options.check_choice("action", action, ("skip", "project"))
    if action == "skip" and phase == "prompt":
        raise ValueError(
            "action: expected 'project' with phase='prompt', got 'skip': the response runs these layers and needs "
            "their keys and values"
        )
    return Action.SKIP if action == "skip" else Action.PROJECT


def _choose(
    traces: list[Trace], names: tuple[str, ...], criterion: Criterion, halves: bool
) -> tuple[frozenset[int], frozenset[int]]:
    """The layers to go without their attention, and without their MLP, by the tokens of these phases."""
    found: Evidence | None = None
    tokens = 0
    for trace in traces:
        for name in names:
            phase = getattr(trace, name)
            tokens += int(phase.mask.sum())
            evidence = _evidence(phase, criterion, halves).pooled()
            found = evidence if found is None else found + evidence
    if found is None or not tokens:
        raise ValueError(f"trace: expected at least one real token in the {' or the '.join(names)}, got none")
    layers = traces[0].num_layers
    parts = 2 if halves else 1
    most, least = criterion.limits(layers, parts)
    units = [parts * layer + part for layer in criterion.protected(layers) for part in range(parts)]
    off = choose(found, criterion.signal == "delta", most, least, units)[0].tolist()
    return tuple(frozenset(layer for layer in range(layers) if off[parts * layer + part]) for part in (0, parts - 1))  # type: ignore[return-value]


def _evidence(phase: PhaseTrace, criterion: Criterion, halves: bool) -> Evidence:
    norms, executed, updates = phase.norms, phase.executed, phase.updates
    if criterion.needs_updates and (halves or updates is None):
        raise ValueError(
            f"signal: {criterion.signal!r} needs the norms of updates, "
            + ("which are not traced for halves" if halves else "which this trace lacks; use patch(…, updates=True)")
        )
    if halves:
        norms, executed = _half_tables(phase)
    voids = None
    if criterion.signal == "delta":
        voids = ~_active(phase, norms, executed, criterion.alpha, halves)
    # Evidence of several traces is added up, and models may be spread over devices.
    tables = (norms, phase.mask[..., None] & executed, voids, updates)
    return gather(criterion.signal, *(table if table is None else table.cpu() for table in tables))  # type: ignore[arg-type]


def _half_tables(phase: PhaseTrace) -> tuple[Tensor, Tensor]:
    """Norms ``[B, T, 2L + 1]`` around each half, and which halves ran."""
    if phase.halves is None:
        raise ValueError("halves: expected a trace with the norms between halves; use patch(…, halves=True)")
    if phase.info.granularity != "token" or phase.info.reference_quirks:
        raise ValueError("halves: expected a trace with granularity 'token' and without reference_quirks")
    pairs = torch.stack((phase.halves, phase.norms[..., 1:]), dim=-1).flatten(-2)
    return torch.cat((phase.norms[..., :1], pairs), dim=-1), phase.executed.repeat_interleave(2, dim=-1)


def _active(phase: PhaseTrace, norms: Tensor, executed: Tensor, alpha: float, halves: bool) -> Tensor:
    if not halves:
        return phase.active(alpha)
    return ops.void_mask(norms.flatten(0, 1), alpha, executed.flatten(0, 1)).view(executed.shape)


def _source(criterion: Criterion, halves: bool, phase: str, action: Action) -> str:
    said: dict[str, Any] = {"signal": criterion.signal}
    if criterion.signal == "delta":
        said["alpha"] = criterion.alpha
    said |= {name: value for name in ("budget", "at_least") if (value := getattr(criterion, name)) is not None}
    if criterion.protect:
        said["protect"] = list(criterion.protect)
    if not criterion.protect_default:
        said["protect_default"] = False
    if halves:
        said["halves"] = True
    said |= {"phase": phase, "action": action.name.lower()}
    return f"from_trace({', '.join(f'{name}={value!r}' for name, value in said.items())})"
