"""One picture of a report: per task, its score against the layers computed, and which layers were active."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from void_ext._files import replacing
from void_ext.evaluate.modes import DENSE, EXIT, SKIP, ModeSpec
from void_ext.plot import check_plot_path
from void_ext.store import PHASES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from void_ext.evaluate.report import Report

# Inches.
_SCORE_WIDTH, _LAYER, _HEAT_LEAST, _ROW, _HEIGHT_LEAST = 3.4, 0.16, 2.6, 0.19, 2.2
_MOST = 12  # panels; a picture of more is no picture
_LARGEST = 1e100  # of scores with a place in it: matplotlib's logarithmic axes fail well before floats end
_DPI = 130
_FONT_SIZE = 8.0
# Okabe-Ito.
_COLOURS = {DENSE: "#000000", EXIT: "#D55E00", SKIP: "#0072B2"}
_MARKERS = {DENSE: "o", EXIT: "^", SKIP: "s"}


def plot_report(report: Report, path: str | os.PathLike[str], *, force: bool = False) -> Path:
    """Draw a report into ``path``: a row a task, or a group of tasks; of more than 12, the first 12.

    An early exit computes all layers: its filled mark stands there, and a hollow one where its active layers are.
    """
    target = check_plot_path(path, force=force)
    import matplotlib
    from matplotlib.figure import Figure

    grouped = {member for name, members in report.names.items() if members != [name] for member in members}
    scored = {row.task for row in report.scores}
    # Of a group without a score of its own, its tasks.
    shown = {
        one: None
        for name, members in report.names.items()
        if name not in grouped
        for one in ([name] if name in scored else members)
    }
    names = list(shown)[:_MOST]
    layers = report.usage[0].layers
    heat = max(_HEAT_LEAST, _LAYER * layers)
    heights = [max(_HEIGHT_LEAST, _ROW * len(_lines(report, name)) + 0.9) for name in names]
    with matplotlib.rc_context(), replacing(target, force=force) as temporary:
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"svg.fonttype": "none", "font.size": _FONT_SIZE})
        figure = Figure(figsize=(_SCORE_WIDTH + heat + 3.4, sum(heights) + 0.3), layout="constrained")
        axes: Any = figure.subplots(
            len(names), 2, squeeze=False, width_ratios=(_SCORE_WIDTH, heat), height_ratios=heights
        )
        image: Any = None
        for (left, right), name, height in zip(axes, names, heights, strict=True):
            _draw_scores(left, report, name, height)
            image = _draw_usage(right, report, name)
        figure.colorbar(image, ax=axes[:, 1].tolist(), label="share of tokens for which it was active", shrink=0.7)
        figure.savefig(temporary, format=target.suffix[1:].lower(), dpi=_DPI)
    return target


def _draw_scores(axes: Axes, report: Report, name: str, height: float) -> None:
    axes.set_title(name, loc="left", fontweight="bold", parse_math=False)
    if not any(row.task == name for row in report.scores):
        axes.set_axis_off()
        axes.text(0.5, 0.5, "no score", ha="center", transform=axes.transAxes)
        return
    metric = report.first_metric(name)
    having = {row.mode for row in report.scores if (row.task, row.metric) == (name, metric)}
    labels: list[tuple[float, float, str, str]] = []
    for mode in report.modes:
        if mode.label not in having:
            continue
        row = report.score(name, mode.label, metric)
        if not abs(row.score.value) <= _LARGEST:
            continue  # nor NaN; the table tells of it
        usage = next(u for u in report.usage if (u.task, u.mode) == (name, mode.label))
        colour, marker = _COLOURS[mode.name], _MARKERS[mode.name]
        value = row.score.value
        error = None
        if row.score.low is not None and row.score.high is not None and row.score.high <= _LARGEST:
            # A percentile interval need not hold the value itself.
            error = [[max(0.0, value - row.score.low)], [max(0.0, row.score.high - value)]]
        axes.errorbar(usage.computed, value, yerr=error, fmt=marker, color=colour, markersize=5, linewidth=1, capsize=2)
        where = usage.computed
        if mode.name == EXIT:
            where = usage.mean_active_of_all()
            axes.plot([where, usage.computed], [value, value], color=colour, linewidth=0.7, linestyle=":")
            axes.plot(where, value, marker, color=colour, markersize=5, fillstyle="none")
        labels.append((where, value, mode.label, colour))
    layers = report.usage[0].layers
    axes.set_xlim(-0.02 * layers, 1.12 * layers)
    axes.set_xlabel("layers computed per token (hollow: active ones)")
    axes.set_ylabel(metric, parse_math=False)
    if "perplexity" in metric and labels:
        axes.set_yscale("log")
    _draw_labels(axes, labels, height)
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _draw_labels(axes: Axes, labels: list[tuple[float, float, str, str]], height: float) -> None:
    """Beside their marks, and higher where another label is in the way."""
    low, high = axes.transData.transform([(0, y) for y in axes.get_ylim()])[:, 1]
    points = 72 * (height - 0.9) / (high - low)
    taken: list[tuple[float, float]] = []
    reach = axes.get_xlim()[1] * 0.4
    for x, y, text, colour in sorted(labels, key=lambda label: label[1]):
        own = (axes.transData.transform((0, y))[1] - low) * points
        place = own + 4
        for other_x, other in sorted(taken, key=lambda one: one[1]):
            if abs(other_x - x) < reach and abs(other - place) < _FONT_SIZE:
                place = other + _FONT_SIZE
        taken.append((x, place))
        axes.annotate(
            text,
            (x, y),
            xytext=(4, place - own),
            textcoords="offset points",
            fontsize=_FONT_SIZE - 1,
            color=colour,
            parse_math=False,
        )


def _draw_usage(axes: Axes, report: Report, name: str) -> Any:
    lines = _lines(report, name)
    usage = {(row.task, row.mode): row for row in report.usage}
    table = np.array([usage[name, mode.label].active[phase] for mode, phase in lines])
    image = axes.imshow(table, aspect="auto", vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
    axes.set_yticks(range(len(lines)), [f"{mode.label}, {phase}" for mode, phase in lines])
    for label in axes.get_yticklabels():
        label.set_parse_math(False)
    layers = table.shape[1]
    step = next(step for step in (1, 2, 5, 10, 20, 50, 10**6) if layers / step <= 16)
    axes.set_xticks(range(0, layers, step))
    axes.set_xlabel("layer")
    return image


def _lines(report: Report, name: str) -> list[tuple[ModeSpec, str]]:
    """The rows of the heatmap: modes, in the phases that have a token."""
    usage = {(row.task, row.mode): row for row in report.usage}
    return [(mode, phase) for mode in report.modes for phase in PHASES if usage[name, mode.label].tokens[phase]]
