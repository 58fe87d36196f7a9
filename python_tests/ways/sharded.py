"""Run by test_sharded.py in a process of its own, for a process group is one of a whole process."""

from __future__ import annotations

import functools
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import build_tiny

import void_ext
from void_ext import VoidPlan


def shard_whole(model: Any) -> Any:
    return FullyShardedDataParallel(model, device_id=torch.device("cpu")).eval()


def shard_layers(model: Any) -> Any:
    wrap = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={type(model.model.layers[0])})
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), auto_wrap_policy=wrap).eval()


def shard_original(model: Any) -> Any:
    wrap = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={type(model.model.layers[0])})
    return FullyShardedDataParallel(
        model, device_id=torch.device("cpu"), auto_wrap_policy=wrap, use_orig_params=True
    ).eval()


def shard_fully(model: Any) -> Any:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def replicate(model: Any) -> Any:
    return torch.nn.parallel.DistributedDataParallel(model)


SHARDS = (shard_whole, shard_layers, shard_original, shard_fully)


def refused(call: Callable[..., Any], *args: Any, **kwargs: Any) -> bool:
    """Whether it raises what mode ``"skip"`` says of sharded weights."""
    try:
        call(*args, **kwargs)
    except void_ext.UnsupportedModelError as error:
        return "sharded by FSDP" in str(error)
    return False


@torch.no_grad()
def main(rank: int, world: int, meeting: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    ids = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(rank))
    for make in (*SHARDS, replicate):
        whole = build_tiny("llama")
        with void_ext.patch(whole) as wanted:
            expected = whole(input_ids=ids).logits
        for when in ("before", "after"):
            model = build_tiny("llama")
            if when == "before":
                model = make(model)
                handle = void_ext.patch(model)
            else:
                handle = void_ext.patch(model)
                model = make(model)
            case = f"{make.__name__}, patched {'after' if when == 'before' else 'before'}"
            assert torch.equal(model(input_ids=ids).logits, expected), case
            assert torch.equal(handle.trace.prompt.norms, wanted.trace.prompt.norms), case
            handle.unpatch()
            assert torch.equal(model(input_ids=ids).logits, expected), case
            left = (type(value).__module__ for module in model.modules() for value in vars(module).values())
            assert not any(name.startswith("void_ext") for name in left), case
        plan = VoidPlan.from_layers(6, skip=[2])
        model = make(build_tiny("llama"))
        if make is replicate:
            with void_ext.patch(model, mode="skip", plan=plan) as handle:
                model(input_ids=ids)
            assert handle.counters.prompt.layers_skipped == 1
            continue
        assert refused(void_ext.patch, model, mode="skip", plan=plan), make.__name__
        model = build_tiny("llama")
        handle = void_ext.patch(model, mode="skip", plan=plan)
        model = make(model)
        # A wrapper around all of it is not seen from inside; it gathers everything before the first layer.
        assert refused(model, input_ids=ids) is (make is not shard_whole), make.__name__
    dist.destroy_process_group()
    print("done")


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if len(sys.argv) == 4:
        main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(0, 1, f"{folder}/meeting")
