"""``void-ext trace``: generate with a traced model, show where its voids are and what tracing cost."""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from void_ext._files import check_output
from void_ext.cli import _parser, _report, _timing
from void_ext.cli._console import Terminal
from void_ext.plot import check_plot_path
from void_ext.timing import Comparison

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from void_ext.counters import Counters
    from void_ext.plan import VoidPlan
    from void_ext.trace import Trace


def run(arguments: argparse.Namespace, terminal: Terminal) -> int:
    _parser.check_sampling(arguments)
    _parser.check_outputs(arguments)
    prompt = read_prompt(arguments)
    run_and_report(arguments, terminal, prompt, alphas=[arguments.alpha])
    return 0


def read_prompt(arguments: argparse.Namespace) -> str:
    """The prompt of the command line, of a file or of stdin; never empty."""
    if arguments.prompt is not None:
        prompt, source = arguments.prompt, "--prompt"
    else:
        source = f"--prompt-file {arguments.prompt_file}"
        try:
            data = sys.stdin.buffer.read() if arguments.prompt_file == "-" else Path(arguments.prompt_file).read_bytes()
            prompt = data.decode().removeprefix("\ufeff")  # the byte order mark that some editors write
        except UnicodeDecodeError as error:
            raise ValueError(f"{source}: expected UTF-8 text, byte {error.start} is not") from None
        except OSError as error:
            raise type(error)(f"{source}: {error.strerror}") from None
    if not prompt.strip():
        raise ValueError(f"{source}: expected a prompt, got only white space")
    return str(prompt)


def check_outputs(arguments: argparse.Namespace) -> None:
    """Refuse before a model is loaded what could not be written after it has run."""
    if arguments.plot is not None:
        import matplotlib  # noqa: F401 - a missing one is worth knowing now

        check_plot_path(arguments.plot, what="--plot", force=arguments.force)
    if arguments.save is not None:
        if Path(arguments.save).suffix != ".safetensors":
            raise ValueError(f"--save: expected a name that ends in .safetensors, got {arguments.save!r}")
        check_output(arguments.save, what="--save", force=arguments.force)


def run_and_report(arguments: argparse.Namespace, terminal: Terminal, prompt: str, alphas: list[float]) -> None:
    """All of a run: check, load, generate, draw, save, time, print."""
    check_outputs(arguments)
    model, tokenizer = load_model(arguments, terminal)
    ids = encode(arguments, model, tokenizer, prompt)
    options = {"mode": arguments.mode, "granularity": arguments.granularity}
    generated = generate(arguments, terminal, model, tokenizer, ids, options)
    if not arguments.json:
        terminal.print(generated.answer)
        terminal.print()
    files = _write(arguments, terminal, generated.trace, tokenizer)
    found = _report.usages(generated.trace, alphas)
    if not arguments.json:
        _report.print_usage(found, terminal)
        terminal.print()
        _report.print_shares(found, terminal)
        rate = generated.tokens / generated.seconds
        terminal.print(f"traced: {generated.tokens} tokens in {generated.seconds:.3g} s ({rate:.3g} tokens/s)")
    timing = None if arguments.no_timing else _timing.measure(arguments, terminal, model, ids, options)
    if arguments.json:
        document = _document(arguments, generated, prompt, ids, found, timing, files)
        terminal.document(json.dumps(document, indent=2, ensure_ascii=not terminal.blocks, allow_nan=False))
        return
    if timing is not None:
        terminal.print(_report.describe_timing(timing, _timing.where(model)))
    for kind, path in files.items():
        terminal.print(f"{kind}: {path}")


