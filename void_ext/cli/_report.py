"""Results as text: usage per layer as bars, shares, and the time with what it is worth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from void_ext.cli._console import Terminal
from void_ext.timing import Comparison

if TYPE_CHECKING:
    from void_ext.trace import PhaseTrace, Trace

_STYLES = {"prompt": "cyan", "response": "yellow"}
_EIGHTHS = " ▏▎▍▌▋▊▉"


@dataclass(frozen=True)
class Usage:
    """Share of the tokens of one phase for which each layer was active, on the host."""

    phase: str
    alpha: float
    tokens: int
    layers: list[float]

    @property
    def void_share(self) -> float:
        return 1 - sum(self.layers) / len(self.layers)


def usages(trace: Trace, alphas: list[float]) -> list[Usage]:
    """Usage for each alpha and phase that has a token."""
    result = []
    for alpha in alphas:
        for phase in (trace.prompt, trace.response):
            if tokens := _real_tokens(phase):
                result.append(Usage(phase.name, alpha, tokens, phase.usage(alpha).tolist()))
    return result


def print_usage(found: list[Usage], terminal: Terminal) -> None:
    """A line per layer, a bar per phase and alpha; fits 80 columns for up to four bars."""
    margin, gap, number = 6, 2, 5
    wide = (terminal.width - margin - gap * len(found)) // len(found)
    bar = max(4, min(40, wide - number))
    heads = ((f"{usage.phase} ({usage.tokens})", f"α = {usage.alpha:g}") for usage in found)
    for index, line in enumerate(zip(*heads, strict=True)):
        terminal.out.print(" layer" if index else " " * margin, end="", style="bold", markup=False, highlight=False)
        for usage, head in zip(found, line, strict=True):
            text = " " * gap + head[: bar + number].ljust(bar + number)
            terminal.out.print(text, end="", style=f"bold {_STYLES[usage.phase]}", markup=False, highlight=False)
        terminal.print()
    for layer in range(len(found[0].layers)):
        terminal.out.print(f"{layer:>{margin}}", end="", markup=False, highlight=False)
        for usage in found:
            share = usage.layers[layer]
            text = _bar(share, bar, terminal.blocks)
            terminal.out.print(" " * gap + text, end="", style=_STYLES[usage.phase], markup=False, highlight=False)
            terminal.out.print(f"{share:>{number}.0%}", end="", markup=False, highlight=False)
        terminal.print()


def print_shares(found: list[Usage], terminal: Terminal) -> None:
    for usage in found:
        text = f"voids at α = {usage.alpha:g}, {usage.phase}: "
        layers = len(usage.layers)
        terminal.print(f"{text:<32}{usage.void_share:>4.0%}  ({usage.tokens} tokens × {layers} layers)")


def describe_timing(timing: Comparison, where: str) -> str:
    """One comparison in words; what cannot be resolved is not claimed."""
    level = f"{timing.confidence:.0%}"
    head = (
        f"time of a decode step: {1e3 * timing.b_median:.4g} ms {timing.b_name}, {1e3 * timing.a_median:.4g} ms "
        f"{timing.a_name} ({where})"
    )
    ratio = (
        f"  {timing.b_name} / {timing.a_name} {timing.ratio:.3f} [{timing.low:.3f}, {timing.high:.3f}]; A/A control "
        f"{timing.aa_ratio:.3f} [{timing.aa_low:.3f}, {timing.aa_high:.3f}]; "
        f"{timing.pairs} pairs in turns, {level} intervals"
    )
    if timing.resolves():
        verdict = "  resolved: the control and the interval are both narrower than 0.02"
    elif not timing.control_holds():
        verdict = (
            "  not resolvable here: the control, the same model timed against itself, has to be narrower than 0.02 and "
            "within 0.02 of 1; a quieter machine or more pairs would tell"
        )
    else:
        verdict = "  not resolvable here: the interval is wider than 0.02; a quieter machine or more pairs would tell"
    return "\n".join((head, ratio, verdict))


def _real_tokens(phase: PhaseTrace) -> int:
    return int(phase.mask.sum())


def _bar(share: float, width: int, blocks: bool) -> str:
    if not blocks:
        return ("#" * round(share * width)).ljust(width, ".")
    eighths = round(share * width * 8)
    if share > 0:
        eighths = max(eighths, 1)  # seldom is not never
    full, rest = divmod(eighths, 8)
    return ("█" * full + (_EIGHTHS[rest] if rest else "")).ljust(width)
