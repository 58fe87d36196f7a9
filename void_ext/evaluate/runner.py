"""Runs every task in every mode with every seed, one cell after the other, and keeps what is finished."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from void_ext.counters import Counters
from void_ext.evaluate.cells import Cell, CellStore, Item, differences, plain, restored
from void_ext.evaluate.configuration import configuration_of, environment_of, requests_digest
from void_ext.evaluate.modes import ModeSpec, check_modes
from void_ext.evaluate.processes import Processes, joined
from void_ext.evaluate.report import Report, TaskInfo
from void_ext.evaluate.settings import Settings, TaskRun, check_tasks, require_harness
from void_ext.evaluate.statistics import Metric
from void_ext.evaluate.tally import PhaseUsage, pool
from void_ext.models._common import Progress, silent
from void_ext.patching.structure import UnsupportedModelError, sharded
from void_ext.store import PHASES

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from void_ext.evaluate.harness import WatchedLM


def run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Mapping[str, Any],
    modes: Sequence[ModeSpec],
    settings: Settings | None = None,
    *,
    directory: str | Path | CellStore | None = None,
    config: Mapping[str, Any] | None = None,
    progress: Progress = silent,
    share: bool = True,
) -> Report:
    """Evaluate ``model`` on ``tasks`` in every mode, with the same documents, requests and seeds.

    In a program that accelerate or torchrun runs as several processes, each with the whole model, every process calls
    this with the same arguments; they share the work, and each gets the report that one alone would have made. See
    docs/evaluate.md.

    Args:
        model: loaded, not patched; it is patched for each cell and left as it was.
        tasks: name in the report -> lm-eval task, or :class:`TaskRun`.
        modes: at least a dense one.
        directory: keeps finished cells; a later call with the same configuration goes on from them. Of several
            processes the first alone looks into it and writes.
        config: whatever of JSON else belongs to the configuration.
        progress: called as ``progress(what, done, total)``; of several processes in the first alone.
        share: with the other processes of an initialized torch.distributed, all of which must call this; False: this
            one runs alone. Processes that hold one model between them (tensor parallel) share nothing: each answers
            every request, together with the others, and needs a ``directory`` of its own, if any.

    Raises:
        ModuleNotFoundError: lm-eval is not installed.
        ValueError, TypeError: an argument is not what was expected, or ``directory`` holds another run, or one is at
            work in it.
        UnsupportedModelError: a mode that this model cannot run in, or weights sharded by FSDP; before any request is
            answered.
        OSError: a finished cell cannot be written; those before it are kept.
        PeerError: another of the processes that share the work failed.
    """
    with (
        joined(model) if share else contextlib.nullcontext(Processes()) as processes,
        _store(directory, processes) as store,
    ):
        return run_with(
            processes, model, tokenizer, tasks, modes, settings, store=store, config=config, progress=progress
        )


def _store(directory: str | Path | CellStore | None, processes: Processes) -> AbstractContextManager[CellStore | None]:
    """What keeps cells: of the first process alone, whose files they are."""
    if directory is None or processes.rank:
        return contextlib.nullcontext()
    return directory if isinstance(directory, CellStore) else CellStore(directory)


def run_with(
    processes: Processes,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Mapping[str, Any],
    modes: Sequence[ModeSpec],
    settings: Settings | None = None,
    *,
    store: CellStore | None = None,
    config: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> Report:
    """:func:`run` in processes that are joined already; ``store`` in the first one alone, whose caller closes it."""
    require_harness()
    settings = Settings() if settings is None else settings
    modes = check_modes(modes)
    entries = check_tasks(tasks)
    if (module := sharded(model)) is not None:
        raise UnsupportedModelError(
            f"model: cannot be evaluated with weights sharded by FSDP ({type(module).__name__}); give every process "
            "the whole model, and they share the work"
        )
    if settings.apply_chat_template and getattr(tokenizer, "chat_template", None) is None:
        raise ValueError("apply_chat_template: this tokenizer has no chat template; leave it out, or give it one")
    if processes.rank:
        progress = silent
    _try_modes(model, modes, settings)

    from void_ext.evaluate import harness

    with harness.quiet():
        lm = harness.WatchedLM(model, tokenizer, processes=processes)
        infos, longest = {}, 1
        for name, entry in entries.items():
            progress("building the requests", 0, 0)
            infos[name], length = _survey(lm, name, entry, settings)
            longest = max(longest, length)
        size = settings.batch_size
        if size == "auto":
            earlier = processes.of_first(None if store is None else store.batch_size)
            size = earlier or min(processes.gather(harness.choose_batch_size(lm, min(longest, lm.max_length))))
        size = lm.batch_size_per_gpu = int(size)
        configuration = configuration_of(model, infos, modes, settings, config)
        _check_same(processes, configuration)
        done = processes.of_first({} if store is None else store.begin(configuration, size))
        alphas = tuple(dict.fromkeys((settings.alpha, *(mode.alpha for mode in modes))))
        cells: list[Cell] = []
        for name, entry in entries.items():
            for seed in infos[name].seeds:
                for mode in modes:
                    cell = done.get((name, mode.label, seed))
                    if cell is None:
                        cell = _run_cell(lm, name, entry, mode, seed, settings, alphas, progress)
                        if store is not None:
                            store.add(cell)
                        cell = processes.of_first(cell)  # what this one scored by chance or by the clock may differ
                    cells.append(cell)
    return Report(
        cells=cells,
        tasks=infos,
        modes=list(modes),
        configuration=configuration,
        environment=environment_of(model, size, processes.size),
        confidence=settings.confidence,
    )


# ---- before anything runs ----


def _try_modes(model: PreTrainedModel, modes: Sequence[ModeSpec], settings: Settings) -> None:
    """Patch once for each mode: a plan for another model is found before the first request, not after hours."""
    for mode in modes:
        with _patched(model, mode, settings):
            pass


def _check_same(processes: Processes, configuration: Mapping[str, Any]) -> None:
    """ValueError, in every process, where they are about to run different things."""
    for rank, other in enumerate(processes.gather(configuration)):
        if other != configuration:
            raise ValueError(
                f"share: expected the same model, tasks, modes and settings in all {processes.size} processes; process "
                f"{rank} and this one, {processes.rank}, differ ({differences(other, configuration)}). share=False "
                "lets each of them run by itself"
            )


def _patched(model: PreTrainedModel, mode: ModeSpec, settings: Settings) -> Any:
    import void_ext

    return void_ext.patch(model, alpha=mode.alpha, fuse=settings.fuse, **copy.copy(dict(mode.options)))


def _survey(lm: WatchedLM, name: str, entry: TaskRun, settings: Settings) -> tuple[TaskInfo, int]:
    """What identifies a task's requests, and how many tokens its longest has."""
    task = entry.task
    seeds = settings.seeds if entry.seeds is None else entry.seeds
    with _prepared(entry, settings, seeds[0]):
        if getattr(task, "UNSAFE_CODE", False) and not settings.unsafe_code:
            raise ValueError(
                f"tasks: {name!r} runs code that the model writes; unsafe_code (--allow-task-code) lets it"
            )
        task.build_all_requests(**_how_to_build(lm, task, settings))
        texts, room = [], 0
        for instance in task.instances:
            texts.append(" ".join(part for part in instance.args if isinstance(part, str)))
            room = max([room, *(int(p.get("max_gen_toks", 256)) for p in instance.args if isinstance(p, dict))])
        # The text of most characters stands for the one of most tokens: this only guides the choice of a batch size.
        longest = len(lm.tok_encode(max(texts, key=len))) + room
        documents = len({instance.doc_id for instance in task.instances})
        info = TaskInfo(
            name=name,
            group=entry.group,
            seeds=tuple(seeds),
            documents=documents,
            requests_sha256=requests_digest(task),
            config=_config_of(task),
            generation=dict(entry.generation or {}),
            metrics=_Metrics(task),
            higher_is_better={key: bool(better) for key, better in (task.higher_is_better() or {}).items()},
        )
    return info, longest


