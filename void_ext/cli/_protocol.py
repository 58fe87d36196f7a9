"""``void-ext eval --protocol``: its options, what they mean for the others, and what it adds to the results."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from void_ext.cli._console import Terminal
from void_ext.evaluate.protocol.datasets import DATASETS, ORDERS
from void_ext.evaluate.protocol.presets import PROTOCOLS, SEEDS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from void_ext.evaluate.protocol.runs import Protocol
    from void_ext.evaluate.report import Report

#: What a protocol says itself.
_FIXED = ("task_path", "allow_task_code", "num_fewshot", "chat", "system")
_OWN = ("data_dir", "option_order", "greedy", "drop_duplicates")


def add_protocol(parser: argparse.ArgumentParser) -> None:
    """The group of options."""
    group = parser.add_argument_group("protocol (instead of tasks: MMLU, GPQA Diamond and BoolQ, see docs/protocol.md)")
    group.add_argument(
        "--protocol",
        choices=PROTOCOLS,
        help="paper: its prompts, text sampled and greedy; likelihood: lm-eval's standard tasks; --tasks takes some of "
        + ", ".join(DATASETS),
    )
    group.add_argument(
        "--data-dir", metavar="DIR", help="local parquet, csv, json or jsonl files (default: the hub or its cache)"
    )
    group.add_argument(
        "--option-order", choices=ORDERS, help="of GPQA: hash: shuffled per item (default); paper: always D is right"
    )
    group.add_argument("--greedy", action="store_true", help="with --protocol paper: no sampled runs")
    group.add_argument("--drop-duplicates", action="store_true", help="leave copies of an item out")


def check_protocol(arguments: argparse.Namespace) -> None:
    """End with a usage error where options do not go together; fill in what a protocol decides."""
    error = arguments.parser.error
    if arguments.protocol is None:
        for name in _OWN:
            if getattr(arguments, name):
                error(f"argument --{name.replace('_', '-')}: only means something together with --protocol")
        return
    for name in _FIXED:
        if getattr(arguments, name):
            error(f"argument --{name.replace('_', '-')}: a protocol says this itself; leave it out")
    unknown = [name for name in arguments.tasks or () if name not in DATASETS]
    if unknown:
        error(f"argument --tasks: with --protocol expected some of {', '.join(DATASETS)}, got {unknown[0]!r}")
    arguments.tasks = arguments.tasks or list(DATASETS)
    if arguments.greedy and arguments.protocol != "paper":
        error("argument --greedy: only means something with --protocol paper")
    if arguments.seeds is not None and (arguments.greedy or arguments.protocol != "paper"):
        error("argument --seeds: only means something where answers are sampled")
    arguments.option_order = arguments.option_order or ORDERS[0]
    arguments.chat = arguments.protocol == "paper"


def build(arguments: argparse.Namespace, terminal: Terminal) -> Protocol:
    """Data and tasks."""
    from void_ext.evaluate.protocol.runs import build_protocol

    sampled = () if arguments.greedy else arguments.seeds or SEEDS
    with terminal.waiting() as progress:
        protocol = build_protocol(
            arguments.protocol,
            datasets=arguments.tasks,
            data_dir=arguments.data_dir,
            order=arguments.option_order,
            seeds=sampled,
            drop_duplicates=arguments.drop_duplicates,
            progress=progress,
        )
    for note in protocol.notes:
        terminal.note(f"note: {note}")
    return protocol


def check_model(
    protocol: Protocol,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    arguments: argparse.Namespace,
    terminal: Terminal,
) -> None:
    """Refuse a model that cannot be asked; tell which prompts do not fit."""
    from void_ext.cli._timing import context
    from void_ext.evaluate.protocol.runs import check_tokenizer, long_prompts

    check_tokenizer(protocol, tokenizer, arguments.model)
    for note in long_prompts(protocol, tokenizer, context(model)):
        terminal.note(f"note: {note}")


def write(protocol: Protocol, report: Report, arguments: argparse.Namespace) -> dict[str, Path]:
    """The protocol's own files beside the report's."""
    from void_ext.evaluate.protocol.summary import save_summary

    return save_summary(protocol, report.cells, arguments.out, force=True)
