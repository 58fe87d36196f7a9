"""One picture of a frontier: perplexity and agreement against budget, calibration text beside held-out text."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from void_ext._files import replacing
from void_ext.plot import check_plot_path
from void_ext.search.frontier import Frontier, Point
from void_ext.search.measure import Quality

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe-Ito, colour-blind safe; what is not searched is thinner, chance is grey.
_COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#0072B2", "#F0E442")
_SEARCHED = {"layers": "#D55E00", "halves": "#000000"}
_CHANCE = "#AAAAAA"
_TEXTS = (("calibration", "calibration text"), ("held_out", "held-out text"))


def plot_frontier(
    frontier: Frontier, path: str | os.PathLike[str], *, title: str = "", note: str = "", force: bool = False
) -> Path:
    """Draw ``frontier`` into ``path`` (.png, .svg or .pdf), whole or not at all.

    Bars are 95 % intervals over sequences, none for a single one; a ring marks the plan saved for a budget. Random
    plans share one style.
    Raises what :func:`void_ext.plot.check_plot_path` raises.
    """
    target = check_plot_path(path, force=force)
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    with matplotlib.rc_context(), replacing(target, force=force) as temporary:
        matplotlib.rcdefaults()
        matplotlib.rcParams["svg.fonttype"] = "none"
        figure = Figure(figsize=(10.5, 7.2), facecolor="white", layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(2, 2, sharex=True, sharey="row")
        for column, (text, words) in enumerate(_TEXTS):
            _draw(axes[0][column], frontier, text, "perplexity")
            _draw(axes[1][column], frontier, text, "agreement")
            axes[0][column].set_title(words, fontsize=10)
            axes[0][column].set_yscale("log")
            axes[0][column].yaxis.set_major_formatter(LogFormatter())
            axes[0][column].yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))
            axes[1][column].set_xlabel("layers' worth of weights left out")
        low, high = _perplexities(frontier)
        axes[0][0].set_ylim(low, high)
        axes[0][0].set_ylabel(f"perplexity (log scale;\nwhat is above {high:.3g} is not shown)")
        axes[1][0].set_ylabel("same likeliest token\nas the dense model")
        figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False)
        figure.suptitle("\n".join(filter(None, (title, note))), fontsize=9, parse_math=False)
        figure.savefig(temporary, format=target.suffix[1:].lower(), dpi=130)
    return target


def _perplexities(frontier: Frontier) -> tuple[float, float]:
    """Where the plans worth having lie: some methods lose the language, and would press all others into one line."""
    best = [frontier.best(budget) for budget in frontier.budgets]
    dense = (frontier.calibration.perplexity, frontier.held_out.perplexity)
    most = max(quality.perplexity for point in best for quality in (point.calibration, point.held_out))
    return 0.75 * min(dense), 3 * max(most, *dense)


def _draw(axes: Axes, frontier: Frontier, text: str, name: str) -> None:
    dense = _value(getattr(frontier, text), name)
    axes.axhline(dense[0], color="black", linewidth=0.8, linestyle=":", label="dense")
    saved = [frontier.best(budget) for budget in frontier.budgets]
    plain = iter(_COLOURS)
    for method in dict.fromkeys(point.method for point in frontier.points):
        points = sorted((point for point in frontier.points if point.method == method), key=lambda point: point.size)
        _line(axes, points, text, name, _style(method, plain))
    axes.plot(
        [point.size for point in saved],
        [_value(getattr(point, text), name)[0] for point in saved],
        linestyle="none",
        marker="o",
        markersize=11,
        fillstyle="none",
        color="#333333",
        label="saved plan",
    )
    axes.grid(color="#E5E5E5", linewidth=0.6)
    axes.set_axisbelow(True)


def _style(method: str, plain: Any) -> dict[str, Any]:
    how, _, kind = method.partition(", ")
    if kind in _SEARCHED:
        # What exchanges made of the greedy plan stands out.
        width, dashes = (2.0, "-") if how == "exchanged" else (1.2, "--")
        return {"color": _SEARCHED[kind], "linewidth": width, "linestyle": dashes, "label": method, "zorder": 3}
    if method.startswith("random"):
        label = "random" if method.endswith(" 0") else None
        return {"color": _CHANCE, "linewidth": 0.9, "label": label, "zorder": 1}
    return {"color": next(plain, _CHANCE), "linewidth": 1.1, "label": method, "zorder": 2}


def _line(axes: Axes, points: list[Point], text: str, name: str, style: dict[str, Any]) -> None:
    found = [_value(getattr(point, text), name) for point in points]
    middle = [value for value, _, _ in found]
    spread = [[value - low for value, low, _ in found], [high - value for value, _, high in found]]
    axes.errorbar([point.size for point in points], middle, yerr=spread, marker=".", capsize=2, **style)


def _value(quality: Quality, name: str) -> tuple[float, float, float]:
    summary = quality.summary()
    low, high = summary[f"{name}_interval"] or (summary[name], summary[name])
    return summary[name], low, high
