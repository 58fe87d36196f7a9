"""``void-ext demo``: the trace command on a small real model; leaves a picture and a trace file."""

from __future__ import annotations

import argparse
import itertools
import os
from pathlib import Path

from void_ext.cli import _parser, _run
from void_ext.cli._console import Terminal

QUESTION = "What is the capital of France, and what is it famous for?"
SECOND_ALPHA = 0.2


def run(arguments: argparse.Namespace, terminal: Terminal) -> int:
    _parser.check_sampling(arguments)
    arguments.prompt_file = None
    if arguments.prompt is None:
        arguments.prompt = QUESTION
    prompt = _run.read_prompt(arguments)
    _choose_names(arguments, terminal)
    if not arguments.json:
        terminal.print(f"Q: {prompt}", style="bold")
    _run.run_and_report(arguments, terminal, prompt, alphas=list(dict.fromkeys((arguments.alpha, SECOND_ALPHA))))
    return 0


def _choose_names(arguments: argparse.Namespace, terminal: Terminal) -> None:
    """Give picture and trace the first number that is free for both, where no name was given."""
    defaults = [name for name in ("plot", "save") if getattr(arguments, name) is None]
    suffixes = {"plot": ".png", "save": ".safetensors"}
    for number in itertools.count(1):
        stem = "void-demo" if number == 1 else f"void-demo-{number}"
        names = {name: Path(stem + suffixes[name]) for name in defaults}
        if arguments.force or not any(os.path.lexists(path) for path in names.values()):
            break
    for name, path in names.items():
        setattr(arguments, name, str(path))
    if number > 1 and defaults:
        terminal.note(f"void-demo files are here already; writing {stem} (--force replaces void-demo)")
