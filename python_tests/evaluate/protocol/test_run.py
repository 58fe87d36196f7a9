"""The protocols through the runner, on a tiny model: what was asked, what was kept of the answers, what is counted."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from void_ext.evaluate.protocol import build_protocol, extract, paper_prompt, render, summarize
from void_ext.evaluate.protocol.items import LETTERS
from void_ext.evaluate.protocol.summary import Summary

pytest.importorskip("lm_eval")

from void_ext.evaluate import ModeSpec, Report, Settings, run
from void_ext.evaluate.cells import Cell
from void_ext.evaluate.cells import Item as Answered
from void_ext.evaluate.protocol.tasks import MAX_NEW_TOKENS


def _evaluate(protocol: Any, model: Any, tokenizer: Any, batch_size: int = 5, limit: int | None = None) -> Report:
    settings = Settings(batch_size=batch_size, limit=limit, apply_chat_template=protocol.needs_chat_template)
    return run(model, tokenizer, protocol.entries, [ModeSpec.dense()], settings, config=protocol.config)


def _answers(report: Report, task: str, seed: int) -> list[str]:
    (cell,) = (cell for cell in report.cells if (cell.task, cell.seed) == (task, seed))
    return [item.answers[0] for item in cell.items]


def test_greedy_answers_are_the_models_own_from_the_first_token_on(data_dir: Path, model: Any, tokenizer: Any) -> None:
    protocol = build_protocol("paper", datasets=["mmlu"], data_dir=data_dir, seeds=())
    found = _answers(_evaluate(protocol, model, tokenizer), "mmlu_greedy", 0)
    for item, answer in zip(protocol.loaded[0].items, found, strict=True):
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": paper_prompt(item)}], add_generation_prompt=True, tokenize=False
        )
        ids = tokenizer(chat, add_special_tokens=False, return_tensors="pt")["input_ids"]
        # Token by token and without generate: no checkpoint's generation settings can slip in.
        new: list[int] = []
        while len(new) < MAX_NEW_TOKENS and 1 not in new:
            with torch.no_grad():
                logits = model(input_ids=torch.cat([ids, torch.tensor([new], dtype=torch.long)], 1)).logits
            new.append(int(logits[0, -1].argmax()))
        assert answer == tokenizer.decode(new, skip_special_tokens=True)
        assert answer


def test_sampled_runs_repeat_and_do_not_hang_on_the_batch(data_dir: Path, model: Any, tokenizer: Any) -> None:
    protocol = build_protocol("paper", datasets=["gpqa_diamond"], data_dir=data_dir, seeds=(0, 7))
    reports = [_evaluate(protocol, model, tokenizer, size, limit) for size, limit in ((5, None), (1, None), (4, 4))]
    for seed in (0, 7):
        first, second, few = (_answers(report, "gpqa_diamond_sampled", seed) for report in reports)
        assert first == second
        assert first[:4] == few
        assert all(first)
    assert _answers(reports[0], "gpqa_diamond_sampled", 0) != _answers(reports[0], "gpqa_diamond_sampled", 7)
    assert _answers(reports[0], "gpqa_diamond_greedy", 0) != _answers(reports[0], "gpqa_diamond_sampled", 0)


def test_what_is_asked_of_generate(data_dir: Path, model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda **given: calls.append(given) or generate(**given))
    protocol = build_protocol("paper", datasets=["boolq"], data_dir=data_dir, seeds=(0,))
    _evaluate(protocol, model, tokenizer, limit=2)
    greedy, sampled = calls
    for call in calls:
        assert call["max_length"] - call["input_ids"].shape[1] == 50
        assert call["repetition_penalty"] == 1.0
        assert call["do_sample"] is False
    (sampler,) = sampled["logits_processor"]
    assert (sampler._temperature, sampler._top_p) == (0.6, 0.9)
    assert "logits_processor" not in greedy


@pytest.mark.parametrize("name", ["paper", "likelihood"])
def test_metrics_and_summary_agree(name: str, data_dir: Path, model: Any, tokenizer: Any) -> None:
    protocol = build_protocol(name, data_dir=data_dir, seeds=(0, 1))
    report = _evaluate(protocol, model, tokenizer)
    summaries = summarize(protocol, report.cells)
    assert [(summary.task, summary.seed) for summary in summaries] == [(cell.task, cell.seed) for cell in report.cells]
    for summary, cell in zip(summaries, report.cells, strict=True):
        assert summary.items == len(cell.items) == 12
        assert summary.correct == sum(item.metrics["acc"] for item in cell.items)
        assert summary.unparsable == sum(item.metrics.get("unparsable", 0) for item in cell.items)
        for place, asked in summary.asked.items():
            at = [item.metrics[f"acc_at_{place}"] for item in cell.items if f"acc_at_{place}" in item.metrics]
            assert (asked, summary.correct_at[place]) == (len(at), sum(at))
        assert sum(summary.asked.values()) == sum(summary.rules.values()) == 12
        assert sum(summary.chosen.values()) == 12 - summary.unparsable
    if name == "paper":
        assert list(protocol.entries) == [f"{d}_{how}" for d in protocol.tasks for how in ("greedy", "sampled")]
    else:
        assert list(protocol.entries) == ["mmlu", "gpqa_diamond_zeroshot", "boolq"]


def test_accuracy_by_position_is_counted_right(data_dir: Path) -> None:
    protocol = build_protocol("paper", datasets=["mmlu"], data_dir=data_dir, seeds=())
    items = protocol.loaded[0].items  # right answers at A B C D A B …
    answers = ["A.", "B.", "A.", "what?", "A.", "A.", "C.", "A or B", "", "B.", "C.", f"The answer is {LETTERS[3]}"]
    task = protocol.tasks["mmlu"]
    scored = [task.process_results(doc, [answer]) for doc, answer in zip(task.test_docs(), answers, strict=True)]
    cell = Cell(
        task="mmlu_greedy",
        mode="dense",
        seed=0,
        items=[Answered(n, scores, [a]) for n, (scores, a) in enumerate(zip(scored, answers, strict=True))],
        usage={},
        counters=None,
        layers=1,
        requests=12,
        seconds=1.0,
    )
    (summary,) = summarize(protocol, [cell])
    assert summary.asked == dict.fromkeys("ABCD", 3)
    assert summary.correct_at == {"A": 2, "B": 2, "C": 2, "D": 1}
    assert summary.chosen == {"A": 4, "B": 2, "C": 2, "D": 1}
    assert (summary.correct, summary.unparsable, summary.items) == (7, 3, 12)
    assert summary.rules == {"first": 9, "none": 3}
    assert summary.accuracy_parsed == 7 / 9
    assert Counter(scores["acc"] for scores in scored) == {1.0: 7, 0.0: 5}
    for item, answer, scores in zip(items, answers, scored, strict=True):
        right = float(extract(item, answer).option == item.answer)
        assert scores == {"acc": right, "unparsable": scores["unparsable"], f"acc_at_{item.position}": right}
    text = render([summary])
    assert "| dense | 0 | 58.3 % | 25.0 % | 77.8 % | 66.7 % | 66.7 % | 66.7 % | 33.3 % | A 4 B 2 C 2 D 1 |" in text
    assert "12 items, right answer at A 3, B 3, C 3, D 3" in text


def test_the_table_of_several_seeds_has_mean_and_spread() -> None:
    def one(seed: int, correct: int) -> Summary:
        at = {"True": correct, "False": 0}
        asked = {"True": 4, "False": 0}
        return Summary("boolq_sampled", "dense", seed, 4, correct, 0, asked, at, at, {"first": 4})

    last = render([one(0, 1), one(1, 3)]).splitlines()[-1]
    assert last == "| dense | mean ± sd of 2 | 50.0 % ± 35.4 | 0.0 % ± 0.0 | 50.0 % ± 35.4 | 50.0 % ± 35.4 | – |  |"


# ---- the harness's standard tasks ----


def test_the_descriptions_of_mmlu_are_the_harnesss_own(tmp_path: Path) -> None:
    import lm_eval
    import yaml

    from void_ext.evaluate.protocol.items import Item
    from void_ext.evaluate.protocol.tasks import likelihood_task

    files = sorted((Path(lm_eval.__file__).parent / "tasks/mmlu/default").glob("mmlu_*.yaml"))
    configs = [yaml.safe_load(path.read_text()) for path in files]
    assert len(configs) == 57
    for config in configs:
        item = Item("mmlu", "k", "Why? ", ("a", "b", "c", "d"), 2, subject=config["dataset_name"])
        task = likelihood_task("mmlu", [item])
        task.set_fewshot_seed(0)
        text = task.fewshot_context(task.test_docs()[0], num_fewshot=0)
        assert text == f"{config['description']}Why?\nA. a\nB. b\nC. c\nD. d\nAnswer:"
        assert task.doc_to_target(task.test_docs()[0]) == 2


def test_gpqas_options_are_cleaned_as_the_harness_does(data_dir: Path, table: Any) -> None:
    from datasets import Dataset
    from lm_eval.tasks.gpqa.zeroshot.utils import process_docs

    row = {"Question": " Why?\n", "Correct Answer": " r [title]x  y "} | {
        f"Incorrect Answer {n}": f"w{n} [title]   z\n" for n in (1, 2, 3)
    }
    place = table("odd/gpqa_diamond.jsonl", [row]) / "odd"
    task = build_protocol("likelihood", datasets=["gpqa_diamond"], data_dir=place, order="paper").tasks["gpqa_diamond"]
    doc = task.test_docs()[0]
    theirs = process_docs(Dataset.from_list([row]))[0]
    assert sorted(doc[f"choice{n}"] for n in (1, 2, 3, 4)) == sorted(theirs[f"choice{n}"] for n in (1, 2, 3, 4))
    assert theirs[f"choice{LETTERS.index(theirs['answer'][1]) + 1}"] == doc["choice4"]
    assert doc["answer"] == task.doc_to_target(doc) == "(D)"
    assert task.doc_to_text(doc).startswith("What is the correct answer to this question: Why?\n\nChoices:\n(A) w1. ")


def test_boolq_is_asked_with_no_and_yes(data_dir: Path) -> None:
    task = build_protocol("likelihood", datasets=["boolq"], data_dir=data_dir).tasks["boolq"]
    even, odd = task.test_docs()[0], task.test_docs()[1]
    assert task.doc_to_choice(even) == ["no", "yes"]
    assert (task.doc_to_target(even), task.doc_to_target(odd)) == (1, 0)
    assert task.doc_to_text(odd).endswith("\nQuestion: is 1 even?\nAnswer:")


def test_protocols_and_data_sets_that_are_none(data_dir: Path) -> None:
    with pytest.raises(ValueError, match="protocol: expected one of paper, likelihood, got 'papers'"):
        build_protocol("papers", data_dir=data_dir)
    for wrong in (["arc"], [], ["mmlu", "mmlu"]):
        with pytest.raises(ValueError, match="data sets: expected some of mmlu, gpqa_diamond, boolq, each once"):
            build_protocol("paper", datasets=wrong, data_dir=data_dir)
