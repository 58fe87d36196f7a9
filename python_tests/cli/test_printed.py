"""The command line: what it prints, and the times in it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import void_ext
from void_ext import cli
from void_ext.cli import _console, _info, _report, _timing
from void_ext.timing import Comparison

ROOT = Path(void_ext.__file__).parents[1]
TRACE = ("trace", "smollm2", "--prompt", "Hi")


# -- info -----------------------------------------------------------------------------------------------------


def test_info_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    import torch

    assert found["void_ext"] == void_ext.__version__
    assert found["packages"]["torch"] == torch.__version__
    assert found["library"]["cpu_isa"] in found["library"]["cpu_isas"]
    assert len(found["devices"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    if not found["devices"]:
        assert any("the CPU kernels are used" in note for note in found["notes"])


@pytest.mark.parametrize(
    ("arches", "capability", "expected"),
    [
        (["80", "90"], (9, 0), "sm_90"),
        (["80", "86", "89"], (8, 9), "sm_89"),
        (["80", "86"], (8, 9), "sm_86"),  # same major number, lower minor number
        (["86"], (8, 0), None),
        (["80", "120+PTX"], (9, 0), None),  # PTX of a later architecture does not help
        (["80+PTX"], (9, 0), "PTX of 80"),
        (["90a"], (9, 0), "sm_90a"),
        (["100a"], (10, 3), None),
        (["100f"], (10, 3), "sm_100f"),
        (["120+PTX"], (12, 1), "sm_120"),
        ([], (8, 0), None),
    ],
)
def test_which_devices_a_build_covers(arches: list[str], capability: tuple[int, int], expected: str | None) -> None:
    assert _info.coverage(arches, *capability) == expected


def test_notes_say_what_falls_back_and_why() -> None:
    device = {"name": "GPU X", "capability": "7.5", "covered_by": None}
    library = {"built": True, "cuda": True}
    packages: dict[str, str | None] = dict.fromkeys(("transformers", "matplotlib", "gguf"), "1")
    notes = _info._notes({"library": library, "torch_cuda": "13.0", "devices": [device], "packages": packages})
    assert len(notes) == 1
    assert "TORCH_CUDA_ARCH_LIST=7.5" in notes[0]
    packages["gguf"] = None
    without = {"built": True, "cuda": False, "cuda_reason": "no nvcc"}
    notes = _info._notes({"library": without, "torch_cuda": None, "devices": [], "packages": packages})
    assert notes == [
        "CUDA ops are not in this build: no nvcc",
        "this torch is a CPU build: the CPU kernels are used",
        "the package gguf is missing, needed by the first use of smollm2: pip install gguf",
    ]


# -- text -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bars", [1, 2, 4])
@pytest.mark.parametrize("layers", [1, 30, 126])
def test_usage_fits_80_columns(
    bars: int, layers: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    share = [layer / max(1, layers - 1) for layer in range(layers)]
    found = [_report.Usage(("prompt", "response")[index % 2], 0.2, 12345, share) for index in range(bars)]
    _report.print_usage(found, _console.Terminal())
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + layers
    assert max(map(len, lines)) <= 80
    assert lines[-1].count("%") == bars
    if layers > 1:
        assert lines[-1].count("100%") == bars
        assert lines[2].count("  0%") == bars
        assert lines[2].count("█") == 0
        assert lines[-1].count("█") >= 4 * bars


@pytest.mark.parametrize("colour", [False, True])
def test_what_is_printed_is_not_read_as_anything(
    colour: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Slices such as ``a[:m:]`` are no emoji, whatever their colons hold."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1") if colour else monkeypatch.delenv("FORCE_COLOR", raising=False)
    terminal = _console.Terminal()
    assert terminal.out.is_terminal == colour
    text = "return a[:m:], t[:100:]  # [bold] :smile:"
    for write in (terminal.print, terminal.document):
        write(text)
        assert capsys.readouterr().out == text + "\n"
    for write in (terminal.note, terminal.error):
        write(text)
        assert text in capsys.readouterr().err


def test_a_pipe_gets_every_character(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    terminal = _console.Terminal()
    text = "if x:\n\treturn 1\t# one \x07 " + "long " * 50
    for write in (terminal.print, terminal.document):
        write(text)
        assert capsys.readouterr().out == text + "\n"
    terminal.hush()
    terminal.document(text)
    terminal.print(text)
    assert capsys.readouterr().out == ""


def test_bars_survive_an_ascii_terminal() -> None:
    assert _report._bar(0.5, 8, blocks=False) == "####...."
    assert _report._bar(0.5, 8, blocks=True) == "████    "
    assert _report._bar(0.001, 8, blocks=True).strip() != ""


@pytest.mark.parametrize(
    ("high", "aa", "expected"),
    [
        (1.011, (0.995, 1.006), "resolved"),
        (1.1, (0.995, 1.006), "interval is wider"),
        # Whatever the interval of b is: what the control has to be is all that is said of it.
        (1.011, (0.995, 1.1), "the control, the same model timed against itself, has to be narrower than 0.02 and"),
        (1.011, (1.03, 1.04), "within 0.02 of 1; a quieter machine or more pairs"),
    ],
)
def test_timing_claims_no_more_than_it_can(high: float, aa: tuple[float, float], expected: str) -> None:
    timing = Comparison(1.004, 0.998, high, 1.0, *aa, 50, 0.95, "plain", "traced", [0.1], [0.2])
    text = _report.describe_timing(timing, "CPU")
    assert expected in text
    assert ("not resolvable here" in text) == (expected != "resolved")
    assert "200 ms traced, 100 ms plain" in text


# -- timing ---------------------------------------------------------------------------------------------------


class Renamed(torch.nn.Module):
    """A model that calls its cache as transformers 5.24 does, and takes no other name."""

    def forward(self, input_ids: torch.Tensor, cache: list[int] | None = None, use_cache: bool = True) -> Any:
        cache = [] if cache is None else cache
        cache += input_ids[0].tolist()
        self.seen = list(cache)
        return argparse.Namespace(cache=cache)


def test_decode_steps_go_on_with_the_cache_whatever_its_name() -> None:
    model: Any = Renamed()
    step = _timing._decoder(model, torch.tensor([[3, 4]]))
    step()
    step()
    assert model.seen == [3, 4, 4, 4]


@pytest.mark.filterwarnings("error::FutureWarning")
def test_timing_uses_nothing_deprecated(tiny: Any) -> None:
    model = tiny("llama")
    with torch.no_grad(), void_ext.patch(model) as handle:
        _timing._decoder(model, torch.tensor([[3, 4]]))()
        assert handle.trace.response.positions == [2]
    _timing._decoder(model, torch.tensor([[3, 4]]))()
