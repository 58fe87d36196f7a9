"""``void-ext eval``: scores, differences and usage of a model in several modes on tasks of lm-evaluation-harness."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from void_ext._options import alpha_text
from void_ext.cli import _eval_parser, _generate, _protocol, _run
from void_ext.cli._console import Terminal
from void_ext.evaluate.cells import CELLS, CellStore
from void_ext.evaluate.modes import EXIT, SKIP, ModeSpec
from void_ext.evaluate.protocol.presets import resolve_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from void_ext.evaluate.processes import Processes
    from void_ext.evaluate.protocol.runs import Protocol
    from void_ext.evaluate.settings import Settings, TaskRun
    from void_ext.plan import VoidPlan


def run(arguments: argparse.Namespace, terminal: Terminal) -> int:
    _eval_parser.check_eval(arguments)
    arguments.model = resolve_model(arguments.model)
    from void_ext.evaluate.settings import require_harness

    require_harness()
    # All that can be refused is refused before the model is read.
    with _processes(arguments, terminal) as processes, _store(arguments, processes) as store:
        return _evaluate(arguments, terminal, processes, store)


def _store(arguments: argparse.Namespace, processes: Processes) -> contextlib.AbstractContextManager[CellStore | None]:
    """The first process's, until the results are written too."""
    return contextlib.nullcontext() if processes.rank else CellStore(arguments.out, force=arguments.force)


def _evaluate(arguments: argparse.Namespace, terminal: Terminal, processes: Processes, store: CellStore | None) -> int:
    from void_ext.evaluate.runner import run_with

    plans = _read_plans(arguments)
    settings = _settings(arguments)
    protocol = None if arguments.protocol is None else _protocol.build(arguments, terminal)
    tasks = _load_tasks(arguments, terminal) if protocol is None else protocol.entries
    processes.gather(None)
    model, tokenizer = _run.load_model(arguments, terminal)
    if protocol is not None:
        _protocol.check_model(protocol, model, tokenizer, arguments, terminal)
    modes = _modes(arguments, model, plans)
    with _telling_what_is_kept(store, terminal), terminal.waiting() as progress:
        report = run_with(
            processes,
            model,
            tokenizer,
            tasks,
            modes,
            settings,
            store=store,
            config=_config(arguments, protocol),
            progress=progress,
        )
        if processes.rank:
            return 0
        progress("writing the results", 0, 0)
        files = report.save(arguments.out, force=True)
        if protocol is not None:
            files |= _protocol.write(protocol, report, arguments)
    if arguments.json:
        document = {**report.to_dict(), "files": {name: str(path) for name, path in files.items()}}
        if protocol is not None:
            document["protocol"] = json.loads(files["protocol"].read_text(encoding="utf-8"))
        terminal.document(json.dumps(document, indent=1, ensure_ascii=not terminal.blocks, allow_nan=False))
        return 0
    terminal.document(report.markdown() if protocol is None else files["protocol table"].read_text(encoding="utf-8"))
    for name, path in files.items():
        terminal.print(f"{name}: {path}")
    return 0


@contextlib.contextmanager
def _processes(arguments: argparse.Namespace, terminal: Terminal) -> Iterator[Processes]:
    """Those that accelerate or torchrun started, each with its device in ``arguments``; the first one has the word."""
    from void_ext.evaluate.processes import Processes, joined, launched, started

    if not launched():
        yield Processes()
        return
    processes = Processes()
    try:
        with started(arguments.device) as arguments.device, joined() as processes:
            terminal.hush(processes.rank > 0)
            yield processes
    except Exception:
        if not processes.told:  # else the first one says it
            terminal.hush(False)
        raise


@contextlib.contextmanager
def _telling_what_is_kept(store: CellStore | None, terminal: Terminal) -> Iterator[None]:
    try:
        yield
    except BaseException:
        # Before that, what lies there is of another run, or will be thrown away.
        if store is not None and store.begun and (kept := len(list((store.directory / CELLS).glob("*.json")))):
            without = " without --force" * store.force
            terminal.note(f"{kept} finished in {store.directory}; the same command{without} goes on from there")
        raise


