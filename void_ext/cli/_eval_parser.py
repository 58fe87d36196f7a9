"""The options of ``void-ext eval``."""

from __future__ import annotations

import argparse
import math

from void_ext import _options
from void_ext.cli import _parser, _protocol
from void_ext.evaluate.modes import DENSE, EXIT, NAMES, SKIP
from void_ext.evaluate.protocol.presets import MODELS

#: What says what to skip, and has no meaning where nothing is skipped.
_LAYERS = ("plan", "skip", "skip_attention", "skip_mlp", "phase", "force_plan")
SHORT = (*MODELS, "smollm2")
SKIPPING = (*_LAYERS, "policy", "every", "budget", "at_least", "signal", "protect")


def add_eval(parser: argparse.ArgumentParser) -> None:
    """Everything but what all commands share."""
    parser.add_argument("model", metavar="MODEL", help=f"a local directory, a hub id, or one of {', '.join(SHORT)}")
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    group = parser.add_argument_group("tasks")
    group.add_argument("--tasks", type=_names, metavar="T,T", help="tasks, groups or tags of lm-eval or of --task-path")
    group.add_argument(
        "--task-path",
        action="append",
        default=[],
        metavar="PATH",
        help="a task file, or a directory of them; repeatable",
    )
    group.add_argument(
        "--allow-task-code", action="store_true", help="take task files that run code (templates, !function, scripts)"
    )
    group.add_argument("--limit", type=_limit, metavar="N", help="documents a task; below 1 a share of them")
    group.add_argument("--num-fewshot", type=_at_least_0, metavar="N", help="examples in the prompt (as the task says)")
    group.add_argument("--chat", action="store_true", help="put prompts into the tokenizer's chat template")
    group.add_argument("--system", metavar="TEXT", help="with --chat: a system message")
    group.add_argument(
        "--seeds", type=_seeds, metavar="S,S", help="a run for each (default 0; with --protocol paper 0,1,2)"
    )
    _protocol.add_protocol(parser)
    group = parser.add_argument_group("modes")
    group.add_argument(
        "--modes",
        type=_modes,
        default=(DENSE, EXIT),
        metavar="M,M",
        help="dense (always there), exit: the paper's early exit, skip (default dense,exit)",
    )
    group.add_argument(
        "--alpha",
        type=_alphas,
        default=(_parser.ALPHA,),
        metavar="A,A",
        help="of exit and of policies; a mode for each",
    )
    group.add_argument(
        "--fuse", choices=_options.FUSES, default="add", help="add: bit-identical; norm: fuses RMSNorm too"
    )
    group = parser.add_argument_group("skipping (plan files, layers, or a policy)")
    group.add_argument(
        "--plan", action="append", metavar="FILE", help=f"{_parser.PLAN_HELP}; repeatable, a mode for each"
    )
    _parser.add_skipping(group, granularity="of exit and of policies: one verdict per … (token)")
    group = parser.add_argument_group(
        "running", "Processes that accelerate launch or torchrun started (-m void_ext.cli eval …) share the batches."
    )
    group.add_argument("--batch-size", type=_batch, default="auto", metavar="N", help="auto: what fits; 8 on a CPU")
    group.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as stored")
    group.add_argument(
        "--device",
        help="cpu, cuda, cuda:N, auto (default: the first GPU, else the CPU); of several processes: cpu or cuda, where "
        "each takes the GPU of its local rank",
    )
    group = parser.add_argument_group("results")
    group.add_argument(
        "--out", default="void-eval", metavar="DIR", help="results, and finished work to go on from (./void-eval)"
    )
    group.add_argument("--force", action="store_true", help="throw an earlier run in --out away")


def check_eval(arguments: argparse.Namespace) -> None:
    """End with a usage error where options do not go together."""
    error = arguments.parser.error
    _protocol.check_protocol(arguments)
    if not arguments.tasks:
        error("expected --tasks or --protocol")
    if arguments.system is not None and not arguments.chat:
        error("argument --system: only means something together with --chat")
    if SKIP in arguments.modes:
        _parser.check_skipping(arguments, granularity=False)
    else:
        given = [name for name in SKIPPING if getattr(arguments, name)]
        if given:
            error(f"argument --{given[0].replace('_', '-')}: only means something with skip among --modes")
    if arguments.granularity is not None and EXIT not in arguments.modes and arguments.policy is None:
        error("argument --granularity: only means something with exit among --modes, or with --policy")


def _split(text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise argparse.ArgumentTypeError(f"expected names with commas between them, got {text!r}")
    return list(dict.fromkeys(parts))


def _names(text: str) -> list[str]:
    return _split(text)


def _modes(text: str) -> tuple[str, ...]:
    given = _split(text)
    unknown = [name for name in given if name not in NAMES]
    if unknown:
        raise argparse.ArgumentTypeError(f"expected modes of {', '.join(NAMES)}, got {unknown[0]!r}")
    if DENSE not in given:
        raise argparse.ArgumentTypeError(f"expected dense among them, which the others are compared with, got {text!r}")
    return tuple(given)


def _alphas(text: str) -> tuple[float, ...]:
    return tuple(dict.fromkeys(_parser._alpha(part) for part in _split(text)))


def _seeds(text: str) -> tuple[int, ...]:
    seeds = tuple(_parser._seed(part) for part in _split(text))
    if max(seeds) >= 2**32:
        raise argparse.ArgumentTypeError(f"expected whole numbers below 2^32, got {text!r}")
    return seeds


def _limit(text: str) -> float:
    def fits(value: float) -> bool:
        return 0 < value < 1 or (1 <= value < math.inf and value == int(value))

    return _parser._number(text, float, fits, "a whole number >= 1, or a share between 0 and 1")


def _at_least_0(text: str) -> int:
    return int(_parser._number(text, int, lambda value: value >= 0, "a whole number >= 0"))


def _batch(text: str) -> int | str:
    if text == "auto":
        return text
    return int(_parser._number(text, int, lambda value: value >= 1, '"auto" or a whole number >= 1'))
