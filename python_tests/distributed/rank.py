"""One of the processes: ``rank.py MODEL_DIRECTORY RESULT.json``, started with torchrun's variables."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import work
from transformers import AutoModelForCausalLM

import void_ext

RANK = int(os.environ["RANK"])


class ByRank(void_ext.Policy):
    """What no policy may do: look at where it runs."""

    def __init__(self, fails: bool = False):
        self.fails = fails

    def decide(self, history: Any, phase: str) -> Any:
        if history is None:
            return None
        if self.fails and RANK == 1:
            raise ArithmeticError("this rank could not decide")
        return void_ext.VoidPlan.from_layers(history.layers, mlp=[3 + RANK], phase="response")


class OneRankDecides(ByRank):
    def decide(self, history: Any, phase: str) -> Any:
        return super().decide(history, phase) if RANK == 1 else None


class TableByRank(void_ext.Policy):
    every_token = True

    def decide(self, history: Any, phase: str) -> Any:
        if history is None:
            return None
        table = torch.ones(history.rows, history.layers, dtype=torch.bool)
        table[:, 3 + RANK] = False
        return table


def parallel(path: str) -> Any:
    try:
        from transformers.distributed import DistributedConfig

        how = {"distributed_config": DistributedConfig(tp_plan="auto")}
    except (ImportError, TypeError):  # transformers 4.57
        how = {"tp_plan": "auto"}
    return AutoModelForCausalLM.from_pretrained(path, **how).eval()


def error_of(model: Any, **options: Any) -> str:
    try:
        work.run(model, {"mode": "skip", **options})
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def main(path: str, result: str) -> None:
    model = parallel(path)
    weight = model.model.layers[0].self_attn.q_proj.weight
    assert type(weight).__name__ == "DTensor", "the model is not spread over ranks"
    assert weight.to_local().numel() * 2 == weight.numel()
    found: dict[str, Any] = {name: work.run(model, options) for name, options in work.policies(model).items()}
    found["differing plan"] = error_of(model, plan=void_ext.VoidPlan.from_layers(model, skip=[1 + RANK]))
    found["differing decision"] = error_of(model, policy=ByRank())
    found["failing decision"] = error_of(model, policy=ByRank(fails=True))
    found["one rank decides"] = error_of(model, policy=OneRankDecides())
    found["differing table"] = error_of(model, policy=TableByRank())
    found["after all of that"] = work.run(model, work.policies(model)["prompt"])

    alone = AutoModelForCausalLM.from_pretrained(path).eval()  # data parallel: the whole model, a share of the data
    count = work.usage(alone, work.batches()[RANK::2]).gather()
    found["usage"] = {"active": count.active.tolist(), "tokens": count.tokens, "usage": count.usage().tolist()}
    Path(result).write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
