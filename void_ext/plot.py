"""One picture of a trace: tokens × layers of both phases, and the usage of each layer above them.

Text runs downwards as one reads it, layers to the right. Active cells carry the norm's growth as colour, voids are grey
(darker where the norm shrank). Everything is placed in inches, so a cell and a label have the same size in every
picture; the figure grows with the tokens, and labels thin out only where it may grow no further.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from void_ext import _options
from void_ext._files import check_output, replacing
from void_ext._token_text import Font, token_texts

if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, Normalize
    from matplotlib.figure import Figure
    from transformers import PreTrainedTokenizerBase

    from void_ext.trace import PhaseTrace, Trace

FORMATS = (".png", ".svg", ".pdf")

# Inches. Agg draws at most 2^16 pixels a side; well below it a viewer gives up first.
_ROW, _ROW_LEAST, _HEIGHT_MOST = 0.165, 0.012, 44.0
_COLUMN_MOST, _COLUMN_LEAST, _HEATMAP_WIDTH = 0.20, 0.085, 4.2
_USAGE_HEIGHT, _GAP, _MARGIN, _FOOT, _HEAD = 1.0, 0.25, 0.25, 0.55, 1.45
_CHARACTER, _LABEL_LEAST, _WIDTH_LEAST = 0.068, 0.75, 2.3
_DPI = 130
_FONT_SIZE = 8.0

# Colour-blind safe: Okabe-Ito for the phases; viridis, whose lightness is monotone, against neutral greys.
_PHASE_COLOURS = {"prompt": "#0072B2", "response": "#D55E00"}
_VOID_GREW, _VOID_SHRANK, _NOT_RUN, _NOT_REAL = "#ECECEC", "#CFCFCF", "#F3E9C6", "#FFFFFF"
_NOT_FINITE = "#CC79A7"


def check_plot_path(path: str | os.PathLike[str], *, what: str = "path", force: bool = False) -> Path:
    """Raise what :func:`plot_trace` would raise for ``path``, before there is a trace to draw."""
    suffix = _options.check_path(what, path).suffix.lower()
    if suffix not in FORMATS:
        raise ValueError(f"{what}: expected a name that ends in {', '.join(FORMATS)}, got {os.fspath(path)!r}")
    return check_output(path, what=what, force=force)


def plot_trace(
    trace: Trace,
    path: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    alpha: float | None = None,
    row: int = 0,
    force: bool = False,
) -> Path:
    """Draw one row of a trace into ``path``.

    Args:
        trace: what a patched model recorded.
        path: ``.png``, ``.svg`` or ``.pdf``.
        tokenizer: turns token ids into text; without it the labels are the ids.
        alpha: the threshold's factor, finite and >= 0; None takes the trace's own.
        row: which batch row.
        force: replace an existing file.

    Returns the path. Raises TypeError (path, tokenizer, alpha, row), ValueError (extension, alpha, row, a trace without
    a token), FileExistsError and the other OSErrors of a place that cannot be written, all before anything is drawn.

    The file appears complete or not at all. pyplot is neither used nor imported, its figures and settings stay as they
    are. Cost: reads the trace back from its device; about a second for 200 tokens.
    """
    target = check_plot_path(path, force=force)
    alpha = trace.alpha if alpha is None else _options.check_alpha(alpha)
    if tokenizer is not None and not callable(getattr(tokenizer, "convert_ids_to_tokens", None)):
        raise TypeError(
            "tokenizer: expected a tokenizer of transformers (AutoTokenizer.from_pretrained makes one of a name) or "
            f"None, got {type(tokenizer).__name__} {tokenizer!r}"
        )
    phases = [phase for phase in (trace.prompt, trace.response) if phase.mask.shape[1]]
    if not phases:
        raise ValueError("trace: expected at least one token in the prompt or the response, got none")
    rows = phases[0].mask.shape[0]
    if not 0 <= _options.check_whole("row", row) < rows:
        raise ValueError(f"row: expected one of the batch's rows 0 … {rows - 1}, got {row}")

    import matplotlib

    # The colours are meant for a white page: the user's style would undo that. Settings are put back on leaving.
    with matplotlib.rc_context(), replacing(target, force=force) as temporary:
        matplotlib.rcdefaults()
        matplotlib.rcParams["svg.fonttype"] = "none"
        figure = _draw(trace, [_Panel(phase, alpha, row, tokenizer) for phase in phases], alpha, row, rows)
        figure.savefig(temporary, format=target.suffix[1:].lower(), dpi=_DPI)
    return target


class _Panel:
    """One phase of one row, on the host."""

    def __init__(self, phase: PhaseTrace, alpha: float, row: int, tokenizer: PreTrainedTokenizerBase | None):
        def read(table: torch.Tensor) -> np.ndarray[Any, Any]:
            return table[row].detach().cpu().numpy()

        self.name = phase.name
        self.real = read(phase.mask)
        self.executed = read(phase.executed)
        self.active = read(phase.active(alpha))
        self.deltas = read(phase.deltas())
        self.ids = read(phase.tokens).tolist()
        self.positions = phase.positions
        self.usage = read(phase.usage(alpha, per="row"))
        self.tokenizer = tokenizer
        self.tokens, self.layers = self.deltas.shape
        self.labels: dict[int, str] = {}

    @property
    def void_share(self) -> float:
        """Of the real tokens' layers, those that ran and were not active: a layer that was skipped showed nothing."""
        return float((self.executed & ~self.active)[self.real].mean()) if self.real.any() else math.nan

    def label(self, cell: float, font: Font) -> None:
        """Choose the tokens that have room for a label where rows are ``cell`` inches high."""
        shown = range(0, self.tokens, max(1, math.ceil(0.115 / cell)))
        ids = [self.ids[index] for index in shown]
        texts = token_texts(ids, self.tokenizer, font)
        if all(token < 0 for token in ids):  # embeddings were given, or the file was saved without its tokens
            texts = [f"position {self.positions[index]}" for index in shown]
        self.labels = dict(zip(shown, texts, strict=True))

    def drawn(self) -> np.ndarray[Any, Any]:
        """Where the colour means the norm's growth."""
        where: np.ndarray[Any, Any] = self.active & self.executed & self.real[:, None] & np.isfinite(self.deltas)
        return where


