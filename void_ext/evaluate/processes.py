"""Processes that share an evaluation: each holds a whole model, answers its share, and learns what the others found.

All that they tell each other are messages of one kind, which every process sends at the same places. So an error in one
of them reaches the others at their next message, wherever that is, and nobody waits for a process that has gone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import distributed

from void_ext.models._common import parse_device
from void_ext.patching.agreement import Agreement

if TYPE_CHECKING:
    from torch import nn

T = TypeVar("T")

#: A process may wait this long for the share of another. One that has ended is noticed at once.
_PATIENCE = timedelta(weeks=52)


class PeerError(RuntimeError):
    """Another of the processes that share an evaluation has failed; the message says which one and why."""


@dataclass
class Processes:
    """The processes that share an evaluation, as one of them sees them; by default it is the only one.

    Attributes:
        rank: which one this is.
        size: how many they are.
        group: of torch.distributed, for objects on the host; None: there is nobody to tell anything (any more).
        told: they all know of the error that this one ends with.
    """

    rank: int = 0
    size: int = 1
    group: Any = None
    told: bool = False

    def gather(self, value: T) -> list[T]:
        """What every process gives, in the order of their ranks; each of them must call this.

        Raises PeerError where another one fails instead.
        """
        return [value] if self.size == 1 else self._exchange(value, None)

    def of_first(self, value: T) -> T:
        """What the first process gives, in all of them."""
        return self.gather(value if self.rank == 0 else None)[0]  # type: ignore[return-value]

    def mine(self, parts: Sequence[T]) -> list[T]:
        """This process's share: of n processes every n-th part."""
        return list(parts[self.rank :: self.size])

    def tell(self, error: Exception) -> None:
        """Let the others, who wait for this process's next message, end as it does."""
        if self.group is not None and not self.told:
            with suppress(PeerError):
                self._exchange(None, f"{type(error).__name__}: {error}")

    def close(self) -> None:
        """Close the connections: others who still wait for this process, which somebody interrupts, then see it go."""
        group, self.group = self.group, None
        if group is None:
            return
        if self.told:
            # A launcher ends all processes as soon as one has failed: each first gets as far as this.
            with suppress(RuntimeError):
                distributed.barrier(group)
        distributed.destroy_process_group(group)  # and no reference must be left

    def _exchange(self, value: Any, error: str | None) -> list[Any]:
        messages: list[Any] = [None] * self.size
        try:
            distributed.all_gather_object(messages, (value, error), group=self.group)
        except RuntimeError as lost:
            self.close()
            raise PeerError(f"another of the {self.size} processes that share this evaluation has ended") from lost
        failed = {rank: text for rank, (_, text) in enumerate(messages) if text is not None}
        self.told = bool(failed)
        if failed and error is None:
            rank, text = next(iter(failed.items()))
            raise PeerError(f"process {rank} of the {self.size} that share this evaluation failed: {text}")
        return [found for found, _ in messages]


@contextmanager
def joined(model: nn.Module | None = None) -> Iterator[Processes]:
    """All processes of an initialized torch.distributed; an error in one of them ends the others with a PeerError.

    The only one: without torch.distributed, and where they hold ``model`` between them (tensor parallel). Those must
    make the same calls, and each answers every request.

    Every process must enter, and none leaves before all do. Raises RuntimeError where some have not come after torch's
    own time limit (30 minutes).
    """
    initialized = distributed.is_available() and distributed.is_initialized()
    if not initialized or distributed.get_world_size() == 1 or (model is not None and Agreement.of([model])):
        yield Processes()
        return
    size = distributed.get_world_size()
    try:
        arrived = distributed.new_group(backend="gloo")
    except RuntimeError as error:
        raise RuntimeError(
            f"share: the {size} processes did not all come to share this evaluation ({error}); every one of them must "
            "call this, or the one that does must say share=False"
        ) from error
    # Messages go over the host, whatever the backend of the caller's group: they hold texts, and no device waits.
    processes = Processes(distributed.get_rank(), size, distributed.new_group(backend="gloo", timeout=_PATIENCE))
    distributed.destroy_process_group(arrived)
    try:
        yield processes
        processes.gather(None)
    except Exception as error:
        processes.tell(error)
        raise
    finally:
        processes.close()


def launched() -> bool:
    """Whether accelerate or torchrun started this process as one of several."""
    size = os.environ.get("WORLD_SIZE", "")
    return "RANK" in os.environ and size.isdigit() and int(size) > 1


@contextmanager
def started(device: str | None) -> Iterator[str]:
    """torch.distributed as the launcher's variables say, set up by accelerate; yields this process's own device.

    Args:
        device: ``"cpu"``, ``"cuda"``, or None: GPUs if there are any. Each process takes the one of its local rank.

    Raises ValueError for a device that processes cannot each have one of.
    """
    from accelerate import PartialState

    if device not in (None, "cpu", "cuda"):
        raise ValueError(
            f"device: expected cpu, cuda or none given where {os.environ['WORLD_SIZE']} processes share the work and "
            f"each takes a device of its own, got {device!r}"
        )
    on_cpu = parse_device(device) == torch.device("cpu")
    own = not distributed.is_initialized()
    state = PartialState(cpu=on_cpu, timeout=_PATIENCE)
    try:
        yield str(state.device)
    finally:
        if own and distributed.is_initialized():
            distributed.destroy_process_group()
