"""A plan as text: strips of layers, and what it saves; see :meth:`void_ext.VoidPlan.describe`."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from void_ext._phase_plan import Action, PhasePlan

if TYPE_CHECKING:
    from void_ext._fingerprint import Weights
    from void_ext.plan import VoidPlan

_MARKS = {Action.RUN: ".", Action.PROJECT: "P", Action.SKIP: "S"}
_MARGIN = 20
_LAYERS_A_LINE = 60
_ROWS_SHOWN = 4
_TEXT_SHOWN = 300


def describe(plan: VoidPlan) -> str:
    """Lines of at most 80 columns; ASCII, but for what the plan's source says."""
    of = f" of {_shown(plan.fingerprint.model_type)}" if plan.fingerprint is not None else ""
    rows = f", {plan.rows} rows" if plan.rows is not None else ""
    lines = [f"plan for {plan.layers} layers{of}{rows}"]
    lines += textwrap.wrap(_shown(plan.source), 80, initial_indent="  ", subsequent_indent="  ")
    for start in range(0, plan.layers, _LAYERS_A_LINE):
        lines += ["", *_ruler(start, min(plan.layers, start + _LAYERS_A_LINE))]
        for title, phase in (("prompt", plan.prompt), ("response", plan.response)):
            lines += _strips(title, phase, start)
    lines += ["", ". runs   P keys and values for the cache alone (PROJECT)   S nothing (SKIP)", ""]
    lines += [_saving("prompt", plan), _saving("response", plan)]
    if plan.fingerprint is not None:
        lines += ["2 FLOPs a weight; left out are attention scores, and the head in the prompt."]
    return "\n".join(lines)


def _shown(text: str) -> str:
    """Text out of a file, fit for a terminal: no control characters, and not pages of it."""
    text = "".join(mark if mark.isprintable() else "?" for mark in text)
    return text if len(text) <= _TEXT_SHOWN else text[: _TEXT_SHOWN - 3] + "..."


def saved_flops(phase: PhasePlan, weights: Weights, head: bool) -> float:
    """Share of a token's FLOPs that the plan saves, 2 for each weight; the mean over rows.

    ``head``: the output head counts into the whole (it runs for every token of the response, for one of the prompt).
    """
    table = phase.table()
    saved = sum(_saved(attention, mlp, weights) for attention, mlp in table) / len(table)
    return saved / _total(weights, head)


def saved_reads(phase: PhasePlan, weights: Weights) -> float:
    """Share of the weights, head included, that a step does not read: those that no row of the batch needs."""
    table = phase.table()
    attention = tuple(Action(max(row[0][layer] for row in table)) for layer in range(phase.layers))
    mlp = tuple(Action(max(row[1][layer] for row in table)) for layer in range(phase.layers))
    return _saved(attention, mlp, weights) / _total(weights, True)


def _saved(attention: tuple[Action, ...], mlp: tuple[Action, ...], weights: Weights) -> int:
    total = 0
    for layer, (first, then) in enumerate(zip(attention, mlp, strict=True)):
        if first != Action.RUN:
            total += weights.attention[layer] - (weights.project[layer] if first == Action.PROJECT else 0)
        if then != Action.RUN:
            total += weights.mlp[layer]
    return total


def _total(weights: Weights, head: bool) -> int:
    return max(1, sum(weights.attention) + sum(weights.mlp) + (weights.other if head else 0))


def _ruler(start: int, end: int) -> list[str]:
    tens = "".join(str(layer).ljust(10) for layer in range(start, end) if layer % 10 == 0)
    units = "".join(str(layer % 10) for layer in range(start, end))
    return [" " * _MARGIN + tens.rstrip(), "layer".ljust(_MARGIN) + units]


def _strips(title: str, phase: PhasePlan, start: int) -> list[str]:
    lines = []
    table = phase.table()
    for index, row in enumerate(table[:_ROWS_SHOWN]):
        label = title if phase.rows is None else f"{title} {index}"
        for half, actions in zip(("attn", "mlp"), row, strict=True):
            marks = "".join(_MARKS[action] for action in actions[start : start + _LAYERS_A_LINE])
            lines.append(label[: _MARGIN - 6].ljust(_MARGIN - 6) + half.ljust(6) + marks)
            label = ""
    if len(table) > _ROWS_SHOWN:
        lines.append(f"{title}: and {len(table) - _ROWS_SHOWN} more rows")
    return lines


def _saving(name: str, plan: VoidPlan) -> str:
    phase = plan.phase(name)
    mean = " on average" if phase.rows is not None else ""
    text = f"{name}: {phase.skipped:.4g} of {plan.layers} layers off{mean}"
    if plan.fingerprint is None:
        return text
    weights = plan.fingerprint.weights
    if name == "prompt":
        return f"{text}; saves {saved_flops(phase, weights, False):.1%} of the FLOPs of a token"
    return (
        f"{text}; saves {saved_reads(phase, weights):.1%} of the weights read per step\n"
        f"  (head included) and {saved_flops(phase, weights, True):.1%} of the FLOPs of a token"
    )