def _draw(trace: Trace, panels: list[_Panel], alpha: float, row: int, rows: int) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layers = trace.num_layers
    column = min(_COLUMN_MOST, max(_COLUMN_LEAST, _HEATMAP_WIDTH / layers))
    width = max(column * layers, _WIDTH_LEAST)
    longest = max(panel.tokens for panel in panels)
    cell = min(_ROW, max(_ROW_LEAST, _HEIGHT_MOST / longest))
    font = Font()
    for panel in panels:
        panel.label(cell, font)
    label_widths = [max(_LABEL_LEAST, 0.12 + _CHARACTER * max(map(len, panel.labels.values()))) for panel in panels]
    inches_wide = max(2 * _MARGIN + sum(label_widths) + len(panels) * width + (len(panels) - 1) * _GAP, 5.6)
    top = _HEAD + _USAGE_HEIGHT + 0.2
    inches_high = top + cell * longest + _FOOT

    figure = Figure(figsize=(inches_wide, inches_high), facecolor="white")
    FigureCanvasAgg(figure)

    def axes(left: float, down: float, wide: float, high: float) -> Axes:
        return figure.add_axes(
            (left / inches_wide, 1 - (down + high) / inches_high, wide / inches_wide, high / inches_high)
        )

    colours, norm = _colours(panels)
    left = _MARGIN
    for panel, label_width in zip(panels, label_widths, strict=True):
        left += label_width
        _draw_usage(axes(left, _HEAD, width, _USAGE_HEIGHT), panel)
        _draw_heatmap(axes(left, top, width, cell * panel.tokens), panel, colours, norm, cell, font)
        left += width + _GAP
    _draw_title(figure, trace, panels, alpha, row, rows, font, inches_wide, inches_high)
    bar = axes(_MARGIN + 0.1, 0.83, 1.7, 0.11)
    _draw_legend(figure, bar, panels, colours, norm, inches_wide, inches_high)
    return figure


def _colours(panels: list[_Panel]) -> tuple[Colormap, Normalize]:
    """Growth is read on a log scale: it spans 1 to 10^4 (the first token), most of it within a factor of 50."""
    import matplotlib
    from matplotlib.colors import ListedColormap, LogNorm

    # Without viridis' yellow end, which would be as light as the greys.
    colours = ListedColormap(matplotlib.colormaps["viridis_r"](np.linspace(0.12, 1.0, 256)))
    growth = np.concatenate([panel.deltas[panel.drawn()] for panel in panels])
    growth = growth[growth > 0]
    low, high = np.quantile(growth, [0.02, 0.98]) if growth.size else (1.0, 10.0)
    return colours, LogNorm(float(low), float(max(high, 1.5 * low)), clip=True)


def _draw_usage(axes: Axes, panel: _Panel) -> None:
    layers = np.arange(panel.layers)
    axes.bar(layers, 100 * panel.usage, width=0.84, color=_PHASE_COLOURS[panel.name], linewidth=0)
    axes.set_xlim(-0.5, panel.layers - 0.5)
    axes.set_ylim(0, 100)
    axes.set_yticks([0, 50, 100], ["0", "50", "100 %"], fontsize=_FONT_SIZE - 1)
    axes.tick_params(axis="x", labelbottom=False, length=2)
    axes.set_xticks(_layer_ticks(panel.layers))
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    count = int(panel.real.sum())
    share = "no real token" if not count else f"{panel.void_share:.0%} void"
    title = f"{panel.name}: {count} token{'s' * (count != 1)}, {share}"
    axes.set_title(title, fontsize=_FONT_SIZE + 1, loc="left", color=_PHASE_COLOURS[panel.name], fontweight="bold")
    axes.set_ylabel("tokens for which\nit was active", fontsize=_FONT_SIZE - 1)


