"""``void-ext generate``: an answer with layers skipped beside the dense one: text, what was launched, time."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from void_ext._files import check_output
from void_ext.cli import _parser, _report, _run, _timing
from void_ext.cli._console import Terminal
from void_ext.timing import Comparison

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from void_ext.counters import PhaseCounters
    from void_ext.plan import VoidPlan


def run(arguments: argparse.Namespace, terminal: Terminal) -> int:
    _parser.check_sampling(arguments)
    _parser.check_skipping(arguments)
    if arguments.force and arguments.save_plan is None:
        arguments.parser.error("argument --force: only means something together with --save-plan")
    prompt = _run.read_prompt(arguments)
    if arguments.save_plan is not None:
        check_output(arguments.save_plan, what="--save-plan", force=arguments.force)
    plan = _read_plan(arguments)  # before the model: a damaged file is found in no time
    model, tokenizer = _run.load_model(arguments, terminal)
    ids = _run.encode(arguments, model, tokenizer, prompt)
    options = skip_options(arguments, model, plan)
    with _timing.patched(model, arguments, options):
        pass  # a plan or a policy that does not fit this model is refused now, not after the dense answer
    dense = _run.generate(arguments, terminal, model, tokenizer, ids, {"mode": "trace"}, "generating, all layers")
    skipping = _run.generate(arguments, terminal, model, tokenizer, ids, options, "generating, skipping")
    assert skipping.counters is not None
    assert skipping.plan is not None
    if arguments.save_plan is not None:
        skipping.plan.save(arguments.save_plan, force=arguments.force)
    same = _same(dense.ids, skipping.ids)
    if not arguments.json:
        _print(terminal, dense, skipping, same)
    timing = None if arguments.no_timing else _timing.measure(arguments, terminal, model, ids, options)
    if arguments.json:
        document = _document(arguments, prompt, dense, skipping, same, timing)
        terminal.document(json.dumps(document, indent=2, ensure_ascii=not terminal.blocks, allow_nan=False))
        return 0
    if timing is not None:
        terminal.print(_report.describe_timing(timing, _timing.where(model)))
    if arguments.save_plan is not None:
        terminal.print(f"plan: {arguments.save_plan}")
    return 0


def _read_plan(arguments: argparse.Namespace) -> VoidPlan | None:
    return None if arguments.plan is None else load_plan(arguments.plan)


def load_plan(path: str) -> VoidPlan:
    """The plan in a file that ``--plan`` names, which errors name too."""
    from void_ext.plan import VoidPlan

    try:
        return VoidPlan.load(path)
    except (OSError, ValueError) as error:
        raise type(error)(f"--plan: {str(error).removeprefix('path: ')}") from None


def skip_options(arguments: argparse.Namespace, model: PreTrainedModel, plan: VoidPlan | None) -> dict[str, Any]:
    """The options of ``void_ext.patch`` that the command line asks for."""
    from void_ext import policies
    from void_ext.plan import VoidPlan

    if plan is None and arguments.policy is None:
        plan = VoidPlan.from_layers(
            model,
            skip=arguments.skip or (),
            attention=arguments.skip_attention or (),
            mlp=arguments.skip_mlp or (),
            phase=arguments.phase or "both",
        )
    if plan is not None:
        return {"mode": "skip", "plan": plan, "force": arguments.force_plan}
    bounds = {"alpha": arguments.alpha, "protect": tuple(arguments.protect or ())}
    if arguments.policy == "halt":
        bounds |= {"signal": arguments.signal or "delta", "granularity": arguments.granularity or "token"}
        return {"mode": "skip", "policy": policies.HaltPlan(budget=arguments.budget, **bounds)}
    bounds |= {"signal": arguments.signal or "delta", "budget": arguments.budget, "at_least": arguments.at_least}
    bounds |= {"granularity": arguments.granularity or "token"}
    if arguments.policy == "refresh":
        return {"mode": "skip", "policy": policies.RefreshPlan(every=arguments.every or 8, **bounds)}
    return {"mode": "skip", "policy": policies.PromptPlan(**bounds)}


def _same(dense: list[int], skipping: list[int]) -> int:
    """How many tokens are the same before the first that differs."""
    pairs = zip(dense, skipping, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(dense), len(skipping)))


def _print(terminal: Terminal, dense: _run.Generated, skipping: _run.Generated, same: int) -> None:
    for title, generated in (("all layers", dense), ("skipping", skipping)):
        rate = generated.tokens / generated.seconds
        terminal.print(f"{title}: {generated.tokens} tokens in {generated.seconds:.3g} s ({rate:.3g} tokens/s)", "bold")
        terminal.print(generated.answer)
        terminal.print()
    assert skipping.plan is not None
    assert skipping.counters is not None
    terminal.print(skipping.plan.describe())
    terminal.print()
    for name in ("prompt", "response"):
        counted = getattr(skipping.counters, name)
        if counted.calls:
            terminal.print(f"{name}: {_counted(counted)}")
    terminal.print(_compared(same, dense.ids == skipping.ids))


def _compared(same: int, whole: bool) -> str:
    """Two answers of which the first ``same`` tokens are the same, or, ``whole``, all of both."""
    if whole:
        return "the two answers are the same"
    if not same:
        return "the two answers differ from the first token on"
    return f"the first {same} tokens are the same" if same > 1 else "the first token is the same"


def _counted(counted: PhaseCounters) -> str:
    attention = counted.attention_run + counted.attention_projected + counted.attention_skipped
    mlp = counted.mlp_run + counted.mlp_skipped
    words = [
        f"{counted.calls} forward call{'s' * (counted.calls != 1)}",
        f"attention halves {counted.attention_run} of {attention} run"
        + (f", {counted.attention_projected} projected" if counted.attention_projected else ""),
        f"MLP halves {counted.mlp_run} of {mlp} run",
        f"{counted.weight_bytes / 1e6:.4g} MB of layer weights read",
    ]
    if counted.rows_computed != counted.rows_needed:
        words.append(f"{counted.rows_needed} rows needed, {counted.rows_computed} computed")
    return "; ".join(words)


def _document(
    arguments: argparse.Namespace,
    prompt: str,
    dense: _run.Generated,
    skipping: _run.Generated,
    same: int,
    timing: Comparison | None,
) -> dict[str, Any]:
    import torch

    import void_ext

    assert skipping.counters is not None
    assert skipping.plan is not None
    trace = skipping.trace
    return {
        "void_ext": void_ext.__version__,
        "torch": torch.__version__,
        "model": trace.model_name,
        "model_type": trace.model_type,
        "prompt": prompt,
        "policy": arguments.policy or "static",
        "plan": skipping.plan.to_dict(),
        "dense": {"answer": dense.answer, "new_tokens": dense.tokens, "seconds": dense.seconds},
        "skipping": {"answer": skipping.answer, "new_tokens": skipping.tokens, "seconds": skipping.seconds},
        "same_tokens": same,
        "counters": skipping.counters.to_dict(),
        "timing": timing and {**timing.to_dict(), "resolved": timing.resolves()},
    }