def _read_plans(arguments: argparse.Namespace) -> dict[str, VoidPlan]:
    """The plan files by what they are called in the report: their name, or all of their path where two share one."""
    paths = list(dict.fromkeys(arguments.plan or ()))
    names = [Path(path).stem for path in paths]
    return {
        name if names.count(name) == 1 else path: _generate.load_plan(path)
        for name, path in zip(names, paths, strict=True)
    }


def _settings(arguments: argparse.Namespace) -> Settings:
    from void_ext.evaluate.settings import Settings

    return Settings(
        batch_size=arguments.batch_size,
        limit=arguments.limit,
        seeds=arguments.seeds or (0,),
        alpha=arguments.alpha[0],
        fuse=arguments.fuse,
        num_fewshot=arguments.num_fewshot,
        apply_chat_template=arguments.chat,
        system_instruction=arguments.system,
        unsafe_code=arguments.allow_task_code,
    )


def _load_tasks(arguments: argparse.Namespace, terminal: Terminal) -> dict[str, TaskRun]:
    from void_ext.evaluate.tasks import load_tasks

    with terminal.waiting() as progress:
        progress("importing lm-eval", 0, 0)
        return load_tasks(arguments.tasks, arguments.task_path, allow_code=arguments.allow_task_code, progress=progress)


def _modes(arguments: argparse.Namespace, model: PreTrainedModel, plans: dict[str, VoidPlan]) -> list[ModeSpec]:
    granularity = arguments.granularity or "token"
    found = [ModeSpec.dense(arguments.alpha[0])]
    if EXIT in arguments.modes:
        found += [ModeSpec.exit(alpha, granularity=granularity) for alpha in arguments.alpha]
    if SKIP in arguments.modes:
        found += _skip_modes(arguments, model, plans)
    return found


def _skip_modes(arguments: argparse.Namespace, model: PreTrainedModel, plans: dict[str, VoidPlan]) -> list[ModeSpec]:
    first, force = arguments.alpha[0], arguments.force_plan
    if plans:
        return [
            ModeSpec.skip(plan=plan, label=f"skip {name}", alpha=first, force=force) for name, plan in plans.items()
        ]
    if arguments.policy is None:
        options = _generate.skip_options(arguments, model, None)
        return [ModeSpec.skip(plan=options["plan"], label=f"skip {_described(arguments)}", alpha=first, force=force)]
    names = ("budget", "at_least", "every", "signal", "protect", "granularity")
    config = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    label = "skip " + " ".join((arguments.policy, *(f"{name}={_said(value)}" for name, value in config.items())))
    found = []
    for alpha in arguments.alpha:
        options = _generate.skip_options(argparse.Namespace(**{**vars(arguments), "alpha": alpha}), model, None)
        given = {**config, "alpha": alpha}
        found.append(
            ModeSpec.skip(policy=options["policy"], config=given, label=f"{label} α={alpha_text(alpha)}", alpha=alpha)
        )
    return found


def _said(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    return format(value, "g") if isinstance(value, float) else str(value)


def _described(arguments: argparse.Namespace) -> str:
    """The layers of ``--skip`` and its kin in a few words."""
    words = []
    for name, what in (("skip", "layers"), ("skip_attention", "attention"), ("skip_mlp", "MLP")):
        layers = getattr(arguments, name)
        if layers:
            words.append(f"{what} {','.join(map(str, layers))}")
    if arguments.phase not in (None, "both"):
        words.append(f"in the {arguments.phase}")
    return " ".join(words)


def _config(arguments: argparse.Namespace, protocol: Protocol | None) -> dict[str, Any]:
    known = {} if protocol is None else dict(protocol.config)
    return {**known, "revision": arguments.revision} if arguments.revision else known