def _draw_heatmap(axes: Axes, panel: _Panel, colours: Colormap, norm: Normalize, cell: float, font: Font) -> None:
    from matplotlib.colors import to_rgba

    image = np.empty((panel.tokens, panel.layers, 4))
    image[:] = to_rgba(_VOID_GREW)
    image[panel.deltas < 0] = to_rgba(_VOID_SHRANK)
    drawn = panel.drawn()
    image[drawn] = colours(norm(panel.deltas[drawn]))
    image[panel.active & ~np.isfinite(panel.deltas)] = to_rgba(_NOT_FINITE)  # active by the rule, and no growth to show
    image[~panel.executed] = to_rgba(_NOT_RUN)
    image[~panel.real] = to_rgba(_NOT_REAL)
    extent = (-0.5, panel.layers - 0.5, panel.tokens - 0.5, -0.5)
    axes.imshow(image, aspect="auto", interpolation="nearest", extent=extent)

    if cell > 0.08:  # hairlines between cells, where there is room for them
        axes.set_xticks(np.arange(panel.layers - 1) + 0.5, minor=True)
        axes.set_yticks(np.arange(panel.tokens - 1) + 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=0.5)
        axes.tick_params(which="minor", length=0)
    axes.set_xticks(_layer_ticks(panel.layers))
    axes.tick_params(labelsize=_FONT_SIZE - 1, length=2)
    axes.set_xlabel("layer", fontsize=_FONT_SIZE)
    axes.set_yticks(list(panel.labels), list(panel.labels.values()), fontsize=_FONT_SIZE)
    for label, index in zip(axes.get_yticklabels(), panel.labels, strict=True):
        label.set(parse_math=False, fontproperties=font.properties(_FONT_SIZE))  # `$` is a token like any other
        if not panel.real[index]:
            label.set_color("#999999")


def _layer_ticks(layers: int) -> list[int]:
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 10**6) if layers / step <= 16)
    return list(range(0, layers, step))


def _draw_title(
    figure: Figure,
    trace: Trace,
    panels: list[_Panel],
    alpha: float,
    row: int,
    rows: int,
    font: Font,
    inches_wide: float,
    inches_high: float,
) -> None:
    real = sum(int(panel.real.sum()) for panel in panels)
    void = sum(panel.void_share * int(panel.real.sum()) for panel in panels if panel.real.any())
    share = f"{void / real:.0%} of {real} tokens × {trace.num_layers} layers are voids" if real else "no real token"
    name = trace.model_name or trace.model_type or "model"
    name = font.shown(Path(name).name if os.path.isabs(name) else name)  # a picture is shown around; paths are not
    extra = f"   granularity {trace.granularity}" if trace.granularity != "token" else ""
    extra += f"   row {row} of {rows}" if rows > 1 else ""
    top = 1 - 0.27 / inches_high
    left = _MARGIN / inches_wide
    figure.text(
        left, top, name, parse_math=False, fontproperties=font.properties(_FONT_SIZE + 4, weight="bold"), va="center"
    )
    below = 1 - 0.47 / inches_high
    figure.text(left, below, f"α = {alpha:g}   {share}{extra}", fontsize=_FONT_SIZE + 1, va="center", parse_math=False)


def _draw_legend(
    figure: Figure,
    bar_axes: Axes,
    panels: list[_Panel],
    colours: Colormap,
    norm: Normalize,
    inches_wide: float,
    inches_high: float,
) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.patches import Patch
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    bar = figure.colorbar(ScalarMappable(norm, colours), cax=bar_axes, orientation="horizontal", extend="both")
    bar.ax.tick_params(labelsize=_FONT_SIZE - 1, length=2, which="both")
    bar.ax.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    bar.ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    bar.ax.xaxis.set_minor_formatter(NullFormatter())
    bar.ax.set_title("active: growth of ‖h‖ (log scale)", fontsize=_FONT_SIZE - 1, loc="left", pad=3)
    kinds = [Patch(color=_VOID_GREW, label="void, ‖h‖ grew"), Patch(color=_VOID_SHRANK, label="void, ‖h‖ shrank")]
    if any((panel.active & ~np.isfinite(panel.deltas)).any() for panel in panels):
        kinds.append(Patch(color=_NOT_FINITE, label="active, ‖h‖ not finite"))
    if any(not panel.executed.all() for panel in panels):
        kinds.append(Patch(color=_NOT_RUN, label="did not run"))
    figure.legend(
        handles=kinds,
        fontsize=_FONT_SIZE - 1,
        frameon=False,
        ncols=(len(kinds) + 1) // 2,
        loc="center left",
        bbox_to_anchor=((_MARGIN + 2.05) / inches_wide, 1 - 0.88 / inches_high),
        handlelength=1.4,
    )
