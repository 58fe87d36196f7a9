"""What a policy is shown, what it may answer, and the base class of all."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from void_ext import _options
from void_ext.plan import VoidPlan
from void_ext.store import PHASES


@dataclass
class History:
    """What is known of the tokens so far: views of the trace's tables, on the model's device; nothing is copied.

    Attributes:
        norms: ``[B, T, L+1]`` float32, of the residual stream before layer 0 and after each layer.
        executed: ``[B, T, L]`` bool, the layers that ran.
        mask: ``[B, T]`` bool, real tokens: no padding, nothing after a row's end.
        updates: ``[B, T, L]`` float32 ``||h_{l+1} - h_l||``; None unless the policy said ``needs_updates``.
        phases: of each of the T positions, 0 (prompt) or 1 (response); on the host.
    """

    norms: Tensor
    executed: Tensor
    mask: Tensor
    updates: Tensor | None
    phases: list[int]

    @property
    def rows(self) -> int:
        return self.norms.shape[0]

    @property
    def layers(self) -> int:
        return self.norms.shape[2] - 1

    def real(self, phase: str) -> Tensor:
        """``[B, T]`` bool, the real tokens of ``"prompt"`` or ``"response"``."""
        index = PHASES.index(_options.check_choice("phase", phase, PHASES))
        wanted = [value == index for value in self.phases]
        return self.mask if all(wanted) else self.mask & torch.tensor(wanted, device=self.mask.device)


@runtime_checkable
class Policy(Protocol):
    """What decides. Derive from it and define :meth:`decide`; the attributes say what the patch must provide for.

    Attributes:
        needs_updates: the trace must record update norms.
        every_token: ask before every forward of the response, not only before the first.
        by_row: rows of a batch can come to differ; without it, plans and tables that tell rows apart are refused.
        halts: decides inside the forward (:class:`HaltPlan`).
    """

    needs_updates: bool = False
    every_token: bool = False
    by_row: bool = False
    halts: bool = False

    @abstractmethod
    def decide(self, history: History | None, phase: str) -> VoidPlan | Tensor | None:
        """What is to run from now on.

        Called at the start of a trace (``history`` None, ``phase`` ``"prompt"``), before the first forward of the
        response (``history`` ends with the prompt, ``phase`` ``"response"``), and with ``every_token`` before each
        later forward of the response (``history`` ends with the token before).

        Returns one of:

        - None: what is in force stays so;
        - a :class:`VoidPlan`: governs from the coming forward on;
        - a bool tensor ``[B, L]`` on the model's device, True = the layer runs, False = attention PROJECT and MLP SKIP;
          or ``[B, L, 2]``, attention and MLP apart. It is copied to the host in the background and governs from the
          forward after the *next* call of ``decide``, however fast the machine: same input, same output.
        """


def check_decision(
    decision: Any, rows: int, layers: int, *, device: torch.device | None = None, by_row: bool = True
) -> None:
    """Raise TypeError or ValueError where ``decision`` is not what :meth:`Policy.decide` may return.

    Args:
        decision: what a policy returned.
        rows, layers: of the batch and the model.
        device: where tables must lie; None: anywhere.
        by_row: the policy's attribute: without it, a plan must not tell rows apart.
    """
    if decision is None:
        return
    if isinstance(decision, VoidPlan):
        if decision.layers != layers:
            raise ValueError(f"decide: expected a plan for {layers} layers, got one for {decision.layers}")
        if decision.rows is not None and decision.rows != rows:
            raise ValueError(f"decide: expected a plan for {rows} rows or for all alike, got one for {decision.rows}")
        if decision.rows is not None and not by_row:
            raise ValueError("decide: expected one plan for all rows from a policy that says by_row = False")
        return
    if not isinstance(decision, Tensor):
        raise TypeError(f"decide: expected a VoidPlan, a bool tensor or None, got {type(decision).__name__}")
    if decision.dtype != torch.bool:
        raise TypeError(f"decide: expected a tensor of torch.bool, got {decision.dtype}")
    shape = tuple(decision.shape)
    if shape not in ((rows, layers), (rows, layers, 2)):
        raise ValueError(f"decide: expected a tensor [{rows}, {layers}] or [{rows}, {layers}, 2], got {list(shape)}")
    if device is not None and decision.device != device:
        raise ValueError(f"decide: expected a tensor on {device}, where the norms are, got {decision.device}")
