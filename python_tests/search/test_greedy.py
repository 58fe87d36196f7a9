"""The greedy search: what it lets go, what it costs, and that it can be gone on with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from void_ext._fingerprint import Fingerprint, Weights
from void_ext.search.greedy import Greedy, Step, most
from void_ext.search.measure import Judge, Quality
from void_ext.search.prefix import Prefixes, PrefixRunner
from void_ext.search.units import Unit, halves_of, named, off_of, plan_of, size_of, units_of

WEIGHTS = Weights(attention=(100,) * 4, project=(10,) * 4, mlp=(300,) * 4, other=1)


class FakeRunner:
    launched = 0
    layers = 6


class FakePrefixes:
    """Runs nothing: a plan's "streams" are its halves."""

    ids = range(6)

    def __init__(self) -> None:
        self.off: frozenset[int] = frozenset()

    def run(self, off: frozenset[int], sequences: Any = None) -> Any:
        return off

    def adopt(self, off: frozenset[int]) -> None:
        self.off = off


class FakeJudge:
    """Says what a formula says, and counts."""

    def __init__(self, formula: Callable[[frozenset[int]], float]):
        self.formula = formula
        self.asked: list[tuple[frozenset[int], int]] = []

    def measure(self, off: frozenset[int], sequences: Any = None) -> Quality:
        count = 6 if sequences is None else len(sequences)
        self.asked.append((off, count))
        return Quality((self.formula(off),) * count, (1.0,) * count, (0.0,) * count)


def search_with(formula: Callable[[frozenset[int]], float], units: Any, **options: Any) -> tuple[Greedy, FakeJudge]:
    judge = FakeJudge(formula)
    return Greedy(units, FakePrefixes(), judge, **options), judge  # type: ignore[arg-type]


