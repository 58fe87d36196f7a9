"""Running from kept streams gives what the patched model gives with that plan, at the count of layers it should."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import void_ext
from void_ext.search.measure import Judge
from void_ext.search.prefix import Prefixes, PrefixRunner
from void_ext.search.units import halves_of, plan_of
from void_ext.testing import assert_bits_equal

FAMILIES = ("llama", "qwen2", "gemma2", "qwen3", "olmo2", "phi3", "mixtral")
#: halves off: whole layers at both ends and inside; attention alone; MLP alone; all of it mixed
PLANS = (
    halves_of([2]),
    halves_of([0, 3, 5]),
    frozenset({2, 6}),
    frozenset({3, 11}),
    frozenset({0, 5, 6, 7}),
    halves_of(range(6)),
)


@torch.no_grad()
def patched_logits(model: nn.Module, ids: Tensor, off: frozenset[int]) -> Tensor:
    plan = plan_of(off, 6, None, "")
    with void_ext.patch(model, mode="skip", plan=plan):
        return torch.cat([model(input_ids=row[None], use_cache=False).logits for row in ids])


def divergence(dense: Tensor, other: Tensor) -> float:
    """The mean over positions with a next token, as the definition has it, in float64."""
    p, q = (logits[:, :-1].double().log_softmax(-1) for logits in (dense, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("parts", [1, 2])
def test_is_the_patched_model(family: str, parts: int, tiny: Callable[..., Any], two_texts: Any) -> None:
    model, ids = tiny(family), two_texts[0].ids
    dense, *plans = (patched_logits(model, ids, off) for off in (frozenset[int](), *PLANS))
    with PrefixRunner(model) as runner:
        prefixes = Prefixes(runner, ids, parts)
        judge = Judge(runner, ids, prefixes.finals())
        # From the dense streams, then from those of each plan in turn.
        for off, expected in zip(PLANS, plans, strict=True):
            finals = prefixes.run(off)
            logits = torch.stack([runner.logits(row[None], final) for row, final in zip(ids, finals, strict=True)])
            assert_bits_equal(logits, expected, f"{family} without {sorted(off)}")
            found = judge.measure(finals)
            assert found.divergence == pytest.approx(divergence(dense, expected), rel=1e-4, abs=1e-6)
            nll = nn.functional.cross_entropy(expected[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            assert found.perplexity == pytest.approx(float(nll.exp()), rel=1e-4)
            same = (expected.argmax(-1) == dense.argmax(-1))[:, :-1].float().mean()
            assert found.same == pytest.approx(float(same))
            prefixes.adopt(off)
            for ours, theirs in zip(prefixes.finals(), finals, strict=True):
                assert_bits_equal(ours, theirs, "adopted")


def test_only_what_lies_behind_the_first_difference_runs(tiny: Callable[..., Any], two_texts: Any) -> None:
    model, ids = tiny("llama"), two_texts[0].ids
    ran: list[str] = []
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_hook(lambda *_, name=f"{index}a": ran.append(name))
        layer.mlp.register_forward_hook(lambda *_, name=f"{index}m": ran.append(name))
    with PrefixRunner(model) as runner:
        prefixes = Prefixes(runner, ids[:1], parts=2)
        for off, expected in (
            (halves_of([4]), ["5a", "5m"]),
            (halves_of([5]), []),
            (frozenset({8}), ["4m", "5a", "5m"]),
            (frozenset({9}), ["5a", "5m"]),
            (frozenset(), []),
        ):
            ran.clear()
            before = runner.launched
            prefixes.run(off)
            assert ran == expected
            assert runner.launched - before == len(expected)
        prefixes.adopt(halves_of([3]))
        ran.clear()
        prefixes.run(halves_of([3, 1]))
        assert ran == ["2a", "2m", "4a", "4m", "5a", "5m"]
        ran.clear()
        prefixes.run(halves_of([1]))  # layer 3 comes back
        assert ran == ["2a", "2m", "3a", "3m", "4a", "4m", "5a", "5m"]


def test_leaves_the_model_as_it_was(tiny: Callable[..., Any], two_texts: Any) -> None:
    model, ids = tiny("gemma2"), two_texts[0].ids
    with torch.no_grad():
        before = model(ids).logits
    state = [dict(module.__dict__) for module in model.modules()]

    def use() -> None:
        with PrefixRunner(model) as runner:
            Prefixes(runner, ids)
            with torch.no_grad():
                assert_bits_equal(model(ids).logits, before, "between two runs")
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        use()
    assert [module.__dict__.keys() for module in model.modules()] == [one.keys() for one in state]
    assert all("forward" not in layer.__dict__ for layer in model.model.layers)
    with torch.no_grad():
        assert_bits_equal(model(ids).logits, before, "afterwards")


def test_refuses_what_cannot_skip(tiny: Callable[..., Any]) -> None:
    with pytest.raises(void_ext.UnsupportedModelError, match="gpt2"):
        PrefixRunner(tiny("gpt2"))
    model = tiny("llama")
    with pytest.raises(ValueError, match=r"eval mode.*model\.eval\(\)"):
        PrefixRunner(model.train())
    model.eval()
    with void_ext.patch(model), pytest.raises(void_ext.AlreadyPatchedError):
        PrefixRunner(model)
    assert all("forward" not in layer.__dict__ for layer in model.model.layers)


def test_the_dense_model_is_no_distance_from_itself(tiny: Callable[..., Any], two_texts: Any) -> None:
    ids = two_texts[0].ids
    with PrefixRunner(tiny("llama")) as runner:
        finals = Prefixes(runner, ids).finals()
        kept, remade = Judge(runner, ids, finals), Judge(runner, ids, finals, room=0)
        assert kept.dense().divergence == pytest.approx(0.0, abs=1e-7)
        assert kept.dense().same == 1.0
        other = Prefixes(runner, ids).run(halves_of([1, 2]))
        kept.heads = remade.heads = 0
        assert kept.measure(other) == remade.measure(other)  # bit for bit: the same sums
        assert (kept.heads, remade.heads) == (3 * 16, 2 * 3 * 16)
        some = kept.measure([other[0], other[2]], [0, 2])
        assert some == kept.measure(other).part([0, 2])


def test_logits_that_are_not_finite_are_told(tiny: Callable[..., Any], two_texts: Any) -> None:
    model, ids = tiny("llama"), two_texts[0].ids
    with torch.no_grad():
        model.model.layers[5].mlp.down_proj.weight.fill_(float("inf"))
    with PrefixRunner(model) as runner:
        judge = Judge(runner, ids, Prefixes(runner, ids).finals())
        with pytest.raises(ValueError, match="not finite"):
            judge.dense()