def load_model(arguments: argparse.Namespace, terminal: Terminal) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and its tokenizer, with progress."""
    with terminal.waiting() as report:
        report("importing torch", 0, 0)
        from void_ext import _library
        from void_ext.models import is_local, load

        local = is_local(arguments.model)
        _library.load()
    # The hub's own bars show downloads, which may be long; two writers of one line would garble it.
    with terminal.waiting(live=local) as report:
        report("importing transformers", 0, 0)
        from transformers.utils import logging

        logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        if local:
            logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        return load(
            arguments.model,
            dtype=arguments.dtype,
            device=arguments.device,
            revision=arguments.revision,
            progress=report,
        )


def encode(
    arguments: argparse.Namespace, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str
) -> torch.Tensor:
    """Token ids ``[1, T]`` of the prompt, in the chat template where asked for."""
    has_template = getattr(tokenizer, "chat_template", None) is not None
    if arguments.chat and not has_template:
        raise ValueError(f"--chat: the tokenizer of {arguments.model!r} has no chat template; use --no-chat")
    if has_template if arguments.chat is None else arguments.chat:
        messages = [{"role": "user", "content": prompt}]
        encoded: Any = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        encoded = tokenizer(prompt, return_tensors="pt")
    ids: torch.Tensor = encoded["input_ids"]
    if ids.shape[1] == 0:
        raise ValueError("--prompt: the tokenizer made no token of it")
    limit = _timing.context(model)
    if limit is not None and ids.shape[1] + arguments.max_new_tokens > limit:
        raise ValueError(
            f"--max-new-tokens: the prompt's {ids.shape[1]} tokens and {arguments.max_new_tokens} new ones are more "
            f"than the {limit} positions of this model"
        )
    return ids.to(_timing.input_device(model))


@dataclass
class Generated:
    """What one run of a patched model gave."""

    trace: Trace
    answer: str
    ids: list[int]
    seconds: float
    forward: str
    counters: Counters | None
    plan: VoidPlan | None

    @property
    def tokens(self) -> int:
        return len(self.ids)


class _Counter:
    """A streamer (generate calls put and end) that only counts."""

    def __init__(self, report: Callable[[int], None]):
        self._report = report
        self._count = -1  # the prompt comes first

    def put(self, value: object) -> None:
        self._count += 1
        self._report(self._count)

    def end(self) -> None: ...


def generate(
    arguments: argparse.Namespace,
    terminal: Terminal,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: torch.Tensor,
    options: dict[str, Any],
    words: str = "generating",
) -> Generated:
    """Generate with the model patched with ``options``."""
    import torch
    import transformers

    config = copy.deepcopy(model.generation_config)
    config.max_new_tokens, config.max_length = arguments.max_new_tokens, None
    config.num_beams, config.do_sample = 1, arguments.sample
    config.temperature = arguments.temperature if arguments.sample else None
    config.top_p, config.top_k = (arguments.top_p, 0) if arguments.sample else (None, None)
    if config.pad_token_id is None:
        eos = config.eos_token_id
        config.pad_token_id = eos[0] if isinstance(eos, list) else eos
    if arguments.sample:
        transformers.set_seed(arguments.seed)
    with terminal.waiting() as report, _timing.patched(model, arguments, options) as handle:

        def count(done: int) -> None:
            report(words, done, arguments.max_new_tokens)

        count(0)
        start = time.perf_counter()
        run: Any = model.generate
        output = run(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            streamer=_Counter(count),
        )
        new = output[0, ids.shape[1] :].tolist()
        seconds = time.perf_counter() - start
        trace = handle.trace
        forward, counters, plan = handle.describe(), handle.counters, handle.plan
    answer = str(tokenizer.decode(new, skip_special_tokens=True)).strip()
    return Generated(trace, answer, new, seconds, forward, counters, plan)


def _write(
    arguments: argparse.Namespace, terminal: Terminal, trace: Trace, tokenizer: PreTrainedTokenizerBase
) -> dict[str, str]:
    files = {}
    with terminal.waiting() as report:
        if arguments.plot is not None:
            report("drawing", 0, 0)
            files["picture"] = str(trace.plot(arguments.plot, tokenizer=tokenizer, force=arguments.force))
        if arguments.save is not None:
            report("saving", 0, 0)
            files["trace"] = str(trace.save(arguments.save, tokens=not arguments.no_tokens, force=arguments.force))
    return files


def _document(
    arguments: argparse.Namespace,
    generated: Generated,
    prompt: str,
    ids: torch.Tensor,
    found: list[_report.Usage],
    timing: Comparison | None,
    files: dict[str, str],
) -> dict[str, Any]:
    import torch

    import void_ext

    trace = generated.trace
    return {
        "void_ext": void_ext.__version__,
        "torch": torch.__version__,
        "model": trace.model_name,
        "model_type": trace.model_type,
        "forward": generated.forward.splitlines(),
        "mode": arguments.mode,
        "alpha": arguments.alpha,
        "granularity": arguments.granularity,
        "fuse": arguments.fuse,
        "prompt": prompt,
        "prompt_tokens": ids.shape[1],
        "answer": generated.answer,
        "new_tokens": generated.tokens,
        "seconds": generated.seconds,
        "usage": [{**asdict(usage), "void_share": usage.void_share} for usage in found],
        "timing": timing and {**timing.to_dict(), "resolved": timing.resolves()},
        "files": files,
    }
