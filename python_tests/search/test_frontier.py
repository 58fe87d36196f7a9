"""What is made of the points: which plan is saved, what stands in the table."""

from __future__ import annotations

import dataclasses
import json

import pytest

from void_ext.search.frontier import Frontier, Point
from void_ext.search.measure import Quality
from void_ext.search.units import halves_of


def quality(kl: float, nll: float) -> Quality:
    return Quality((kl, kl), (nll, nll + 1), (0.5, 0.75))


def point(method: str, off: frozenset[int], calibration: float, held_out: float, budget: int = 1) -> Point:
    return Point(method, budget, len(off) / 2, off, quality(calibration, 2.0), quality(held_out, 2.0 + held_out))


@pytest.fixture
def frontier() -> Frontier:
    points = (
        point("cosine", halves_of([1]), 0.3, 0.1),
        point("greedy, layers", halves_of([2]), 0.2, 0.4),
        point("exchanged, layers", halves_of([2]), 0.2, 0.4),
        point("greedy, halves", frozenset({2, 4, 7}), 0.4, 0.3),
        point("cosine", halves_of([1, 2]), 0.9, 0.8, budget=2),
    )
    return Frontier(quality(0.0, 2.0), quality(0.0, 2.0), points)


def test_the_calibration_text_alone_decides(frontier: Frontier) -> None:
    assert frontier.best(1).method == "greedy, layers"
    assert [one.method for one in frontier.at(1)][-1] == "greedy, halves"
    assert frontier.budgets == [1, 2]


def test_against_cosine_is_of_the_same_budget_on_the_held_out_text(frontier: Frontier) -> None:
    found = frontier.against_cosine(frontier.best(1))
    assert found is not None
    assert found == pytest.approx((2.718281828**0.3,) * 3)
    alone = Frontier(frontier.calibration, frontier.held_out, frontier.points[1:2])
    assert alone.against_cosine(alone.points[0]) is None


def test_methods_that_found_one_plan_share_a_line(frontier: Frontier) -> None:
    lines = list(frontier.lines())
    assert len(lines) == 3 + 3 + 1
    assert lines[3].startswith("| 1 | **greedy, layers; exchanged, layers** |")
    assert lines[3].endswith("| 1.350 (1.350 … 1.350) | 2 |")
    assert lines[4].startswith("| 1 | cosine |")
    assert lines[4].endswith("|  | 1 |")
    assert lines[5].startswith("| 1 (1.5) | greedy, halves |")
    assert lines[5].endswith("| 1a, 2a, 3m |")
    assert {line.count("|") for line in lines} == {9}


def test_the_document_is_json_and_marks_one_plan_a_budget(frontier: Frontier) -> None:
    document = json.loads(json.dumps(frontier.to_dict(), allow_nan=False))
    assert [(one["budget"], one["method"]) for one in document["points"] if one["saved"]] == [
        (1, "greedy, layers"),
        (2, "cosine"),
    ]
    assert document["points"][0]["sequences"]["held_out"]["kl"] == [0.4, 0.4]


def test_a_plan_without_protected_layers_is_shown_and_not_chosen(frontier: Frontier) -> None:
    better = dataclasses.replace(point("last layers", halves_of([5]), 0.1, 0.1), skips_protected=True)
    found = Frontier(frontier.calibration, frontier.held_out, (better, *frontier.points))
    assert found.at(1)[0] is better
    assert found.best(1) == frontier.best(1)
    lines = list(found.lines())
    assert lines[3].startswith("| 1 | last layers (protected layers off: never saved) |")
    assert lines[4].startswith("| 1 | **greedy, layers; exchanged, layers** |")
    first, second = found.to_dict()["points"][:2]
    assert (first["method"], first["saved"], first["skips_protected"]) == ("last layers", False, True)
    assert (second["method"], second["saved"], second["skips_protected"]) == ("greedy, layers", True, False)


def test_one_sequence_stands_without_intervals(frontier: Frontier) -> None:
    points = tuple(
        dataclasses.replace(one, calibration=one.calibration.part([0]), held_out=one.held_out.part([0]))
        for one in frontier.points
    )
    alone = Frontier(frontier.calibration.part([0]), frontier.held_out.part([0]), points)
    lines = list(alone.lines())
    assert lines[3].endswith("| 50.0 % | 1.350 | 2 |")
    assert not any("…" in line for line in lines)
    document = json.loads(json.dumps(alone.to_dict(), allow_nan=False))
    assert document["points"][0]["held_out"]["perplexity_interval"] is None
    assert document["points"][0]["held_out_perplexity_over_cosine"][1:] == [None, None]