def _config_of(task: Any) -> dict[str, Any]:
    try:
        config = task.dump_config()
    except (AttributeError, TypeError):
        config = {"class": type(task).__qualname__}
    return dict(plain(config))


class _Metrics(dict[str, Metric]):
    """``metric`` or ``metric,filter`` -> how its documents' values become one number."""

    def __init__(self, task: Any):
        super().__init__()
        self._aggregations = task.aggregation()

    def __missing__(self, key: str) -> Metric:
        from lm_eval.api import metrics

        function = self._aggregations.get(key.split(",")[0], metrics.mean)
        name = getattr(function, "__name__", type(function).__name__)
        known = getattr(metrics, name, None) is function
        self[key] = Metric(name if known else f"{name} of the task", function)
        return self[key]


def _how_to_build(lm: WatchedLM, task: Any, settings: Settings) -> dict[str, Any]:
    from lm_eval.evaluator_utils import get_sample_size

    chat = settings.apply_chat_template
    return {
        "limit": get_sample_size(task, settings.limit),
        "rank": 0,
        "world_size": 1,
        "system_instruction": settings.system_instruction,
        "apply_chat_template": chat,
        "fewshot_as_multiturn": chat,
        "chat_template": lm.apply_chat_template if chat else None,
        "tokenizer_name": lm.tokenizer_name if chat else "",
    }


