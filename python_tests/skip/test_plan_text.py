"""How a plan describes itself, and what it saves."""

from __future__ import annotations

from typing import Any

from void_ext import Action, PhasePlan, VoidPlan
from void_ext._plan_text import saved_flops, saved_reads
from void_ext.plan import Fingerprint, Weights

S, P, R = Action.SKIP, Action.PROJECT, Action.RUN


def test_savings_are_those_of_the_matrices() -> None:
    weights = Weights(attention=(100, 200), project=(10, 20), mlp=(300, 400), other=1000)
    plan = PhasePlan([P, S], [R, S])
    assert saved_flops(plan, weights, head=False) == (90 + 200 + 400) / 1000
    assert saved_flops(plan, weights, head=True) == saved_reads(plan, weights) == (90 + 200 + 400) / 2000
    # Each row computes what it needs; the step reads what any row needs.
    rows = PhasePlan([[P, S], [R, S]], [[S, S], [S, R]])
    assert saved_flops(rows, weights, head=True) == ((90 + 200 + 700) + (200 + 300)) / 2 / 2000
    assert saved_reads(rows, weights) == (0 + 200 + 300 + 0) / 2000
    assert saved_reads(PhasePlan([[P, S], [S, S]], [[S, R]] * 2), weights) == (90 + 200 + 300) / 2000


def test_describe(model: Any) -> None:
    plan = VoidPlan.from_layers(model, skip=[3], attention=[5], phase="prompt")
    weights = Fingerprint.of(model).weights
    total = sum(weights.attention) + sum(weights.mlp)
    saved = weights.attention[3] + weights.attention[5] - 2 * weights.project[3] + weights.mlp[3]
    assert plan.describe().splitlines() == [
        "plan for 8 layers of llama",
        "  from_layers(skip=[3], attention=[5], mlp=[], phase='prompt')",
        "",
        "                    0",
        "layer               01234567",
        "prompt        attn  ...P.P..",
        "              mlp   ...S....",
        "response      attn  ........",
        "              mlp   ........",
        "",
        ". runs   P keys and values for the cache alone (PROJECT)   S nothing (SKIP)",
        "",
        f"prompt: 1.5 of 8 layers off; saves {saved / total:.1%} of the FLOPs of a token",
        "response: 0 of 8 layers off; saves 0.0% of the weights read per step",
        "  (head included) and 0.0% of the FLOPs of a token",
        "2 FLOPs a weight; left out are attention scores, and the head in the prompt.",
    ]


def test_describe_wide_plans_and_many_rows() -> None:
    wide = VoidPlan.from_layers(126, skip=range(0, 126, 2)).describe().splitlines()
    assert max(map(len, wide)) == 80
    strips = [line for line in wide if line.startswith("prompt  ")]
    assert [len(line) for line in strips] == [80, 80, 26]
    assert "".join(line[20:] for line in strips) == "".join("S" if i % 2 == 0 else "." for i in range(126))
    assert any(line.strip() == "60        70        80        90        100       110" for line in wide)
    rows = VoidPlan(PhasePlan.dense(3), PhasePlan([[R, P, R]] * 7, [[R, S, R]] * 6 + [[R, R, R]]))
    lines = rows.describe().splitlines()
    assert lines[0] == "plan for 3 layers, 7 rows"
    assert [line for line in lines if "attn" in line][1:] == [f"response {i}    attn  .P." for i in range(4)]
    assert "response: and 3 more rows" in lines
    assert "response: 0.9286 of 3 layers off on average" in lines


def test_describe_prints_no_control_characters() -> None:
    dense = PhasePlan.dense(2)
    text = VoidPlan(dense, dense, None, "\x1b[2Jhello\r\n" + "x" * 5000).describe()
    assert "\x1b" not in text
    assert "\r" not in text
    assert "?[2Jhello??" in text
    assert len(text) < 1000
