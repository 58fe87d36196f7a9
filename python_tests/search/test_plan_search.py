"""The whole search on tiny models: the best measured plan is saved, costs are kept, interruptions lose nothing."""

from __future__ import annotations

import dataclasses
import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import void_ext
from void_ext import _files
from void_ext._fingerprint import Fingerprint
from void_ext.search import Found, Settings, costs_of, find_plans
from void_ext.search.picture import plot_frontier
from void_ext.search.units import off_of, size_of
from void_ext.testing import assert_bits_equal

SETTINGS = Settings(budgets=(2, 1), kinds=("layers", "halves"), shortlist=3, seeds=2, protect_default=False)


@torch.no_grad()
def divergence(model: Any, ids: torch.Tensor, plan: void_ext.VoidPlan) -> float:
    """The mean KL of the patched model's logits to the unpatched model's, by its definition."""

    def logs() -> torch.Tensor:
        return torch.cat([model(row[None], use_cache=False).logits[:, :-1] for row in ids]).double().log_softmax(-1)

    dense = logs()
    with void_ext.patch(model, mode="skip", plan=plan):
        return float((dense.exp() * (dense - logs())).sum(-1).mean())


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_no_plan_is_better_on_the_calibration_text(family: str, gentle: Callable[..., Any], two_texts: Any) -> None:
    model, ids = gentle(family), two_texts[0].ids
    found = find_plans(model, two_texts, SETTINGS)
    assert sorted(found.plans) == [1, 2]
    with void_ext.patch(model, updates=True) as handle, torch.no_grad():
        traces = []
        for row in ids:
            model(row[None], use_cache=False)
            traces.append(handle.trace)
    for budget, plan in found.plans.items():
        plan.check(model)
        ours = divergence(model, ids, plan)
        assert ours == pytest.approx(found.frontier.best(budget).calibration.divergence, rel=1e-3, abs=1e-6)
        for signal in ("delta", "abs_delta", "relative_update", "cosine"):
            bounds = {"budget": budget, "at_least": budget, "protect_default": False}
            other = void_ext.VoidPlan.from_trace(traces, model, signal=signal, **bounds)
            assert ours <= divergence(model, ids, other) + 1e-6, (budget, signal)
        assert f"budget {budget} layers" in plan.source
        assert two_texts[0].sha256 in plan.source
    methods = {point.method for point in found.frontier.points}
    assert len(methods) == 4 + 1 + 2 + 4
    assert len(found.frontier.points) == 2 * len(methods)
    assert "| 2 |" in "\n".join(found.frontier.lines())


def test_no_plan_returned_goes_without_a_protected_layer(tiny: Callable[..., Any], two_texts: Any) -> None:
    """The last layers are compared with even where they are protected: of this model the best plan measured."""
    found = find_plans(tiny("llama"), two_texts, Settings(budgets=(1, 2), seeds=1, protect=(4, 5)))
    for budget, plan in found.plans.items():
        last = next(point for point in found.frontier.at(budget) if point.method == "last layers")
        assert found.frontier.at(budget)[0] is last
        assert last.skips_protected
        assert off_of(plan) == found.frontier.best(budget).off <= {4, 5, 6, 7}
        assert "last layers" not in plan.source
    free = find_plans(tiny("llama"), two_texts, Settings(budgets=(1,), seeds=1, protect_default=False))
    assert not any(point.skips_protected for point in free.frontier.points)
    assert not any("protected" in line for line in free.frontier.lines())


def test_what_runs_is_what_is_counted_and_at_most_what_was_told(gentle: Callable[..., Any], two_texts: Any) -> None:
    model = gentle("llama")
    ran: list[str] = []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda *_: ran.append("mlp"))
        layer.self_attn.register_forward_hook(lambda *_: ran.append("attention"))
    told = costs_of(model, SETTINGS, 3)
    ran.clear()
    found = find_plans(model, two_texts, SETTINGS)
    done = found.evaluations
    assert sum(done.values()) == pytest.approx(len(ran) / 2 / 3)
    assert done["trace"] == told.trace == 6  # all rankings come from one pass
    assert 0 < done["dense"] <= told.dense
    assert 0 < done["plans"] <= told.plans
    for kind, cost in told.searches.items():
        assert 0 < done[f"greedy, {kind}"] <= cost.greedy
        assert 0 < done[f"exchange, {kind}"] <= cost.exchange
    assert sum(done.values()) <= told.total


