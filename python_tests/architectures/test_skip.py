"""Skipping in every architecture whose fused forward allows it: against the model without the layer, and row by row."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

import void_ext
from void_ext import Action, PhasePlan, VoidPlan
from void_ext.patching.structure import find_decoder_stack
from void_ext.testing import architectures
from void_ext.testing.compare import assert_close
from void_ext.testing.tolerance import Tolerance, tolerance

#: attentions with one projection for queries, keys and values
PACKED = ("Phi3ForCausalLM",)
EXACT = Tolerance(0.0, 0.0, "the same modules on the same rows")
R, P, S = Action.RUN, Action.PROJECT, Action.SKIP


class Passing(torch.nn.Module):
    """A layer that is not there."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    """Of a prompt of six tokens and of two more through its cache."""
    out = model(input_ids=ids[:, :6], use_cache=True)
    found = [out.logits]
    for position in (6, 7):
        out = model(input_ids=ids[:, position : position + 1], past_key_values=out.past_key_values, use_cache=True)
        found.append(out.logits)
    return torch.cat(found, 1)


@torch.no_grad()
def test_projected_keys_and_values_are_the_layers_own(page: dict[str, architectures.Outcome]) -> None:
    """In front of a projected layer everything ran, so its slot in the cache holds what the whole layer puts there."""
    ids = torch.randint(3, architectures.VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(3))
    for name, classes in architectures.architectures().items():
        if name not in page or not page[name].skip:
            continue
        model: Any = architectures.build(*classes)
        whole = model(input_ids=ids, use_cache=True).past_key_values
        for layer in range(architectures.LAYERS):
            plan = VoidPlan.from_layers(model, skip=[layer], phase="prompt")
            with void_ext.patch(model, mode="skip", plan=plan) as handle:
                cache = model(input_ids=ids, use_cache=True).past_key_values
                assert handle.counters is not None
                assert handle.counters.prompt.layers_projected == 1
            own, made = whole.layers[layer], cache.layers[layer]
            for kind, left, right in (("keys", made.keys, own.keys), ("values", made.values, own.values)):
                # A part of a packed projection is another matrix product than the whole of it.
                limit = tolerance("logits", torch.float32) if name in PACKED else EXACT
                assert_close(left, right, limit, f"{name}, layer {layer}, {kind}")


def skipped(model: Any, plan: VoidPlan, ids: Tensor) -> Tensor:
    with void_ext.patch(model, mode="skip", plan=plan):
        return logits(model, ids)


def test_a_skipped_layer_is_as_good_as_gone_and_rows_do_not_meet(page: dict[str, architectures.Outcome]) -> None:
    names = [outcome.name for outcome in page.values() if outcome.skip]
    assert len(names) >= 50
    ids = torch.randint(3, architectures.VOCABULARY, (3, 8), generator=torch.Generator().manual_seed(2))
    classes = architectures.architectures()
    dense = PhasePlan.dense(3)
    rows = PhasePlan(((R, R, R), (R, P, R), (P, R, P)), ((R, R, R), (R, S, R), (S, R, S)))
    for name in names:
        model: Any = architectures.build(*classes[name])
        lacking: Any = copy.deepcopy(model)
        stack = find_decoder_stack(lacking)
        passing = Passing()
        passing.__dict__.update({k: v for k, v in stack.layers[1].__dict__.items() if not k.startswith("_")})
        lacking.get_submodule(stack.name)[1] = passing
        with torch.no_grad():
            expected = lacking(input_ids=ids, use_cache=False).logits
        found = skipped(model, VoidPlan.from_layers(model, skip=[1]), ids)
        torch.testing.assert_close(found, expected, msg=lambda text, name=name: f"{name}: {text}")
        # A row among others has its K and V made by the whole attention; alone, by the projections.
        for response in (rows, dense):
            together = skipped(model, VoidPlan(rows, response), ids)
            for row in range(3):
                plan = VoidPlan(rows, response).row(row)
                alone = skipped(model, plan, ids[row : row + 1])
                torch.testing.assert_close(
                    alone[0], together[row], msg=lambda text, name=name, row=row: f"{name}, row {row}: {text}"
                )