def layers_off(off: frozenset[int]) -> set[int]:
    return {half // 2 for half in off}


# ---- units ----


def test_units_and_their_weights() -> None:
    layers = units_of("layers", WEIGHTS, [0])
    assert [unit.name for unit in layers] == ["1", "2", "3"]
    assert layers[0] == Unit("1", frozenset({2, 3}), 1.0)
    halves = units_of("halves", WEIGHTS, [0, 1, 2])
    assert halves == (Unit("3a", frozenset({6}), 0.25), Unit("3m", frozenset({7}), 0.75))
    assert size_of(WEIGHTS, {0, 2, 3}) == pytest.approx(1.25)
    assert named({0, 2, 3, 7}) == "0a, 1, 3m"


def test_a_plan_of_halves_says_them() -> None:
    off = frozenset({0, 2, 3, 7})
    plan = plan_of(off, 4, None, "test")
    assert off_of(plan) == off
    assert plan.prompt == plan.response
    assert plan.source == "test"


# ---- steps ----


def test_the_least_harmful_goes_first() -> None:
    harm = {0: 5.0, 1: 1.0, 2: 3.0, 3: 2.0}
    search, judge = search_with(
        lambda off: sum(harm[layer] for layer in layers_off(off)), units_of("layers", WEIGHTS, [])
    )
    for expected in ({1}, {1, 3}, {1, 2, 3}):
        step = search.step(3)
        assert layers_off(step.off) == expected
        assert search.off == step.off
    assert search.reached(3, search.off)
    assert not search.reached(4, search.off)
    assert search.steps[0].damages == {"0": 5.0, "1": 1.0, "2": 3.0, "3": 2.0}
    assert [step.how for step in search.steps] == ["greedy"] * 3
    assert [count for _, count in judge.asked] == [2] * 4 + [6] * 3 + [2] * 3 + [6] * 3 + [2] * 2 + [6] * 2


def test_later_steps_measure_the_shortlist_alone() -> None:
    harm = {0: 5.0, 1: 1.0, 2: 3.0, 3: 2.0}
    search, judge = search_with(
        lambda off: sum(harm[layer] for layer in layers_off(off)), units_of("layers", WEIGHTS, []), shortlist=2
    )
    search.step(3)
    judge.asked.clear()
    search.step(3)
    assert [layers_off(off) for off, _ in judge.asked] == [{1, 3}, {1, 2}] * 2  # the screen, then all sequences


def test_halves_are_judged_by_weight_and_by_what_is_missing() -> None:
    # An MLP weighs three times an attention. By weight the attention is dearer, until a quarter is all that is missing.
    def harm(off: frozenset[int]) -> float:
        return sum(1.0 if half % 2 == 0 else 1.5 for half in off)

    search, _ = search_with(harm, units_of("halves", WEIGHTS, [1, 2, 3]))
    assert search.step(1).off == frozenset({1})
    assert search.size(search.off) == pytest.approx(0.75)
    assert search.step(1).off == frozenset({0, 1})
    search, _ = search_with(harm, units_of("halves", WEIGHTS, [2, 3]))
    assert search.step(1).off == frozenset({1})
    assert search.step(1).off in (frozenset({0, 1}), frozenset({1, 2}))


def test_an_interrupted_step_goes_on_from_what_it_measured() -> None:
    harm = {0: 5.0, 1: 1.0, 2: 3.0, 3: 2.0}

    def formula(off: frozenset[int]) -> float:
        return sum(harm[layer] for layer in layers_off(off))

    units = units_of("layers", WEIGHTS, [])
    search, judge = search_with(formula, units)

    def stop(done: int, total: int) -> None:
        if len(judge.asked) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search.step(2, stop)
    assert not search.steps
    resumed, again = search_with(formula, units, pending=search.pending)
    assert layers_off(resumed.step(2).off) == {1}
    assert len(again.asked) == 4 + 3 - 5
    assert not resumed.pending


def test_exchange_finds_what_greedy_cannot() -> None:
    # Alone layer 0 is the best, together 1 and 2 are.
    table = {frozenset({0}): 1.0, frozenset({1}): 1.5, frozenset({2}): 1.5, frozenset({3}): 4.0}
    table |= {frozenset({0, 1}): 4.0, frozenset({0, 2}): 4.1, frozenset({0, 3}): 5.0, frozenset({1, 2}): 2.0}
    search, judge = search_with(lambda off: table.get(frozenset(layers_off(off)), 9.0), units_of("layers", WEIGHTS, []))
    search.step(2)
    search.step(2)
    assert layers_off(search.off) == {0, 1}
    judge.asked.clear()
    step = search.exchange()
    assert (step.how, layers_off(step.off), step.quality.divergence) == ("exchange", {1, 2}, 2.0)
    assert [count for _, count in judge.asked] == [2] * 4 + [6]  # on a third; one of them promised more than there was
    assert search.exchange().off == step.off  # nothing better is left
    assert search.prefixes.off == step.off


def test_the_search_goes_on_from_another_plan() -> None:
    harm = {0: 5.0, 1: 1.0, 2: 3.0, 3: 2.0}
    search, _ = search_with(lambda off: sum(harm[layer] for layer in layers_off(off)), units_of("layers", WEIGHTS, []))
    search.step(1)
    search.take(halves_of([2]), Quality((0.5,) * 6, (1.0,) * 6, (0.0,) * 6))
    assert layers_off(search.step(2).off) == {1, 2}


@pytest.mark.parametrize(
    "steps",
    [
        [Step("greedy", frozenset({2, 3}), Quality((0.0,), (0.0,), (0.0,)), {"1": 1.0})],
        [Step("greedy", frozenset({2, 3}), Quality((0.0,), (0.0,), (0.0,)), {"9": 1.0})],
        [Step("greedy", frozenset({20}), Quality((0.0,), (0.0,), (0.0,)), {str(layer): 1.0 for layer in range(4)})],
    ],
)
def test_steps_of_another_search_are_refused(steps: list[Step]) -> None:
    with pytest.raises(ValueError, match="steps: expected"):
        search_with(lambda off: 0.0, units_of("layers", WEIGHTS, []), steps=steps)


# ---- cost ----


def test_nine_of_thirty_layers_take_at_most_a_third_of_whole_passes(tiny: Callable[..., Any], two_texts: Any) -> None:
    """Counted, with whole passes for every unit as the measure; and never more than was told beforehand."""
    import transformers

    config = transformers.LlamaConfig(
        **{"vocab_size": 96, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 30},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.1},
    )
    model = transformers.LlamaForCausalLM(config).eval()
    ids = two_texts[0].ids[:, :8]
    ran: list[int] = []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda *_: ran.append(1))
    for protected in ([0, 1, 29], []):
        free = 30 - len(protected)
        whole = sum((free - step) * (29 - step) for step in range(9))
        units = units_of("layers", Fingerprint.of(model).weights, protected)
        bound = most(units, 30, [9], 8, exchange=False, sequences=3)
        assert bound.whole_passes == whole
        assert bound.greedy <= whole / 3
        with PrefixRunner(model) as runner:
            prefixes = Prefixes(runner, ids)
            judge = Judge(runner, ids, prefixes.finals())
            judge.dense()
            ran.clear()
            search = Greedy(units, prefixes, judge)
            while not search.reached(9, search.off):
                search.step(9)
        assert len(search.steps) == 9
        assert 0 < len(ran) / 3 <= bound.greedy


def test_the_bound_of_halves_and_exchanges() -> None:
    units = units_of("halves", WEIGHTS, [])
    # One attention after the other reaches 1 of 4 layers in four steps; the first measures all 8 halves.
    bound = most(units, 4, [1], shortlist=2, exchange=True, sequences=6)
    first = 7 + 6 + 5 + 4 + 3 + 2 + 1 + 0
    # A third of the sequences for each, all of them for at most three, and the streams behind the first anew.
    later = [(6, 5), (5, 4), (4, 3)]
    assert bound.greedy == pytest.approx(
        (first / 3 + (7 + 6 + 5) + 7 + sum(sum(runs) / 3 + sum(runs) + runs[0] for runs in later)) / 2
    )
    assert bound.whole_passes == (8 * 7 + 7 * 6 + 6 * 5 + 5 * 4) / 2
    # Each of four tried for two others on two of six sequences, three of them on all, two plans gone on from; of four
    # layers three stay at most, two MLPs being the fewest halves that weigh one.
    assert bound.exchange == pytest.approx((4 * 2 / 3 + 3 + 2) * 3.0)
    assert bound.plans == pytest.approx((8 + 2 + 2 + 2) / 3 + 3 + 2 + 2 + 2 + 4 * 2 / 3 + 3)
    # Two budgets: exchanges may have put whole layers in the place of what went, so that halves are there again.
    twice = most(units, 4, [1, 2], shortlist=2, exchange=True, sequences=6)
    later = [(5, 4), (4, 3), (3, 2), (2, 1)]
    assert twice.greedy == pytest.approx(bound.greedy + sum(sum(runs) / 3 + sum(runs) + runs[0] for runs in later) / 2)
