"""Ranks that hold one model between them must launch the same layers, or they wait for each other for ever.

Each decision of a policy is compared over the ranks when it is made, once, by a hash; every rank learns that they
differ, and every rank raises. What the layers themselves do is left alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


class DivergenceError(RuntimeError):
    """The ranks of a distributed model decided differently on what to skip."""


class Agreement:
    """Compares decisions over all ranks of the device meshes that a model's parameters are spread over.

    Args:
        meshes: of the parameters; each is compared over, one dimension after the other, so that the least and the
            greatest hash are those of all its ranks.
    """

    def __init__(self, meshes: Iterable[Any]):
        self.meshes = tuple(meshes)

    def __deepcopy__(self, memo: dict[int, Any]) -> Agreement:
        return self  # a copy of the model is spread over the same ranks

    def __reduce__(self) -> tuple[Any, ...]:
        return Agreement, ((),)  # process groups do not leave their process

    @classmethod
    def of(cls, modules: Iterable[nn.Module]) -> Agreement | None:
        """None where no parameter is spread over ranks."""
        if not torch.distributed.is_available() or not torch.distributed.is_initialized():
            return None
        from torch.distributed.tensor import DTensor

        parameters = (parameter for module in modules for parameter in module.parameters())
        meshes = {parameter.device_mesh for parameter in parameters if isinstance(parameter, DTensor)}
        found = sorted((mesh for mesh in meshes if mesh.size() > 1), key=repr)  # the same order on every rank
        return cls(found) if found else None

    def check(self, what: Any, words: str) -> None:
        """Compare ``what``, by its repr, over the ranks.

        Raises:
            DivergenceError: on every rank, where it differs.
        Cost: an all_reduce of two integers and a wait for it, for each dimension of each mesh.
        """
        mine = int.from_bytes(hashlib.blake2b(repr(what).encode(), digest_size=7).digest(), "big")
        for mesh in self.meshes:
            ends = torch.tensor([mine, -mine], device=mesh.device_type)
            for dimension in range(mesh.ndim):
                torch.distributed.all_reduce(ends, op=torch.distributed.ReduceOp.MIN, group=mesh.get_group(dimension))
            least, greatest = ends.tolist()
            if least != -greatest:
                raise DivergenceError(
                    f"policy: the {mesh.size()} ranks that hold this model differ in what to run: rank "
                    f"{torch.distributed.get_rank()} has {words}. Nothing was launched. Give every rank the same "
                    "input, plan and seeds, and a policy that decides from these alone"
                )
