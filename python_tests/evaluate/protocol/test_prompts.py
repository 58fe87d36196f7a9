"""What is asked, to the last space, and in which chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from void_ext.evaluate.protocol import Item, build_protocol, check_tokenizer, long_prompts, paper_prompt

CHOICES = Item("mmlu", "k", "How many {legs}?\nCount.", ("two", "four", " six", "8"), 1)
GPQA = Item("gpqa_diamond", "k", "Which?\n", ("w1", "w2", "w3", "r\n"), 3)
BOOLQ = Item("boolq", "k", "is it so", ("True", "False"), 0, passage="It is.\nSo.")


def test_options_with_letters() -> None:
    # As eval.py of the paper's repository puts it together; written out here, not computed.
    assert paper_prompt(CHOICES) == (
        "\n    Question:\n    How many {legs}?\nCount.\n\n    Options:\n    A. two\nB. four\nC.  six\nD. 8\n\n"
        "    Output format:\n    [Option]\n\n    "
    )
    assert paper_prompt(GPQA) == (
        "\n    Question:\n    Which?\n\n\n    Options:\n    A. w1\nB. w2\nC. w3\nD. r\n\n\n"
        "    Output format:\n    [Option]\n\n    "
    )


def test_true_or_false() -> None:
    assert paper_prompt(BOOLQ) == (
        "\n    Respond to the given question based on the passage with True or False.\n"
        "    Passage:\n    It is.\nSo.\n\n"
        "    Options:\n    is it so\n\n    Output Format:\n    [True/False]\n    "
    )


@pytest.mark.parametrize("dataset", ["mmlu", "gpqa_diamond", "boolq"])
def test_the_chat_template_is_applied(dataset: str, data_dir: Path, model: Any, tokenizer: Any) -> None:
    harness = pytest.importorskip("void_ext.evaluate.harness")
    lm = harness.WatchedLM(model, tokenizer)
    protocol = build_protocol("paper", datasets=[dataset], data_dir=data_dir)
    task = protocol.tasks[dataset]
    task.set_fewshot_seed(0)
    task.build_all_requests(apply_chat_template=True, fewshot_as_multiturn=True, chat_template=lm.apply_chat_template)
    asked = [instance.args[0] for instance in task.instances]
    items = protocol.loaded[0].items
    assert asked == [f"<s><user>{paper_prompt(item)}</><assistant>" for item in items]
    # The template brings the first token; a second one, as in the paper's code, must not come.
    ids, _ = lm.tok_batch_encode(asked[:1])
    assert (ids == 0).sum() == 1


def test_a_tokenizer_without_chat_template_is_refused(data_dir: Path, tokenizer: Any) -> None:
    import copy

    pytest.importorskip("lm_eval")
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    paper = build_protocol("paper", datasets=["boolq"], data_dir=data_dir)
    with pytest.raises(
        ValueError, match=r"--protocol paper: the tokenizer of 'some/base' has no chat template.*Instruct"
    ):
        check_tokenizer(paper, bare, "some/base")
    check_tokenizer(paper, tokenizer, "some/chat")
    check_tokenizer(build_protocol("likelihood", datasets=["boolq"], data_dir=data_dir), bare, "some/base")


def test_prompts_that_do_not_fit_are_told(data_dir: Path, tokenizer: Any) -> None:
    pytest.importorskip("lm_eval")
    paper = build_protocol("paper", datasets=["boolq", "mmlu"], data_dir=data_dir)
    lengths = [
        len(tokenizer(f"<s><user>{paper_prompt(item)}</><assistant>", add_special_tokens=False)["input_ids"])
        for item in paper.loaded[0].items
    ]
    longest = max(lengths)
    assert long_prompts(paper, tokenizer, longest + 50) == []
    notes = long_prompts(paper, tokenizer, longest + 49)
    assert [note.partition(" prompts")[0] for note in notes] == [f"boolq: {lengths.count(longest)} of 12"]
