"""Usage over many batches and many processes: counts are summed, quotients taken at the end."""

from __future__ import annotations

import torch
from torch import Tensor

from void_ext import _options
from void_ext.trace import PhaseTrace


class UsageCount:
    """Real tokens for which each layer was active, and real tokens: summed over batches, then over processes.

    With data parallelism each process patches its own model, adds what its batches showed, and all call
    :meth:`gather`; pooling shares instead would weigh a process with few tokens like one with many.

    >>> count = UsageCount(layers=30)
    >>> # for batch in mine:
    >>> #     model.generate(**batch)
    >>> #     count.add(handle.trace.response)
    >>> # usage = count.gather().usage()
    """

    def __init__(self, layers: int):
        if _options.check_whole("layers", layers) < 1:
            raise ValueError(f"layers: expected at least 1, got {layers}")
        self.active = torch.zeros(layers, dtype=torch.int64)
        self.tokens = 0

    def __repr__(self) -> str:
        return f"UsageCount(layers={len(self.active)}, tokens={self.tokens})"

    def add(self, trace: PhaseTrace, alpha: float | None = None) -> None:
        """Add one phase of a trace, judged at ``alpha`` (None: the trace's own). Waits for the device.

        Raises TypeError for a trace of both phases, ValueError where it has another number of layers.
        """
        if not isinstance(trace, PhaseTrace):
            raise TypeError(
                f"trace: expected one phase of a trace, its .prompt or its .response, got {type(trace).__name__}"
            )
        if trace.num_layers != len(self.active):
            raise ValueError(f"trace: expected {len(self.active)} layers, got {trace.num_layers}")
        active, tokens = trace.count(alpha)
        self.active += active.cpu()
        self.tokens += int(tokens)

    def gather(self, group: torch.distributed.ProcessGroup | None = None) -> UsageCount:
        """The sum over the processes of ``group`` (None: all); every one of them must call it.

        Raises RuntimeError where torch.distributed is not initialized. Cost: one all_reduce of L + 1 integers.
        """
        if not torch.distributed.is_available() or not torch.distributed.is_initialized():
            raise RuntimeError("gather: expected an initialized torch.distributed (accelerate and torchrun set it up)")
        backend = torch.distributed.get_backend(group)
        device = "cuda" if backend == "nccl" else "cpu"
        both = torch.cat([self.active, torch.tensor([self.tokens])]).to(device)
        torch.distributed.all_reduce(both, group=group)
        result = UsageCount(len(self.active))
        result.active, result.tokens = both[:-1].cpu(), int(both[-1])
        return result

    def usage(self) -> Tensor:
        """Share of real tokens for which each layer was active, float32 ``[L]``; NaN where there was none."""
        return self.active.float() / torch.tensor(float(self.tokens))
