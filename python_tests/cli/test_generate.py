"""``void-ext generate``: what is refused before a model is loaded, and real runs on SmolLM2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import void_ext
from void_ext import cli
from void_ext.cli import _generate, _timing

BASE = ("generate", "smollm2", "--prompt", "What is the capital of France?", "--device", "cpu")


@pytest.mark.usefixtures("never_loads")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "expected one of --plan, --skip (or --skip-attention, --skip-mlp), --policy; got none"),
        (["--policy", "prompt", "--skip", "3"], "got --skip and --policy"),
        (["--plan", "a.json", "--skip-mlp", "3"], "got --plan and --skip"),
        (["--policy", "sometimes"], "--policy: invalid choice"),
        (["--skip", "3-"], "--skip: expected layers such as 4,9-12, got '3-'"),
        (["--skip", "a"], "--skip: expected layers"),
        (["--skip", "-1"], "--skip"),
        (["--skip", "12-9"], "--skip: expected the smaller number first, as in 9-12, got '12-9'"),
        (["--skip", "3,9-4"], "--skip: expected the smaller number first, as in 4-9, got '9-4'"),
        (["--skip", "0-999999999"], "--skip: expected numbers of at most 4 digits, got '0-999999999'"),
        (["--policy", "prompt", "--protect", "0-99999"], "--protect: expected numbers of at most 4 digits"),
        (["--skip", "3", "--budget", "2"], "argument --budget: has no meaning with --skip"),
        (["--policy", "prompt", "--every", "4"], "argument --every: has no meaning with --policy prompt"),
        (["--policy", "refresh", "--every", "2"], "--every: expected a whole number >= 3, got '2'"),
        (["--policy", "halt", "--at-least", "2"], "argument --at-least: has no meaning with --policy halt"),
        (["--policy", "prompt", "--phase", "prompt"], "argument --phase: has no meaning with --policy prompt"),
        (["--policy", "prompt", "--alpha", "nan"], "--alpha"),
        (["--skip", "3", "--force"], "argument --force: only means something together with --save-plan"),
    ],
)
def test_wrong_usage_is_2(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([*BASE, *options])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("never_loads")
def test_plans_and_places_are_checked_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = tmp_path / "damaged.json"
    damaged.write_text('{"format": "void_ext.plan", "version": 1')
    assert cli.main([*BASE, "--plan", str(damaged)]) == 1
    assert f"{damaged}" in capsys.readouterr().err
    assert cli.main([*BASE, "--plan", str(tmp_path / "none.json")]) == 1
    assert "none.json" in capsys.readouterr().err
    assert cli.main([*BASE, "--policy", "prompt", "--save-plan", str(damaged)]) == 1
    assert "--save-plan" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--plan", "other.json"], "the plan was made for 12 layers, got 6"),
        (["--policy", "prompt", "--protect", "77"], "protect: expected layer indices below 6, got 77"),
        (["--skip", "77"], "skip: expected layer indices below 6, got 77"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_anything_is_generated(
    options: list[str],
    message: str,
    tiny_directory: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    void_ext.VoidPlan.from_layers(12, skip=[3]).save("other.json")
    assert cli.main(["generate", str(tiny_directory), "--prompt", "Hi", *options]) == 1
    told = capsys.readouterr().err
    assert message in told
    assert "generating" not in told


@pytest.mark.parametrize(
    ("dense", "skipping", "told"),
    [
        ([5, 6], [5, 6], "the two answers are the same"),
        ([5, 6], [4, 6], "the two answers differ from the first token on"),
        ([5, 6], [5, 7], "the first token is the same"),
        ([5, 6, 7], [5, 6], "the first 2 tokens are the same"),
    ],
)
def test_how_far_two_answers_agree(dense: list[int], skipping: list[int], told: str) -> None:
    assert _generate._compared(_generate._same(dense, skipping), dense == skipping) == told


def test_answers_stand_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_timing, "_PAIRS", 3)
    saved = tmp_path / "plan.json"
    argv = [*BASE, "--max-new-tokens", "12", "--skip-attention", "14,25", "--save-plan", str(saved)]
    assert cli.main(argv) == 0
    output = capsys.readouterr().out
    assert output.startswith("all layers: ")
    assert "The capital of France is Paris." in output
    assert "skipping: " in output
    assert "attention halves 28 of 30 run" in output
    assert "MLP halves 30 of 30 run" in output
    assert "3 pairs in turns" in output
    assert "skipping / unpatched" in output
    plan = void_ext.VoidPlan.load(saved)
    assert [layer for layer, action in enumerate(plan.response.attention) if action == void_ext.Action.SKIP] == [14, 25]

    # The file says the same as the list did, and so does JSON.
    assert cli.main([*BASE, "--max-new-tokens", "12", "--plan", str(saved), "--no-timing", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["skipping"]["answer"] in output
    assert document["plan"]["layers"] == 30
    assert document["counters"]["prompt"]["attention_skipped"] == 2
    assert document["timing"] is None


@pytest.mark.parametrize("policy", [["prompt", "--budget", "3"], ["refresh", "--every", "4"], ["halt"]])
def test_policies(policy: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*BASE, "--max-new-tokens", "6", "--policy", *policy, "--no-timing", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["policy"] == policy[0]
    assert document["dense"]["answer"].startswith("The capital of France")
    counted = document["counters"]["response"]
    assert counted["calls"] == document["skipping"]["new_tokens"] - 1
    assert counted["attention_skipped"] == 0  # policies keep keys and values
