"""``void-ext plan``: what is refused and when, what is left behind, and how it goes on."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import void_ext
from void_ext import cli, models, search

OPTIONS = ("--budget", "1,2", "--sequences", "3", "--length", "16", "--seeds", "1", "--shortlist", "2")


class Letters:
    """A tokenizer: a token a byte, all below the tiny model's 96."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, Any]:
        return {"input_ids": [3 + byte % 90 for byte in text.encode()]}


@pytest.fixture
def small(tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A tiny model takes the place of SmolLM2; the current directory is empty but for a text."""
    model = tiny("llama")
    monkeypatch.setattr(models, "load", lambda *_, **__: (model, Letters()))
    monkeypatch.chdir(tmp_path)
    Path("prose.txt").write_text("It was a bright cold day in April, and the clocks were striking thirteen. " * 20)
    return model


@pytest.fixture
def never_loads(never_loads: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As elsewhere; and in an empty directory."""
    monkeypatch.chdir(tmp_path)


def plan(*options: str) -> int:
    return cli.main(["plan", "smollm2", *OPTIONS, "--text", "prose.txt", *options])


def test_a_plan_for_each_budget_figures_and_a_picture(small: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan() == 0
    output = capsys.readouterr().out
    folder = Path("plan-smollm2")
    assert sorted(path.name for path in folder.iterdir()) == [
        "frontier.json",
        "frontier.png",
        "plan-1.json",
        "plan-2.json",
        "search.json",
    ]
    saved = [void_ext.VoidPlan.load(folder / f"plan-{budget}.json") for budget in (1, 2)]
    for budget, one in zip((1, 2), saved, strict=True):
        assert one.prompt.skipped == one.response.skipped == budget
        with void_ext.patch(small, mode="skip", plan=one):
            pass
    figures = json.loads((folder / "frontier.json").read_text())
    for budget in (1, 2):
        points = [point for point in figures["points"] if point["budget"] == budget]
        best = next(point for point in points if point["saved"])
        allowed = [point for point in points if not point["skips_protected"]]
        assert best["calibration"]["kl"] == min(point["calibration"]["kl"] for point in allowed)
        assert f"{budget} layers: {best['method']}" in output
    assert figures["configuration"]["texts"]["calibration"]["name"] == "prose.txt"
    told = figures["costs_at_most"]
    assert sum(figures["layer_evaluations"].values()) <= told["total"]
    assert f"at most {told['total']:.6g} layer evaluations" in output
    assert (folder / "frontier.png").stat().st_size > 10_000

    # The same command once more measures nothing again; halves go on from what is there.
    assert plan() == 0
    output = capsys.readouterr().out
    assert "going on from what an earlier run measured" in output
    assert [void_ext.VoidPlan.load(folder / f"plan-{budget}.json") for budget in (1, 2)] == saved
    assert plan("--units", "both", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert "greedy, halves" in {point["method"] for point in document["points"]}
    assert "trace" not in document["layer_evaluations"]
    assert document["layer_evaluations"]["greedy, layers"] == 0

    # Another search is not mixed with it; --force begins anew.
    assert plan("--alpha", "0.2") == 1
    assert "alpha is 0.8 there and 0.2 now" in capsys.readouterr().err
    state = (folder / "search.json").read_bytes()
    assert plan("--alpha", "0.2", "--force", "--sequences", "300") == 1
    assert (folder / "search.json").read_bytes() == state
    assert plan("--alpha", "0.2", "--force") == 0
    assert "voids at 0.2" in capsys.readouterr().out


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("damage", [False, True])
def test_a_search_begun_anew_leaves_nothing_of_the_one_before(damage: bool) -> None:
    folder = Path("plan-smollm2")
    assert plan() == 0
    assert plan("--budget", "3") == 0  # gone on with: these plans are of the same search
    assert {path.name for path in folder.glob("plan-*")} == {"plan-1.json", "plan-2.json", "plan-3.json"}
    for name in ("plan-4.json", "notes.txt"):
        (folder / name).write_text("mine")
    if damage:
        (folder / "search.json").write_text("{")
    assert plan("--budget", "1", "--force") == 0
    mine = {"plan-4.json", "notes.txt"}
    unknown = {"plan-2.json", "plan-3.json"} if damage else set()  # nothing says any more whose they are
    names = {"frontier.json", "frontier.png", "plan-1.json", "search.json"}
    assert {path.name for path in folder.iterdir()} == names | mine | unknown
    assert all((folder / name).read_text() == "mine" for name in mine)


@pytest.mark.usefixtures("never_loads")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "the following arguments are required: --budget"),
        (["--budget", "0,2"], "--budget: expected numbers of layers >= 1"),
        (["--budget", "two"], "--budget: expected layers"),
        (["--budget", "1", "--length", "1"], "--length: expected at least 2"),
        (["--budget", "1", "--sequences", "0"], "--sequences: expected a whole number >= 1"),
        (["--budget", "1", "--shortlist", "0"], "--shortlist"),
        (["--budget", "1", "--units", "heads"], "--units: invalid choice"),
        (["--budget", "1", "--alpha", "-1"], "--alpha"),
    ],
)
def test_wrong_usage_is_2(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["plan", "smollm2", *options])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("never_loads")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text", "none.txt"], "--text: 'none.txt' cannot be read: No such file"),
        (["--text", "latin.txt"], "--text: expected UTF-8 text, byte 2"),
        (["--held-out", "none.txt"], "--held-out: 'none.txt' cannot be read"),
        (["--out", "there"], "--out: 'there/plan-2.json' exists already; pass force (--force)"),
        (["--out", "nowhere/plans"], "--out: the directory 'nowhere'"),
        (["--out", "latin.txt"], "--out: expected a directory, 'latin.txt' is a file"),
    ],
)
def test_texts_and_places_are_refused_before_the_model_is_loaded(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("latin.txt").write_bytes("Grüße".encode("latin-1"))
    Path("there").mkdir()
    Path("there/plan-2.json").write_text("mine")
    assert cli.main(["plan", "smollm2", *OPTIONS, *options]) == 1
    output = capsys.readouterr()
    assert message in output.err
    assert output.err.count("error:") == 1
    assert not Path("plan-smollm2").exists()
    assert Path("there/plan-2.json").read_text() == "mine"


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sequences", "300"], "calibration text: expected at least 4800 tokens"),
        (["--length", "129"], "--length: expected at most the 128 positions of this model, got 129"),
        (["--held-out", "prose.txt"], "expected another text than the calibration text 'prose.txt'"),
        (["--budget", "4"], "error: budgets: expected at most 3 of 6 layers (3 are protected), got 4"),
        (["--protect", "3,3"], "protect: expected each layer once"),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_nothing(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(*options) == 1
    assert message in capsys.readouterr().err
    assert [path.name for path in Path().iterdir()] == ["prose.txt"]


@pytest.fixture
def interrupted(small: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[signal.Signals], None]]:
    """Makes the search send a signal to its process once it has begun to search."""
    # A shell starts what runs in its background with SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    find = search.find_plans

    def by(number: signal.Signals) -> None:
        def stopped(*arguments: Any, **options: Any) -> Any:
            def press(what: str, done: int, total: int) -> None:
                if what.startswith("searching"):
                    signal.raise_signal(number)

            return find(*arguments, **{**options, "progress": press})

        monkeypatch.setattr(search, "find_plans", stopped)

    yield by
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("options", "command"),
    [([], "the same command goes on"), (["--force"], "the same command without --force goes on")],
)
def test_an_interruption_says_how_to_go_on(
    options: list[str],
    command: str,
    interrupted: Callable[[signal.Signals], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    interrupted(signal.SIGINT)
    assert plan(*options) == 130
    assert f"what was measured is kept in plan-smollm2/search.json; {command} from there" in capsys.readouterr().err
    measured = json.loads(Path("plan-smollm2/search.json").read_text())["measured"]
    assert len(measured) > 4


def test_so_does_the_end_by_sigterm(
    interrupted: Callable[[signal.Signals], None], capsys: pytest.CaptureFixture[str]
) -> None:
    interrupted(signal.SIGTERM)
    handler = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # where nothing takes it, the test fails, not the process
    try:
        with pytest.raises(SystemExit) as caught:
            plan()
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert caught.value.code == 143
    assert "kept in plan-smollm2/search.json; the same command goes on from there" in capsys.readouterr().err
    assert [path.name for path in Path("plan-smollm2").iterdir()] == ["search.json"]


@pytest.mark.usefixtures("small")
def test_a_budget_without_an_exchange_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("--budget", "1,3", "--no-default-protection") == 0
    assert "no exchange" not in capsys.readouterr().err
    assert plan("--budget", "2", "--no-default-protection", "--json") == 0
    output = capsys.readouterr()
    assert "no exchange of layers with 2 off: an earlier run in plan-smollm2 went straight on there" in output.err
    assert json.loads(output.out)["not_exchanged"] == {"layers": [2]}


@pytest.mark.usefixtures("small")
def test_one_sequence_is_searched_and_drawn_without_intervals(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("--sequences", "1", "--budget", "1") == 0
    output = capsys.readouterr().out
    assert "of the cosine ranking's" in output
    assert " … " not in output
    assert Path("plan-smollm2/frontier.png").stat().st_size > 10_000
