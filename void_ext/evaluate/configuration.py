"""What a run is known by, and where it ran."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import platform
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from void_ext.evaluate.cells import FORMAT, plain

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from void_ext.evaluate.modes import ModeSpec
    from void_ext.evaluate.report import TaskInfo
    from void_ext.evaluate.settings import Settings

#: How objects without a text of their own print; where in memory one is says nothing about it.
_ADDRESS = re.compile(r"(<[^<>]*) at 0x[0-9a-fA-F]+(?=>)")
_PACKAGES = ("torch", "transformers", "lm_eval", "datasets", "void_ext")


def configuration_of(
    model: PreTrainedModel,
    tasks: Mapping[str, TaskInfo],
    modes: Sequence[ModeSpec],
    settings: Settings,
    config: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """All that decides the numbers, in JSON: two runs with equal ones may share cells."""
    from void_ext._content import content_digest
    from void_ext._fingerprint import Fingerprint

    known: dict[str, Any] = plain(
        {
            "format": FORMAT,
            "versions": {name: _version(name) for name in _PACKAGES},
            "model": {
                "name": model.config.name_or_path or type(model).__name__,
                "class": type(model).__name__,
                "dtype": str(model.dtype).removeprefix("torch."),
                "device": model.device.type,
                "attention": getattr(model.config, "_attn_implementation", None),
                "fingerprint": dataclasses.asdict(Fingerprint.of(model)),
                "content_sha256": content_digest(model),
            },
            "tasks": {name: info.to_dict() for name, info in tasks.items()},
            "modes": [{"label": mode.label, **mode.config} for mode in modes],
            "settings": dataclasses.asdict(settings),
            "extra": dict(config or {}),
        }
    )
    return known


def requests_digest(task: Any) -> str:
    """sha256, in hex, over a task's requests with the documents they come from and the answers these are marked by.

    ``task`` has built its requests. Whatever of a document is no JSON counts by its text.
    """
    digest = hashlib.sha256()
    documents: set[int] = set()
    for instance in task.instances:
        known = [instance.doc_id, instance.args]
        if instance.doc_id not in documents:
            documents.add(instance.doc_id)
            known += [instance.doc, _target(task, instance.doc)]
        digest.update(_ADDRESS.sub(r"\1", json.dumps(plain(known), sort_keys=True)).encode())
    return digest.hexdigest()


def _target(task: Any, document: Any) -> Any:
    try:
        return task.doc_to_target(document)
    except Exception:
        # Tasks that are marked by other means need not have one, and lm-eval may never ask for it.
        return None


def _version(package: str) -> str:
    if package == "torch":
        import torch

        return str(torch.__version__)
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        import void_ext

        return void_ext.__version__ if package == "void_ext" else "unknown"


def environment_of(model: PreTrainedModel, batch_size: int, processes: int = 1) -> dict[str, Any]:
    """Device, processes, threads of each, Python and the batch size used; a run may go on in another one."""
    import torch

    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else platform.machine()
    return {
        "device": device,
        "processes": processes,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "batch_size": batch_size,
    }
