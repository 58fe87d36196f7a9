"""Pictures of traces: what is drawn where, the labels, the file, and that the user's matplotlib is left alone."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from void_ext import plot
from void_ext._token_text import Font, token_texts
from void_ext.store import TraceInfo, TraceStore
from void_ext.trace import Trace

matplotlib = pytest.importorskip("matplotlib")


def make_trace(prompt: int, response: int, layers: int = 6, batch: int = 1, name: str = "acme/tiny") -> Trace:
    """Every other layer of every token is a void; token t of the prompt has id t."""
    store = TraceStore(batch, layers, torch.device("cpu"))
    deltas = torch.tensor([5.0 * (layer + 1) if layer % 2 == 0 else -1.0 for layer in range(layers)])
    norms = torch.cat([torch.tensor([50.0]), 50 + deltas.cumsum(0)]).expand(batch, prompt + response, layers + 1)
    tokens = torch.arange(prompt + response).expand(batch, -1)
    if prompt + response:
        phases = [0] * prompt + [1] * response
        store.write(0, prompt + response, phases, 0, {"norms": norms}, tokens, None)
    return Trace(store, TraceInfo(model_name=name, model_type="llama"))


class Words:
    """A tokenizer with one word per id, byte-level as GPT-2's."""

    WORDS = ("The", "Ġcat", "Ċ", "ĉ", "$x_1$", "$", "Ã", "æĹ", "中", "<|end|>")

    def decode(self, ids: list[int], **options: object) -> str:
        del options
        word = self.WORDS[ids[0] % len(self.WORDS)]
        half = {"Ã": "\ufffd", "æĹ": "\ufffd", "Ġcat": " cat", "Ċ": "\n", "ĉ": "\t"}
        return half.get(word, word)

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [self.WORDS[ids[0] % len(self.WORDS)]]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The figures that are drawn, for a look inside."""
    made: list[object] = []
    draw = plot._draw

    def keep(*arguments: object) -> object:
        made.append(draw(*arguments))  # type: ignore[arg-type]
        return made[-1]

    monkeypatch.setattr(plot, "_draw", keep)
    return made


def heatmaps(figure: object) -> list[np.ndarray]:
    return [axes.images[0].get_array() for axes in figure.axes if axes.images]  # type: ignore[attr-defined]


def texts(figure: object) -> str:
    found = figure.findobj(matplotlib.text.Text)  # type: ignore[attr-defined]
    return "\n".join(text.get_text() for text in found)


def test_active_is_coloured_and_void_is_grey(tmp_path: Path, figures: list[object]) -> None:
    plot.plot_trace(make_trace(3, 2), tmp_path / "a.png")
    for image, tokens in zip(heatmaps(figures[0]), (3, 2), strict=True):
        assert image.shape == (tokens, 6, 4)
        spread = np.ptp(image[..., :3], axis=-1)  # 0 for a grey
        assert (spread[:, 0::2] > 0.1).all()
        assert (spread[:, 1::2] == 0).all()
        # more growth, darker colour: lightness falls along the active layers
        lightness = image[0, 0::2, :3] @ np.array([0.299, 0.587, 0.114])
        assert (np.diff(lightness) < 0).all()


def test_alpha_decides(tmp_path: Path, figures: list[object]) -> None:
    trace = make_trace(4, 0)
    for alpha in (0.0, 2.0):
        plot.plot_trace(trace, tmp_path / f"{alpha}.png", alpha=alpha)
    grey = [int((np.ptp(heatmaps(figure)[0][0, :, :3], axis=-1) == 0).sum()) for figure in figures]
    assert grey == [int((~trace.prompt.active(alpha)[0, 0]).sum()) for alpha in (0.0, 2.0)]
    assert grey[0] < grey[1]
    assert "α = 2 " in texts(figures[1])


def test_usage_title_and_shares(tmp_path: Path, figures: list[object]) -> None:
    plot.plot_trace(make_trace(3, 2), tmp_path / "a.png")
    shown = texts(figures[0])
    assert "acme/tiny" in shown
    assert "50% of 5 tokens × 6 layers are voids" in shown
    assert "prompt: 3 tokens, 50% void" in shown
    bars = [axes for axes in figures[0].axes if len(axes.patches) == 6 and not axes.images]  # type: ignore[attr-defined]
    assert [[bar.get_height() for bar in axes.patches] for axes in bars] == [[100, 0, 100, 0, 100, 0]] * 2


def test_padding_is_blank_and_does_not_count(tmp_path: Path, figures: list[object]) -> None:
    trace = make_trace(4, 0, batch=2)
    trace._store._tables["mask"][1, :2] = False
    plot.plot_trace(trace, tmp_path / "a.png", row=1)
    image = heatmaps(figures[0])[0]
    assert (image[:2] == 1).all()
    assert not (image[2:] == 1).all()
    assert "prompt: 2 tokens" in texts(figures[0])
    assert "row 1 of 2" in texts(figures[0])


def test_not_finite_is_active_and_has_its_own_colour(tmp_path: Path, figures: list[object]) -> None:
    trace = make_trace(2, 0)
    trace._store._tables["norms"][0, 1, 3:] = math.nan
    plot.plot_trace(trace, tmp_path / "a.png")
    image = heatmaps(figures[0])[0]
    assert np.allclose(image[1, 4], matplotlib.colors.to_rgba("#CC79A7"))
    assert "not finite" in texts(figures[0])


@pytest.mark.parametrize(
    ("prompt", "response", "layers"), [(12, 0, 30), (0, 12, 80), (1, 1, 1), (30, 30, 80), (190, 10, 30)]
)
def test_sizes(prompt: int, response: int, layers: int, tmp_path: Path, figures: list[object]) -> None:
    path = tmp_path / "a.png"
    plot.plot_trace(make_trace(prompt, response, layers), path, Words())  # type: ignore[arg-type]
    figure = figures[0]
    assert len(heatmaps(figure)) == (prompt > 0) + (response > 0)
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    page = figure.bbox  # type: ignore[attr-defined]
    for axes in figure.axes:  # type: ignore[attr-defined]
        if not axes.images:
            continue
        boxes = [label.get_window_extent(renderer) for label in axes.get_yticklabels()]
        assert len(boxes) == axes.images[0].get_array().shape[0]  # up to 200 tokens, each has its label
        assert all(box.x0 >= page.x0 for box in boxes)
        middles = [(box.y0 + box.y1) / 2 for box in boxes]
        assert all(upper - lower >= 0.11 * figure.dpi for upper, lower in itertools.pairwise(middles))
    corners = [axes.get_window_extent(renderer) for axes in figure.axes]  # type: ignore[attr-defined]
    assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= page.x1 and box.y1 <= page.y1 for box in corners)


def test_labels_thin_out_where_the_figure_may_grow_no_further(tmp_path: Path, figures: list[object]) -> None:
    plot.plot_trace(make_trace(1200, 3, 4), tmp_path / "a.png")
    axes = next(axes for axes in figures[0].axes if axes.images)  # type: ignore[attr-defined]
    assert 200 < len(axes.get_yticklabels()) <= 400
    assert axes.get_yticklabels()[1].get_text() == str(int(axes.get_yticks()[1]))
    assert figures[0].get_size_inches()[1] < 50  # type: ignore[attr-defined]


def test_token_texts_show_what_cannot_be_seen() -> None:
    shown = token_texts(list(range(10)), Words(), Font())  # type: ignore[arg-type]
    assert shown[:8] == ["The", "·cat", "↵", "⇥", "$x_1$", "$", "⟨C3⟩", "⟨E697⟩"]
    assert shown[8] in ("中", "\\u4e2d")
    assert token_texts([7, -1], None, Font()) == ["7", "?"]


def test_dollar_and_underscore_are_text(tmp_path: Path, figures: list[object]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a glyph that is missing warns
        plot.plot_trace(make_trace(10, 10, name="$\\frac{$_^"), tmp_path / "a.png", Words())  # type: ignore[arg-type]
    labels = [label for axes in figures[0].axes if axes.images for label in axes.get_yticklabels()]  # type: ignore[attr-defined]
    assert "$x_1$" in [label.get_text() for label in labels]
    assert not any(label.get_parse_math() for label in labels)


def test_hidden_tokens_are_labelled_by_position(tmp_path: Path, figures: list[object]) -> None:
    trace = make_trace(3, 0)
    trace._store._tables["tokens"].fill_(-1)
    plot.plot_trace(trace, tmp_path / "a.png", Words())  # type: ignore[arg-type]
    assert "position 2" in texts(figures[0])


@pytest.mark.parametrize(
    ("suffix", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF"), (".PNG", b"\x89PNG")]
)
def test_formats(suffix: str, start: bytes, tmp_path: Path) -> None:
    path = plot.plot_trace(make_trace(2, 2), tmp_path / f"a{suffix}")
    assert path.read_bytes().startswith(start)
    assert [entry.name for entry in tmp_path.iterdir()] == [f"a{suffix}"]
    assert path.stat().st_mode & 0o044  # not private, as temporary files are


def test_refusals_come_before_drawing(tmp_path: Path, figures: list[object]) -> None:
    trace = make_trace(2, 0)
    with pytest.raises(ValueError, match=r"path: expected a name that ends in \.png, \.svg, \.pdf, got .*a\.bmp"):
        plot.plot_trace(trace, tmp_path / "a.bmp")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        plot.plot_trace(trace, tmp_path / "nowhere" / "a.png")
    with pytest.raises(ValueError, match=r"row: expected .* 0 … 0, got 1"):
        plot.plot_trace(trace, tmp_path / "a.png", row=1)
    for row in ("0", True):
        with pytest.raises(TypeError, match=f"row: expected a whole number, got {type(row).__name__} {row!r}"):
            plot.plot_trace(trace, tmp_path / "a.png", row=row)
    with pytest.raises(TypeError, match=r"tokenizer: expected a tokenizer .*from_pretrained.*, got str 'gpt2'"):
        plot.plot_trace(trace, tmp_path / "a.png", tokenizer="gpt2")
    with pytest.raises(TypeError, match=r"path: expected the name of a file .*, got int 5"):
        plot.plot_trace(trace, 5)
    with pytest.raises(ValueError, match="alpha"):
        plot.plot_trace(trace, tmp_path / "a.png", alpha=-1)
    with pytest.raises(ValueError, match="trace: expected at least one token"):
        plot.plot_trace(make_trace(0, 0), tmp_path / "a.png")
    (tmp_path / "b.png").write_text("mine")
    with pytest.raises(FileExistsError, match=r"b\.png"):
        plot.plot_trace(trace, tmp_path / "b.png")
    assert (tmp_path / "b.png").read_text() == "mine"
    assert not figures
    plot.plot_trace(trace, tmp_path / "b.png", force=True)
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_is_left_behind_when_drawing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_text("old")
    monkeypatch.setattr(plot, "_draw", lambda *_: types.SimpleNamespace(savefig=lambda *a, **k: 1 / 0))
    with pytest.raises(ZeroDivisionError):
        plot.plot_trace(make_trace(2, 0), tmp_path / "a.png", force=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.png"]
    assert (tmp_path / "a.png").read_text() == "old"


def test_users_matplotlib_is_left_alone(tmp_path: Path) -> None:
    script = """
import sys, matplotlib
sys.path[:0] = sys.argv[2:]
matplotlib.rcParams["axes.facecolor"] = "black"
def settings():  # to read "backend" would itself import pyplot
    return {name: matplotlib.rcParams[name] for name in matplotlib.rcParams if name != "backend"}
before = settings()
import test_plot
test_plot.plot.plot_trace(test_plot.make_trace(2, 2), sys.argv[1])
assert settings() == before
assert "matplotlib.pyplot" not in sys.modules
"""
    here = Path(__file__).parent
    command = [sys.executable, "-c", script, str(tmp_path / "a.png"), str(here), str(here.parent)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_trace_has_the_method(tmp_path: Path) -> None:
    assert make_trace(2, 1).plot(tmp_path / "a.svg", alpha=0.5) == tmp_path / "a.svg"
    assert "α = 0.5" in (tmp_path / "a.svg").read_text()