@contextlib.contextmanager
def _prepared(entry: TaskRun, settings: Settings, seed: int) -> Iterator[None]:
    """The task with this entry's settings; as it was afterwards, for the next entry may share it."""
    from transformers import set_seed

    task = entry.task
    generation, shots = copy.deepcopy(task.get_config("generation_kwargs")), task.get_config("num_fewshot")
    try:
        if entry.generation:
            task.set_config("generation_kwargs", {**(generation or {}), **entry.generation})
        if shots is None or (settings.num_fewshot is not None and shots != 0):
            task.set_config("num_fewshot", settings.num_fewshot or 0)
        set_seed(seed)
        task.set_fewshot_seed(seed)
        yield
    finally:
        task.set_config("generation_kwargs", generation)
        task.set_config("num_fewshot", shots)


# ---- one cell ----


def _run_cell(
    lm: WatchedLM,
    name: str,
    entry: TaskRun,
    mode: ModeSpec,
    seed: int,
    settings: Settings,
    alphas: tuple[float, ...],
    progress: Progress,
) -> Cell:
    import torch
    from lm_eval.evaluator import evaluate

    from void_ext.evaluate.tally import Tally

    tally = Tally(alphas)
    chat = settings.apply_chat_template
    what = f"{name} · {mode.label}" + (f" · seed {seed}" if len(entry.seeds or settings.seeds) > 1 else "")
    with (
        _prepared(entry, settings, seed),
        _patched(lm.model, mode, settings) as handle,
        lm.watching(handle, tally, what, progress),
    ):
        try:
            results = evaluate(
                lm,
                {"tasks": {name: entry.task}, "groups": {}},
                limit=settings.limit,
                bootstrap_iters=0,
                log_samples=True,
                system_instruction=settings.system_instruction,
                apply_chat_template=chat,
                fewshot_as_multiturn=chat,
                confirm_run_unsafe_code=settings.unsafe_code,
            )
        except torch.OutOfMemoryError as error:
            raise RuntimeError(
                f"{what}: the GPU ran out of memory at batch size {lm.batch_size}; choose a smaller one "
                f"(--batch-size). What was finished before is kept. {error}"
            ) from error
        shares = lm.processes.gather(
            _Share(
                usage=tally.result(),
                counters=handle.counters,
                layers=handle.trace.num_layers if handle.trace is not None else 0,
                seconds=lm.seconds,
            )
        )
        handle.release()
    ran = [share for share in shares if share.layers] or shares[:1]
    return Cell(
        task=name,
        mode=mode.label,
        seed=seed,
        items=_items(results["samples"][name]),
        usage={phase: pool([share.usage[phase] for share in ran]) for phase in PHASES},
        counters=_sum([share.counters for share in shares if share.counters is not None]),
        layers=ran[0].layers,
        requests=len(entry.task.instances),
        seconds=max(share.seconds for share in shares),
    )


@dataclass(frozen=True)
class _Share:
    """What one process saw of a cell: of the batches that it ran itself."""

    usage: dict[str, PhaseUsage]
    counters: Counters | None
    layers: int
    seconds: float


def _sum(counters: Sequence[Counters]) -> dict[str, Any] | None:
    if not counters:
        return None
    total = Counters()
    for share in counters:
        total.prompt.add(share.prompt)
        total.response.add(share.response)
    return total.to_dict()


def _items(samples: list[dict[str, Any]]) -> list[Item]:
    """One item per document; the harness gives a sample per document and filter."""
    found: dict[int, Item] = {}
    for sample in samples:
        doc_id, kind = int(sample["doc_id"]), sample["filter"]
        item = found.setdefault(doc_id, Item(doc_id, {}, []))
        for metric in sample["metrics"]:
            item.metrics[metric if kind == "none" else f"{metric},{kind}"] = _plain_value(sample[metric])
        item.answers.extend(_plain_value(_answer(answer)) for answer in sample["filtered_resps"])
    return list(found.values())


def _answer(answer: Any) -> Any:
    # (log-likelihood, whether greedy decoding would have said it); a text; a log-likelihood
    return answer[0] if isinstance(answer, tuple) else answer


def _plain_value(value: Any) -> Any:
    """A metric's value of Python's own types, as it will be when read back from a file."""
    return restored(plain(value))
