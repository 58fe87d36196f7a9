"""What leaving layers out does to answers: one model in several modes on the same tasks, items and seeds.

lm-evaluation-harness (the extra ``[eval]``) asks the questions and scores the answers; this package patches the model,
counts voids, and compares the modes item by item.

::

    run(model, tokenizer, tasks, modes, settings, *, directory=None, config=None, progress=silent,
        share=True) -> Report

``tasks``
    ``dict[str, Task | TaskRun]``: name in the report -> an ``lm_eval.api.task.Task`` object, wherever it comes from.
    ``TaskRun(task, generation=None, seeds=None, group=None)`` adds what one entry needs: ``generation`` updates the
    task's ``generation_kwargs`` (``{"do_sample": True, "temperature": 0.6, "top_p": 0.9, "max_gen_toks": 50}``),
    ``seeds`` replaces the settings' (one run per seed and mode: sampled runs ``(0, 1, 2)``; a greedy run is an entry of
    its own with ``{"do_sample": False}`` and one seed), ``group`` names entries whose items are pooled in one more row,
    where their seeds are the same.
``modes``
    ``list[ModeSpec]``: ``ModeSpec.dense()``, ``ModeSpec.exit(alpha)``, ``ModeSpec.skip(plan=…)`` or
    ``ModeSpec.skip(policy=…, config={…})``. The first dense one is what the others are compared with.
``settings``
    ``Settings(batch_size="auto", limit=None, seeds=(0,), alpha=0.8, num_fewshot=None, apply_chat_template=False, …)``.
``directory``
    Finished cells, (task, mode, seed), are kept in it as they finish, and a later call with the same configuration goes
    on from them. ``config`` is anything of JSON that belongs to the configuration (hashes of data files, say).
``share``
    Where torch.distributed has several processes, each with the whole model, all of them call ``run`` and share the
    batches; the report is that of one process. ``PeerError``: another of them failed.

What a task's ``process_results`` returns per document is what is compared: every numeric metric gets its score,
standard error, difference to dense and interval; metrics of 0 and 1 get Wilson intervals and McNemar's test too. So the
share of unparsable answers is a metric ``{"acc": 1.0, "unparsable": 0.0}`` of the task. ``Report.cells`` keep for each
document its index, its metrics and, of generated answers, the text: ``cell.items[i].doc_id / .metrics / .answers``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from void_ext._lazy import names_at_first_use

if TYPE_CHECKING:
    from void_ext.evaluate.cells import Cell, CellStore, Item
    from void_ext.evaluate.modes import ModeSpec
    from void_ext.evaluate.processes import PeerError
    from void_ext.evaluate.report import Report
    from void_ext.evaluate.runner import run
    from void_ext.evaluate.settings import Settings, TaskRun
    from void_ext.evaluate.statistics import mcnemar, wilson
    from void_ext.evaluate.tasks import load_tasks

# Imported at first use: the harness is an extra, and importing it takes seconds.
_MODULE_OF = {
    "Cell": "cells",
    "CellStore": "cells",
    "Item": "cells",
    "ModeSpec": "modes",
    "PeerError": "processes",
    "Report": "report",
    "Settings": "settings",
    "TaskRun": "settings",
    "load_tasks": "tasks",
    "mcnemar": "statistics",
    "run": "runner",
    "wilson": "statistics",
}

__all__ = [
    "Cell",
    "CellStore",
    "Item",
    "ModeSpec",
    "PeerError",
    "Report",
    "Settings",
    "TaskRun",
    "load_tasks",
    "mcnemar",
    "run",
    "wilson",
]

__getattr__, __dir__ = names_at_first_use(__name__, _MODULE_OF)
