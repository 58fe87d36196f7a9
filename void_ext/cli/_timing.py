"""What tracing costs: a decode step of the patched model against one of the unpatched, in turns in this process."""

from __future__ import annotations

import argparse
import copy
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from void_ext.cli._console import Terminal
from void_ext.timing import Comparison, compare

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_PAIRS = 50
_SECONDS = 20.0
_STEPS = _PAIRS + 8


def measure(
    arguments: argparse.Namespace,
    terminal: Terminal,
    model: PreTrainedModel,
    ids: torch.Tensor,
    options: dict[str, Any],
) -> Comparison:
    """A decode step of the patched model against one of the unpatched, in turns, each with a cache of its own."""
    import torch

    limit = context(model)
    if limit is not None:
        ids = ids[:, : max(1, limit - _STEPS)]
    # A second set of modules over the same weights: both stay as they are while they take turns.
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, shared)
    with torch.no_grad(), terminal.waiting() as report, patched(twin, arguments, options) as handle:
        report("warming up for the timing", 0, 0)
        # a runs three times a round: with a cache for each of them all caches grow alike.
        plain = [_decoder(model, ids) for _ in range(3)]
        traced = _decoder(twin, ids)
        turn = 0

        def a() -> None:
            nonlocal turn
            plain[turn % 3]()
            turn += 1

        for _ in range(2):
            for step in (*plain, traced):
                step()
        timing = compare(
            a,
            traced,
            _PAIRS,
            warmup=0,
            synchronize=torch.cuda.synchronize if ids.is_cuda else None,
            a_name="unpatched",
            b_name={"trace": "traced", "skip": "skipping"}.get(options["mode"], options["mode"]),
            max_seconds=_SECONDS,
            progress=lambda done, pairs: report("timing against the unpatched model", done, pairs),
        )
        handle.release()
    return timing


def _decoder(model: PreTrainedModel, ids: torch.Tensor) -> Callable[[], None]:
    """Read the prompt; then one more token with each call."""
    # transformers 5.24 renamed it; of the class, as a patched or dispatched instance may have a forward of its own.
    renamed = "cache" in inspect.signature(type(model).forward).parameters
    name = "cache" if renamed else "past_key_values"
    cache = {name: getattr(model(input_ids=ids, use_cache=True), name)}
    token = ids[:, -1:]

    def step() -> None:
        model(input_ids=token, use_cache=True, **cache)

    return step


def where(model: PreTrainedModel) -> str:
    """The device in words."""
    import torch

    device = input_device(model)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' * (threads != 1)}"


def context(model: PreTrainedModel) -> int | None:
    """How many positions the model knows, where its config says so."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def patched(model: PreTrainedModel, arguments: argparse.Namespace, options: dict[str, Any]) -> Any:
    """``void_ext.patch`` with the options of the command line and those of the command."""
    import void_ext

    return void_ext.patch(model, alpha=arguments.alpha, fuse=arguments.fuse, **options)


def input_device(model: PreTrainedModel) -> torch.device:
    """Where token ids have to be."""
    embeddings: Any = model.get_input_embeddings()
    device: torch.device = embeddings.weight.device
    return device