def test_without_exchange_the_greedy_steps_follow_one_another(gentle: Callable[..., Any], two_texts: Any) -> None:
    settings = Settings(budgets=(1, 2, 3), exchange=False, shortlist=6, seeds=0, protect_default=False)
    model = gentle("llama")
    # One sequence: the screen is all of the text.
    two_texts = tuple(dataclasses.replace(text, ids=text.ids[:1]) for text in two_texts)
    found = find_plans(model, two_texts, settings)
    offs = [step.off for step in found.steps["layers"]]
    assert [len(off) for off in offs] == [2, 4, 6]
    assert offs[0] < offs[1] < offs[2]
    # Each is the best of all that could go: an exhaustive greedy search, plan by plan.
    off: frozenset[int] = frozenset()
    for expected in offs:
        plans = {
            layer: void_ext.VoidPlan.from_layers(6, skip=sorted({half // 2 for half in off} | {layer}))
            for layer in range(6)
            if 2 * layer not in off
        }
        best = min(plans, key=lambda layer: divergence(model, two_texts[0].ids, plans[layer]))
        off |= {2 * best, 2 * best + 1}
        assert off == expected


class Interrupt:
    """A progress report that presses Ctrl-C at the n-th call."""

    def __init__(self, at: int):
        self.at = at

    def __call__(self, what: str, done: int, total: int) -> None:
        self.at -= 1
        if self.at < 0:
            raise KeyboardInterrupt


def same(one: Found, other: Found) -> bool:
    return one.frontier == other.frontier and one.plans == other.plans and one.steps == other.steps


def test_an_interrupted_search_goes_on(gentle: Callable[..., Any], two_texts: Any, tmp_path: Path) -> None:
    model = gentle("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    whole = find_plans(model, two_texts, SETTINGS)
    path = tmp_path / "search.json"
    spent = []
    for _ in range(40):
        try:
            resumed = find_plans(model, two_texts, SETTINGS, state_path=path, progress=Interrupt(25))
        except KeyboardInterrupt:
            assert all("forward" not in module.__dict__ for module in model.modules())
            continue
        spent.append(sum(resumed.evaluations.values()))
        break
    assert spent, "it never got to the end: nothing was kept"
    assert same(resumed, whole)
    assert spent[0] < sum(whole.evaluations.values()) / 4
    assert list(tmp_path.iterdir()) == [path]
    for name, value in model.state_dict().items():
        assert_bits_equal(value, before[name], name)


def test_another_budget_goes_on_from_what_is_measured(
    gentle: Callable[..., Any], two_texts: Any, tmp_path: Path
) -> None:
    model, path = gentle("llama"), tmp_path / "search.json"
    options: dict[str, Any] = {"shortlist": 3, "seeds": 1, "protect_default": False}
    first = find_plans(model, two_texts, Settings(budgets=(2,), **options), state_path=path)
    more = find_plans(model, two_texts, Settings(budgets=(2, 3), **options), state_path=path)
    assert sorted(more.plans) == [2, 3]
    assert more.plans[2] == first.plans[2]
    assert more.steps["layers"][: len(first.steps["layers"])] == first.steps["layers"]
    less = find_plans(model, two_texts, Settings(budgets=(3,), exchange=False, **options), state_path=path)
    assert less.plans == {3: more.plans[3]}
    assert {point.budget for point in less.frontier.points} == {3}
    assert first.not_exchanged == more.not_exchanged == less.not_exchanged == {}


def test_a_budget_that_an_earlier_run_went_through_says_that_nothing_was_exchanged(
    gentle: Callable[..., Any], two_texts: Any, tmp_path: Path
) -> None:
    model, path = gentle("llama"), tmp_path / "search.json"
    options: dict[str, Any] = {"shortlist": 3, "seeds": 1, "protect_default": False}
    find_plans(model, two_texts, Settings(budgets=(1, 3), **options), state_path=path)
    between = find_plans(model, two_texts, Settings(budgets=(2,), **options), state_path=path)
    assert between.not_exchanged == {"layers": [2]}
    assert "exchanged, layers" not in {point.method for point in between.frontier.points}
    assert "exchange, layers" not in between.evaluations
    unasked = find_plans(model, two_texts, Settings(budgets=(2,), exchange=False, **options), state_path=path)
    assert unasked.not_exchanged == {}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[: len(text) // 2], "damaged or no state"),
        (lambda text: "", "damaged or no state"),
        (lambda text: "[]", "'format': 'void_ext.search'"),
        (lambda text: text.replace('"version": 1', '"version": 7'), "reads version 1, got 7"),
        (lambda text: text.replace('"kl"', '"lk"', 1), "no entry 'kl'"),
        (lambda text: text.replace('"kl": [', '"kl": [NaN, ', 1), "finite number"),
        (lambda text: text.replace('"kl": [', '"kl": ["much", ', 1), "finite number, got 'much'"),
        (lambda text: text.replace('"kl": [', '"kl": [1.0, ', 1), "values of 3 sequences"),
        (lambda text: text.replace('"shortlist": 3', '"shortlist": 4'), "shortlist is 4 there and 3 now"),
        (lambda text: text.replace('"0000', '"1111'), "texts.calibration.sha256 is"),
    ],
)
def test_a_damaged_or_foreign_state_is_refused(
    damage: Callable[[str], str], message: str, gentle: Callable[..., Any], two_texts: Any, tmp_path: Path
) -> None:
    model, path = gentle("llama"), tmp_path / "search.json"
    with pytest.raises(KeyboardInterrupt):
        find_plans(model, two_texts, SETTINGS, state_path=path, progress=Interrupt(12))
    text = path.read_text()
    damaged = damage(text)
    assert damaged != text
    path.write_text(damaged)
    with pytest.raises(ValueError, match=r"state: .*search\.json") as caught:
        find_plans(model, two_texts, SETTINGS, state_path=path, progress=lambda *_: pytest.fail("it went on"))
    assert message in str(caught.value)
    assert "--force" in str(caught.value)
    assert path.read_text() == damaged


def test_a_search_of_another_number_of_sequences_is_another_search(
    gentle: Callable[..., Any], two_texts: Any, tmp_path: Path
) -> None:
    model, path = gentle("llama"), tmp_path / "search.json"
    fewer = tuple(dataclasses.replace(text, ids=text.ids[:2]) for text in two_texts)
    with pytest.raises(KeyboardInterrupt):
        find_plans(model, fewer, SETTINGS, state_path=path, progress=Interrupt(12))
    kept = path.read_bytes()
    with pytest.raises(ValueError, match="belongs to another search: sequences is 2 there and 3 now"):
        find_plans(model, two_texts, SETTINGS, state_path=path, progress=lambda *_: pytest.fail("it went on"))
    assert path.read_bytes() == kept


def test_the_state_of_another_model_with_the_same_norms_is_refused(
    gentle: Callable[..., Any], two_texts: Any, tmp_path: Path
) -> None:
    """As after merging an adapter, or training with frozen norms."""
    model, path = gentle("llama"), tmp_path / "search.json"
    with pytest.raises(KeyboardInterrupt):
        find_plans(model, two_texts, SETTINGS, state_path=path, progress=Interrupt(12))
    kept = path.read_bytes()
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight.mul_(1.5)
    with pytest.raises(
        ValueError, match=r"belongs to another search: model_content is '[0-9a-f]+ there and '[0-9a-f]+ now"
    ):
        find_plans(model, two_texts, SETTINGS, state_path=path, progress=lambda *_: pytest.fail("it went on"))
    assert path.read_bytes() == kept


def test_a_full_disk_keeps_what_was_measured(
    gentle: Callable[..., Any], two_texts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = gentle("llama"), tmp_path / "search.json"
    sync, calls = _files.sync, []

    def full(place: Path) -> None:
        calls.append(place)
        if len(calls) > 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(place)

    monkeypatch.setattr(_files, "sync", full)
    with pytest.raises(
        OSError, match=r"search\.json could not be written: No space left .* goes on from there"
    ) as caught:
        find_plans(model, two_texts, SETTINGS, state_path=path)
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert len(json.loads(path.read_text())["measured"]) > 3
    assert list(tmp_path.iterdir()) == [path]
    assert same(find_plans(model, two_texts, SETTINGS, state_path=path), find_plans(model, two_texts, SETTINGS))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budgets": ()}, "budgets: expected whole numbers of layers >= 1"),
        ({"budgets": (0,)}, "budgets"),
        ({"budgets": (1.5,)}, "budgets"),
        ({"budgets": (1,), "kinds": ("heads",)}, "kinds"),
        ({"budgets": (1,), "kinds": ()}, "kinds"),
        ({"budgets": (1,), "shortlist": 0}, "shortlist"),
        ({"budgets": (1,), "alpha": -1.0}, "alpha"),
        ({"budgets": (1,), "protect": (1, 1)}, "protect"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**settings)


def test_models_and_budgets_that_do_not_fit_are_refused(
    tiny: Callable[..., Any], two_texts: Any, tmp_path: Path
) -> None:
    path = tmp_path / "search.json"
    for budgets, options in (((4,), {}), ((1,), {"protect": (9,)})):
        with pytest.raises(ValueError, match=r"at most 3 of 6 layers|below 6"):
            find_plans(tiny("llama"), two_texts, Settings(budgets=budgets, **options), state_path=path)
    for refused in (costs_of, find_plans):
        last: Any = 3 if refused is costs_of else Settings(budgets=(1,))
        arguments = (tiny("gpt2"), Settings(budgets=(1,)), 3) if last == 3 else (tiny("gpt2"), two_texts, last)
        with pytest.raises(void_ext.UnsupportedModelError, match="gpt2"):
            refused(*arguments)
    assert not path.exists()


def mixture_with_two_light_layers() -> Any:
    """A mixture of experts in which layers 2 and 3 are dense: both together weigh less than one of the others."""
    torch.manual_seed(0)
    config = transformers.Qwen2MoeConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        num_experts=4,
        num_experts_per_tok=2,
        mlp_only_layers=[2, 3],
        initializer_range=0.1,
    )
    return transformers.Qwen2MoeForCausalLM(config).eval()


def test_halves_that_weigh_less_than_the_budget_are_refused(two_texts: Any, tmp_path: Path) -> None:
    """The two light layers are the only ones that may go."""
    model = mixture_with_two_light_layers()
    path = tmp_path / "search.json"
    for kinds in (("halves",), ("layers", "halves")):
        settings = Settings(budgets=(1, 2), kinds=kinds)
        message = r"budgets: expected at most 0\.\d+ layers, the weight of all halves that are not protected, got 2"
        with pytest.raises(ValueError, match=message):
            costs_of(model, settings, 3)
        with pytest.raises(ValueError, match=message):
            find_plans(model, two_texts, settings, state_path=path, progress=lambda *_: pytest.fail("it began"))
    assert not path.exists()
    found = find_plans(model, two_texts, Settings(budgets=(1, 2), shortlist=1, seeds=0, exchange=False))
    assert off_of(found.plans[2]) == {4, 5, 6, 7}


def test_a_search_by_halves_saves_the_weights_of_its_budget(two_texts: Any) -> None:
    """Where layers differ in weight, a plan of whole layers may save less: the halves do not go on from such a one."""
    model = mixture_with_two_light_layers()
    with torch.no_grad():
        for layer in model.model.layers[2:4]:  # without these hardly anything changes
            for part in (layer.self_attn.o_proj, layer.mlp.down_proj):
                part.weight.mul_(0.1)
    settings = Settings(budgets=(1, 2), kinds=("layers", "halves"), shortlist=2, seeds=0, protect_default=False)
    found = find_plans(model, two_texts, settings)
    weights = Fingerprint.of(model).weights
    for budget in (1, 2):
        assert size_of(weights, found.frontier.best(budget).off) < budget  # so there is something to refuse
        sizes = {point.method: size_of(weights, point.off) for point in found.frontier.at(budget)}
        assert sizes["greedy, halves"] >= budget
        assert sizes["exchanged, halves"] >= budget
    told = costs_of(model, settings, 3)
    for kind, cost in told.searches.items():
        assert found.evaluations[f"greedy, {kind}"] <= cost.greedy
        assert found.evaluations[f"exchange, {kind}"] <= cost.exchange


def test_the_picture(gentle: Callable[..., Any], two_texts: Any, tmp_path: Path) -> None:
    found = find_plans(gentle("llama"), two_texts, Settings(budgets=(1, 2), protect_default=False))
    for name in ("a.png", "a.svg"):
        path = plot_frontier(found.frontier, tmp_path / name, title="$model_1$", note="a text")
        assert path.stat().st_size > 10_000
    text = (tmp_path / "a.svg").read_text()
    for words in ("$model_1$", "held-out text", "cosine", "exchanged, layers", "saved plan", "random"):
        assert words in text
    with pytest.raises(FileExistsError):
        plot_frontier(found.frontier, tmp_path / "a.png")
    assert off_of(found.plans[1])
