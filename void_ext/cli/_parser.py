"""The command line: what can be asked, and values refused before anything heavy is imported."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import void_ext
from void_ext import _options

ALPHA = 0.8
MAX_NEW_TOKENS = 50
_DIGITS = 4  # of a layer's number
PLAN_HELP = "a plan, as VoidPlan.save or --save-plan wrote it"
_SIGNALS = ("delta", "abs_delta", "relative_update", "cosine")


def build_parser() -> argparse.ArgumentParser:
    """The parser; ``arguments.run(arguments, terminal)`` runs the command that was chosen."""
    parser = argparse.ArgumentParser(
        prog="void-ext", description="Which layers of a language model did nothing for a token (its voids)."
    )
    parser.add_argument("--version", action="version", version=f"void-ext {void_ext.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{info,trace,generate,plan,eval,demo}")
    _add_info(commands.add_parser("info", help="what this build is and what it runs on"))
    _add_trace(commands.add_parser("trace", help="generate with a model and show which layers were active"))
    _add_generate(commands.add_parser("generate", help="generate with layers skipped, beside the dense answer"))
    _add_plan(
        commands.add_parser("plan", help="search which layers can go, measured on a text, and save the best plan")
    )
    _add_eval(commands.add_parser("eval", help="what skipping does to answers, on tasks of lm-evaluation-harness"))
    _add_demo(commands.add_parser("demo", help="the same on a small model from PyPI, with a picture"))
    return parser


def _add_info(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_lazy("_info"))
    _add_common(parser)


def _add_trace(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_lazy("_run"), parser=parser)
    _add_model(parser)
    _add_tracing(parser)
    _add_generation(parser)
    _add_outputs(parser)
    _add_common(parser)


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_lazy("_generate"), parser=parser)
    _add_model(parser)
    group = parser.add_argument_group("skipping (a plan file, layers, or a policy)")
    group.add_argument("--plan", metavar="FILE", help=PLAN_HELP)
    add_skipping(group)
    group.add_argument("--save-plan", metavar="FILE", help="keep the plan that was in force at the end, as JSON")
    _add_judging(group)
    _add_generation(parser)
    group = parser.add_argument_group("results")
    group.add_argument("--force", action="store_true", help="replace files that exist")
    group.add_argument("--no-timing", action="store_true", help="do not compare the speed with the unpatched model")
    _add_common(parser)


def _add_eval(parser: argparse.ArgumentParser) -> None:
    from void_ext.cli._eval_parser import add_eval

    parser.set_defaults(run=_lazy("_eval"), parser=parser)
    add_eval(parser)
    _add_common(parser)


def add_skipping(group: argparse._ArgumentGroup, granularity: str = "with a policy: one verdict per … (token)") -> None:
    """What to skip, but for ``--plan``: which layers, or a policy with its options; see :func:`check_skipping`."""
    group.add_argument("--skip", type=_layers, metavar="L,L-L", help="whole layers, such as 4,9-12")
    group.add_argument("--skip-attention", type=_layers, metavar="L,L-L", help="attention halves")
    group.add_argument("--skip-mlp", type=_layers, metavar="L,L-L", help="MLP halves")
    group.add_argument("--phase", choices=("both", "prompt", "response"), help="where layers are skipped (both)")
    group.add_argument(
        "--policy",
        choices=("prompt", "refresh", "halt"),
        help="prompt: the prompt's voids decide; refresh: every k-th token decides; halt: at a token's first void",
    )
    group.add_argument("--every", type=_every, metavar="K", help="with --policy refresh (default 8)")
    group.add_argument("--budget", type=_positive, metavar="N", help="with a policy: at most so many layers")
    group.add_argument("--at-least", type=_positive, metavar="N", help="with a policy: at least so many layers")
    group.add_argument("--granularity", choices=_options.GRANULARITIES, help=granularity)
    group.add_argument("--signal", choices=_SIGNALS, help="with a policy: what ranks layers (default delta)")
    group.add_argument("--protect", type=_layers, metavar="L,L-L", help="with a policy: layers that always run")
    group.add_argument("--force-plan", action="store_true", help="take a plan made for another checkpoint")


def _add_plan(parser: argparse.ArgumentParser) -> None:
    from void_ext.cli._plan_parser import add_plan

    parser.set_defaults(run=_lazy("_plan"), parser=parser)
    add_plan(parser)
    _add_common(parser)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a local directory, a hub id, or `smollm2` (from PyPI alone)")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="what the model is asked")
    prompt.add_argument("--prompt-file", metavar="FILE", help="a UTF-8 file with the prompt; - reads stdin")
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_lazy("_demo"), parser=parser, model="smollm2", revision=None)
    parser.add_argument("--prompt", metavar="TEXT", help="another question than the built-in one")
    _add_tracing(parser)
    _add_generation(parser)
    _add_outputs(parser, where="default: ./void-demo.{}, or the next free number")
    _add_common(parser)


def _add_tracing(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("tracing")
    _add_judging(group)
    group.add_argument(
        "--mode", choices=("trace", "exit"), default="trace", help="exit: early exit, as the paper's code"
    )
    group.add_argument(
        "--granularity", choices=_options.GRANULARITIES, default="token", help="one verdict per … (token)"
    )


def _add_judging(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--alpha", type=_alpha, default=ALPHA, metavar="A", help=f"threshold factor >= 0 (default {ALPHA})"
    )
    group.add_argument(
        "--fuse", choices=_options.FUSES, default="add", help="add: bit-identical; norm: fuses RMSNorm too"
    )


def _add_generation(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("generating")
    group.add_argument(
        "--max-new-tokens", type=_count, default=MAX_NEW_TOKENS, metavar="N", help=f"default {MAX_NEW_TOKENS}"
    )
    group.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="put the prompt into the tokenizer's chat template (default: if it has one)",
    )
    group.add_argument("--sample", action="store_true", help="sample instead of taking the likeliest token")
    group.add_argument("--temperature", type=_positive, metavar="T", help="with --sample (default 0.6)")
    group.add_argument("--top-p", type=_share, metavar="P", help="with --sample (default 0.9)")
    group.add_argument("--seed", type=_seed, metavar="S", help="with --sample (default 0)")
    group.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as stored")
    group.add_argument("--device", help="cpu, cuda, cuda:N, auto (default: the first GPU, else the CPU)")


def _add_outputs(parser: argparse.ArgumentParser, where: str = "") -> None:
    group = parser.add_argument_group("results")
    group.add_argument("--plot", metavar="FILE", help=f"draw the trace: .png, .svg or .pdf {_note(where, 'png')}")
    group.add_argument("--save", metavar="FILE", help=f"keep the trace: .safetensors {_note(where, 'safetensors')}")
    group.add_argument("--no-tokens", action="store_true", help="leave the token ids out of the saved trace")
    group.add_argument("--force", action="store_true", help="replace files that exist")
    group.add_argument("--no-timing", action="store_true", help="do not compare the speed with the unpatched model")


def _note(where: str, suffix: str) -> str:
    return f"({where.format(suffix)})" if where else ""


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def check_sampling(arguments: argparse.Namespace) -> None:
    """End with a usage error where sampling options came without ``--sample``; fill in their defaults."""
    for name, default in (("temperature", 0.6), ("top_p", 0.9), ("seed", 0)):
        if getattr(arguments, name) is None:
            setattr(arguments, name, default)
        elif not arguments.sample:
            option = name.replace("_", "-")
            arguments.parser.error(f"argument --{option}: only means something together with --sample")


def check_outputs(arguments: argparse.Namespace) -> None:
    """End with a usage error where an option about files came and no file is written."""
    if arguments.no_tokens and arguments.save is None:
        arguments.parser.error("argument --no-tokens: only means something together with --save")
    if arguments.force and arguments.save is None and arguments.plot is None:
        arguments.parser.error("argument --force: only means something together with --save or --plot")


def check_skipping(arguments: argparse.Namespace, *, granularity: bool = True) -> None:
    """End with a usage error unless exactly one way of saying what to skip was used, with its own options.

    ``granularity`` says that this option is the policies' alone.
    """
    layers = [name for name in ("skip", "skip_attention", "skip_mlp") if getattr(arguments, name) is not None]
    ways = [name for name, used in (("plan", arguments.plan), ("skip", layers), ("policy", arguments.policy)) if used]
    if len(ways) != 1:
        got = " and ".join(f"--{name}" for name in ways) or "none"
        arguments.parser.error(f"expected one of --plan, --skip (or --skip-attention, --skip-mlp), --policy; got {got}")
    needs = {"every": arguments.policy == "refresh", "phase": bool(layers)}
    of_policies = ("budget", "protect", "signal", *(("granularity",) if granularity else ()))
    needs |= dict.fromkeys(of_policies, arguments.policy is not None)
    needs["at_least"] = arguments.policy in ("prompt", "refresh")
    for name, fits in needs.items():
        if getattr(arguments, name) is not None and not fits:
            way = f"--{ways[0]} {arguments.policy or ''}".rstrip()
            arguments.parser.error(f"argument --{name.replace('_', '-')}: has no meaning with {way}")


def _lazy(module: str) -> Callable[..., int]:
    def run(*arguments: object) -> int:
        from importlib import import_module

        code: int = import_module(f"void_ext.cli.{module}").run(*arguments)
        return code

    return run


def _number(text: str, kind: Callable[[str], float], fits: Callable[[float], bool], expected: str) -> float:
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not fits(value):
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
    return value


def _alpha(text: str) -> float:
    _number(text, float, lambda value: math.isfinite(value) and value >= 0, "a finite number >= 0")
    largest = _options.LARGEST
    return _number(text, float, lambda value: value <= largest, f"at most {largest}, the largest number of float32")


def _positive(text: str) -> float:
    return _number(text, float, lambda value: math.isfinite(value) and value > 0, "a finite number > 0")


def _share(text: str) -> float:
    return _number(text, float, lambda value: 0 < value <= 1, "a number above 0, up to 1")


def _count(text: str) -> int:
    return int(_number(text, int, lambda value: value >= 1, "a whole number >= 1"))


def _every(text: str) -> int:
    return int(_number(text, int, lambda value: value >= 3, "a whole number >= 3"))


def _layers(text: str) -> list[int]:
    """``4,9-12`` → [4, 9, 10, 11, 12]."""
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise argparse.ArgumentTypeError(f"expected layers such as 4,9-12, got {text!r}")
        # The model is not known yet: what no model has is refused before a range of it is written out.
        if max(len(first), len(last)) > _DIGITS:
            raise argparse.ArgumentTypeError(f"expected numbers of at most {_DIGITS} digits, got {part.strip()!r}")
        low, high = int(first), int(last or first)
        if low > high:
            raise argparse.ArgumentTypeError(
                f"expected the smaller number first, as in {high}-{low}, got {part.strip()!r}"
            )
        found.extend(range(low, high + 1))
    return found


def _seed(text: str) -> int:
    return int(_number(text, int, lambda value: 0 <= value < 2**63, "a whole number from 0 to 2^63 - 1"))
