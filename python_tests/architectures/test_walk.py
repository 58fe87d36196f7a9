"""What comes of every causal language model of transformers, and that the page which says so is right."""

from __future__ import annotations

from collections import Counter

import pytest

from void_ext.testing import architectures

#: the paper's families, fused weights, experts, two norms more, layers of other shapes, latent attention, states beside
#: keys and values, refusals
SOME = (
    *("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Phi3ForCausalLM"),
    *("MixtralForCausalLM", "Gemma2ForCausalLM", "GPT2LMHeadModel", "GPTNeoXForCausalLM", "OPTForCausalLM"),
    *("BloomForCausalLM", "FalconForCausalLM", "MambaForCausalLM", "DeepseekV4ForCausalLM", "ProphetNetForCausalLM"),
    *("DeepseekV3ForCausalLM", "JambaForCausalLM", "LongcatFlashForCausalLM", "Gemma3nForCausalLM"),
)


def compare(found: list[architectures.Outcome], page: dict[str, architectures.Outcome]) -> None:
    assert [(one.name, one.kind, one.reason) for one in found if one.kind in ("differs", "breaks")] == []
    assert {one.name: (one.kind, one.skip) for one in found} == {
        one.name: (page[one.name].kind, page[one.name].skip) for one in found
    }


def test_some_of_each_kind(page: dict[str, architectures.Outcome]) -> None:
    names = [name for name in SOME if name in page]
    assert len(names) == len(SOME)
    compare(architectures.walk(names), page)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all(page: dict[str, architectures.Outcome]) -> None:
    found = architectures.walk()
    assert {one.name for one in found} == set(page)
    compare(found, page)
    kinds = Counter(one.kind for one in found)
    assert kinds["fused"] + kinds["generic"] >= 100
    assert kinds["unbuildable"] <= Counter(one.kind for one in page.values())["unbuildable"]


def test_a_page_is_read_as_it_was_written() -> None:
    outcomes = [
        architectures.Outcome("AForCausalLM", "fused", True, ""),
        architectures.Outcome("BForCausalLM", "refused", False, "encoder-decoder"),
    ]
    text = f"x\n{architectures.BEGIN}\n{architectures.table(outcomes)}\n{architectures.END}\n"
    assert architectures.read_table(text) == outcomes
