"""A model spread over two processes gives what one process gives, and its ranks cannot come to differ in what runs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import void_ext
from void_ext.patching.agreement import Agreement
from void_ext.testing.compare import assert_close
from void_ext.testing.tolerance import tolerance

RUNS = ("trace", "plan", "prompt", "refresh", "halt")


@pytest.fixture(scope="module")
def alone(model_directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model_directory).eval()


@pytest.mark.parametrize("name", RUNS)
def test_tensor_parallel_is_as_one_process(name: str, ranks: list[dict[str, Any]], alone: Any, work: Any) -> None:
    expected = work.run(alone, work.policies(alone)[name])
    for found in ranks:
        for key, value in expected.items():
            if key.endswith("norms"):
                norms = torch.tensor(found[name][key]), torch.tensor(value)
                assert_close(*norms, tolerance("logits", torch.float32), key)
            else:
                assert found[name][key] == value, key


@pytest.mark.parametrize("name", RUNS)
def test_ranks_have_the_same_bits(name: str, ranks: list[dict[str, Any]]) -> None:
    assert ranks[0][name] == ranks[1][name]


def test_runs_skip_and_end_early(alone: Any, work: Any) -> None:
    """Otherwise the tests above would say little."""
    runs = {name: work.run(alone, options) for name, options in work.policies(alone).items()}
    assert runs["plan"]["counters"]["response"]["layers_skipped"] > 0
    for name in ("prompt", "refresh"):
        assert runs[name]["counters"]["response"]["attention_projected"] > 0
    assert len({str(run["tokens"]) for run in runs.values()}) > 2


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("differing plan", "VoidPlan"),
        ("differing decision", "VoidPlan"),
        ("failing decision", "for 2 rows of the response"),
        ("one rank decides", "for 2 rows of the response"),
        ("differing table", "VoidPlan"),
    ],
)
def test_divergence_is_an_error_on_every_rank(case: str, words: str, ranks: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(ranks):
        assert found[case].startswith("DivergenceError: policy: the 2 ranks that hold this model differ")
        assert f"rank {rank} has" in found[case]
        assert words in found[case]
        assert found["after all of that"] == found["prompt"]


def test_data_parallel_usage_is_pooled_by_tokens(ranks: list[dict[str, Any]], alone: Any, work: Any) -> None:
    expected = work.usage(alone, work.batches())
    for found in ranks:
        assert found["usage"]["tokens"] == expected.tokens == 36
        assert found["usage"]["active"] == expected.active.tolist()
        assert found["usage"]["usage"] == expected.usage().tolist()


def test_counts_that_cannot_be_pooled(alone: Any, work: Any) -> None:
    count = work.usage(alone, work.batches()[:1])
    with pytest.raises(RuntimeError, match=r"gather: expected an initialized torch\.distributed"):
        count.gather()
    with void_ext.patch(alone) as handle, torch.no_grad():
        alone(input_ids=work.IDS)
        with pytest.raises(ValueError, match="trace: expected 5 layers, got 6"):
            void_ext.UsageCount(5).add(handle.trace.prompt)
        count = void_ext.UsageCount(6)
        with pytest.raises(TypeError, match=r"trace: expected one phase .*, its \.prompt or its \.response, got Trace"):
            count.add(handle.trace)
        assert count.tokens == 0
    for layers in ("5", 2.0, True):
        with pytest.raises(TypeError, match=f"layers: expected a whole number, got {type(layers).__name__} {layers!r}"):
            void_ext.UsageCount(layers)
    with pytest.raises(ValueError, match="layers: expected at least 1, got 0"):
        void_ext.UsageCount(0)
    assert all(math.isnan(share) for share in void_ext.UsageCount(2).usage().tolist())


def test_a_model_in_one_process_compares_nothing(alone: Any) -> None:
    assert Agreement.of([alone]) is None
