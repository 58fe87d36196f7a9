"""Small data sets with the columns of the published ones."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

Rows = list[dict[str, Any]]

MMLU: Rows = [
    {
        "question": f'Which number follows {n}?\n{{braces}} and, "quotes"',
        "subject": "elementary_mathematics" if n % 2 else "us_foreign_policy",
        "choices": [str(n + 1), "None", f" {n} ", "a, b"],
        "answer": n % 4,
    }
    for n in range(12)
]
GPQA: Rows = [
    {
        "Record ID": f"rec{n}",
        "Question": f"What is the {n}-th term?\n",
        "Correct Answer": f"right {n}\n",
        "Incorrect Answer 1": f"wrong one {n}",
        "Incorrect Answer 2": f"wrong two {n}",
        "Incorrect Answer 3": "NA",
        "Subdomain": "Series",
    }
    for n in range(12)
]
BOOLQ: Rows = [
    {"question": f"is {n} even", "answer": n % 2 == 0, "passage": f"A number is even if 2 divides it. {n} is one."}
    for n in range(12)
]
ROWS = {"mmlu": MMLU, "gpqa_diamond": GPQA, "boolq": BOOLQ}


def write_table(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """``rows`` in the format that the name ends in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(list(rows)), encoding="utf-8")
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]) if rows else ["question"])
            writer.writeheader()
            writer.writerows({k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows)
    return path


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """All three data sets, as jsonl."""
    for name, rows in ROWS.items():
        write_table(tmp_path / f"{name}.jsonl", rows)
    return tmp_path


@pytest.fixture
def table(tmp_path: Path) -> Callable[[str, Sequence[dict[str, Any]]], Path]:
    """Write rows under a name in a directory, give the directory."""

    def write(name: str, rows: Sequence[dict[str, Any]]) -> Path:
        write_table(tmp_path / name, rows)
        return tmp_path

    return write


CHAT = (
    "{{ bos_token }}{% for message in messages %}<{{ message.role }}>{{ message.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """A token a byte, with a chat template that writes the first token itself, as Llama 3's and Mistral's do."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1, "<pad>": 2} | {letter: 3 + index for index, letter in enumerate(letters)}
    bytes_ = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_.decoder = decoders.ByteLevel()
    bytes_.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bytes_, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=CHAT
    )


@pytest.fixture(scope="session")
def model() -> Any:
    """A random Llama over these tokens; its generation settings are those of checkpoints that bring their own."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=1024,
        initializer_range=0.4,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    found = LlamaForCausalLM(config).eval()
    found.generation_config.update(do_sample=True, temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.5)
    return found
