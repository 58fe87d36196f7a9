"""One forward of a patched layer stack: layers write norms into its table as they run, one column each.

A layer's norm is written by the add that closes it. Whoever comes next settles it: if the stream that arrives is not
the one that left, a hook has changed it, and the norm is taken once more, of what the next layer really sees.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from void_ext._capturing import capturing
from void_ext._host import RowNorms, tensors_visible
from void_ext.patching.exit import ExitSelector
from void_ext.patching.recording import NATIVE_DTYPES, Recording

if TYPE_CHECKING:
    from void_ext.counters import PhaseCounters
    from void_ext.dispatch import CostModel
    from void_ext.patching.schedule import Schedule
    from void_ext.patching.skipping import Skipper

# Elements of one stream whose norm may wait for the end of the call. CPU: also what torch thinks too little for a
# second thread. CUDA: a decode step of the largest batches; all streams are held until then, of 32 layers in bfloat16
# 70 MB at most. Half of that in a graph, where the host has no part in a step: from some hundred rows on, one more pass
# over the streams costs as much as the fused adds wait for their sums.
_KEPT_ELEMENTS = {"cpu": 1 << 15, "cuda": 1 << 20, "cuda graph": 1 << 19}
_row_l2norm: Callable[..., None] = torch.ops.void_ext.row_l2norm.default
_streams_l2norm: Callable[..., None] = torch.ops.void_ext.streams_l2norm.default


@dataclass
class Tables:
    """What the layers of one device write to in a call: float32 ``[rows, L + 1]``, the others ``[rows, L]``."""

    norms: Tensor
    updates: Tensor | None
    halves: Tensor | None
    writer: RowNorms | None  # into norms
    by_column: bool  # a column's elements of norms are neighbours
    batch: int = 0  # that the views below are for
    views: dict[str, Tensor] = field(default_factory=dict)

    def by_row(self, batch: int, length: int) -> dict[str, Tensor]:
        """What there is, as ``[batch, length, columns]``."""
        if self.batch != batch:
            every = {"norms": self.norms, "updates": self.updates, "halves": self.halves}
            self.views = {name: table.view(batch, length, -1) for name, table in every.items() if table is not None}
            self.batch = batch
        return self.views

    @classmethod
    def new(cls, recording: Recording, rows: int, device: torch.device, by_column: bool) -> Tables:
        def table(*shape: int) -> Tensor:
            return torch.empty(*shape, dtype=torch.float32, device=device)

        # A table made under inference_mode could not be read back in a later call outside of it.
        with torch.inference_mode(False), torch.no_grad():
            columns = recording.layers + 1
            norms = table(columns, rows).t() if by_column else table(rows, columns)
            return cls(
                norms,
                table(rows, recording.layers) if recording.updates else None,
                table(rows, recording.layers) if recording.halves else None,
                RowNorms(norms) if device.type == "cpu" and tensors_visible() else None,
                by_column,
            )


class Call:
    """One forward of the layer stack: a table of ``batch * length`` rows, filled column by column."""

    compiled = False  # whether it was opened around a compiled forward (void_ext.patching.compiled)

    # What most calls leave as it is lies on the class: a decode step on a CPU feels thirty assignments.
    next = 0
    native = False
    plain = False
    streams: list[Tensor] | None = None  # that layers were given, where their norms are taken at the end of the call
    norms: Tensor
    updates: Tensor | None = None
    halves: Tensor | None = None
    ordinal = -1  # of norms' device: -1 is the CPU
    captured = False  # by a CUDA graph
    writer: RowNorms | None = None  # into norms, of few rows on a CPU
    exit: ExitSelector | None = None
    normed: Tensor | None = None  # the next layer's normed input, where the closing add has made it
    settled: Tensor | None = None  # the stream that it was made of, once it was seen to be untouched
    entered: Tensor | None = None  # a copy of what the layer that runs was given, where hooks watch it
    last: Tensor | None = None  # what the layer before left, and the version of its content
    version = -1
    doubtful = False
    begun = 0  # layers, where all of each runs: what was launched, without a list of it
    guarded = False  # the cache's ledger was asked, and is to be told
    holes = False  # whether there is something to tell it: layers that were skipped, now or before
    halted: Tensor | None = None  # [rows] bool, where a policy decides inside of the call
    halting = False
    costs: CostModel | None = None
    _halting: Any = None
    _verdict: Tensor | None = None  # rows that ran the last layer, of which some may halt there
    _inference = False  # inference tensors have no version

    def __init__(
        self,
        batch: int,
        length: int,
        recording: Recording,
        tables: dict[torch.device, Tables],
        real: Tensor | None = None,
        skipper: Skipper | None = None,
        schedule: Schedule | None = None,
        counters: PhaseCounters | None = None,
    ):
        self.batch = batch
        self.length = length
        self.recording = recording
        self.real = real  # [batch, length] bool, None: all
        self.schedule = schedule  # None: everything runs
        self.counters = counters
        self.partial: Schedule | None = None  # where something may not run
        self.launched: list[tuple[int, int, int, int]] = []  # layer, what of its attention and MLP, rows of the MLP
        self._tables = tables
        self._devices: list[tuple[int, torch.device]] = []  # (layer, the device from it on)
        self._unwritten: list[int] = []  # columns of norms left to be copied from the one before
        if skipper is not None:
            self.costs = skipper.costs
            if skipper.halts and schedule is not None:
                self._halting = skipper.policy
                self.halting = True
                self._executed: list[Tensor] = []  # one [rows] bool a layer
            if schedule is not None and (self.halting or not schedule.whole):
                self.partial = schedule

    def enter(self, index: int, stream: Tensor) -> None:
        """Layer ``index`` is about to run on ``stream``."""
        if index != self.next:
            self._out_of_step(index)
        if index == 0:
            self._open(stream)
        else:
            self.settle(stream)

    def leave(self, index: int, stream: Tensor, entered: Tensor | None = None, *, doubtful: bool = False) -> None:
        """Layer ``index`` gave ``stream``, whose norm is in column ``index + 1``.

        ``entered`` is what the layer was given. ``doubtful`` says that a hook may change the stream unseen.
        """
        self.next = index + 1
        self.last = stream
        self.version = -1 if self._inference else stream._version
        self.doubtful = doubtful
        if self.updates is not None and entered is not None:
            self.tap(self.updates, index, stream.detach().float() - entered.detach().to(stream.device).float())

    def skip(self, index: int, stream: Tensor, *, doubtful: bool = False) -> None:
        """Layer ``index`` left ``stream`` as it was."""
        self.normed = None  # by its own norm; the next layer has another
        self.leave(index, stream, doubtful=doubtful)
        if self.streams is None:
            self._unwritten.append(index + 1)
        if self.updates is not None:
            self.updates[:, index].zero_()
        if self.halves is not None:
            self.tap(self.halves, index, stream)
        if self.halted is not None:
            self._executed.append(torch.zeros_like(self.halted))

    def rows_on(self, index: int, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """Which rows run attention and MLP of a layer, ``[rows]`` bool each; None: the host knows it is all or none."""
        if self.halted is not None:
            assert self._halting is not None
            on = self._halting.runs(self.halted, index, self.recording.layers)
            return on, on
        if self.schedule is None or self.schedule.attention_rows is None:
            return None
        attention, mlp = self.schedule.masks(device, self.batch, self.length)
        return attention[index], mlp[index]

    def judge(self, on: Tensor) -> None:
        """The last layer ran for the rows that are on. Which of them halt there is seen once its hooks have run."""
        self._executed.append(on)
        self._verdict = on

    def _halt(self, index: int) -> None:
        """See which rows halt at layer ``index``, whose norm is settled."""
        self._verdict = None
        assert self.halted is not None
        assert self._halting is not None
        executed = torch.stack(self._executed, 1)
        norms = self.norms[: self.batch * self.length, : index + 2]
        self.halted = self._halting.step(
            norms,
            executed,
            self.halted,
            index,
            self.recording.layers,
            updates=None if self.updates is None else self.updates[: norms.shape[0], : index + 1],
            real=self.real,
            batch=self.batch,
        )

    def untouched(self, stream: Tensor) -> bool:
        """Whether ``stream`` is what the layer before left, and nobody can have written to it since."""
        return stream is self.last and not self.doubtful and (self._inference or self.version == stream._version)

    def settle(self, stream: Tensor) -> None:
        """``stream`` is what the layer before left, as the next one sees it: hooks may have changed it on the way."""
        if stream.device != self.norms.device:
            self._move(stream)
        if self.streams is not None:
            if len(self.streams) == self.next:
                self.streams.append(stream)
        elif not self.untouched(stream):
            self.normed = None
            self.tap(self.norms, self.next, stream)
            if self._unwritten and self._unwritten[-1] == self.next:
                self._unwritten.pop()
        if self._verdict is not None:
            self._halt(self.next - 1)
        self.last = None
        self.settled = stream
        if self.exit is not None:
            self.exit.step(self.next - 1, stream, self.norms)

    def take_normed(self, stream: Tensor) -> Tensor | None:
        """What the last layer's closing add made of ``stream`` for the final norm, if that is what it gets to see."""
        normed, self.normed = self.normed, None
        same = stream is self.settled and (self._inference or self.version == stream._version)
        return normed if same else None

    def tap(self, table: Tensor, column: int, stream: Tensor) -> None:
        """Write the L2 norm of each row of ``stream`` into a column of ``table``, which may be on another device."""
        if self.writer is not None and table is self.norms and self.writer.write(stream, column):
            return
        stream = stream.detach()
        if self.native and stream.device == table.device:
            _row_l2norm(stream, table, column)
        else:
            wide = stream if stream.dtype == torch.float64 else stream.float()
            norms = torch.linalg.vector_norm(wide, dim=-1)
            table[: self.batch * self.length, column].copy_(norms.view(-1))

    def gather(self) -> dict[str, Tensor]:
        """The finished tables as ``[batch, length, columns]``, all on the device of the first layer."""
        if self.streams is not None:
            if self.last is not None:
                self.settle(self.last)  # no final norm came by to do it
            self._take_kept()
        first = self._devices[0][1]
        tables = self._tables[first]
        if len(self._devices) > 1:
            self._put_together(tables)
        if self._unwritten:
            self._fill(tables.norms)
        found = tables.by_row(self.batch, self.length)
        if self.recording.skips:
            found = {**found, "executed": self._ran(first)}
        return found

    def _put_together(self, tables: Tables) -> None:
        """What other devices' layers wrote into the tables of the first layer's."""
        # Each has the norm of what entered its first layer, and so on up to what entered the next one's.
        ends = [start for start, _ in self._devices[1:]] + [None]
        for (start, device), end in zip(self._devices, ends, strict=True):
            if device != self._devices[0][1]:
                others = self._tables[device]
                tables.norms[:, start:end].copy_(others.norms[:, start:end])
                for target, source in ((tables.updates, others.updates), (tables.halves, others.halves)):
                    if target is not None and source is not None:
                        target[:, start:end].copy_(source[:, start:end])

    def _fill(self, norms: Tensor) -> None:
        """The norm after a layer that was skipped is the one before it: one copy for each run of such layers."""
        first = 0
        for position, column in enumerate(self._unwritten):
            if position + 1 == len(self._unwritten) or self._unwritten[position + 1] != column + 1:
                begin = self._unwritten[first]
                norms[:, begin : column + 1].copy_(norms[:, begin - 1 : begin].expand(-1, column + 1 - begin))
                first = position + 1

    def _ran(self, device: torch.device) -> Tensor:
        """``[batch, length, L]`` bool, or what broadcasts to it."""
        if self.halting:
            return torch.stack(self._executed, 1).view(self.batch, self.length, -1)
        if self.schedule is None:
            return torch.ones(1, dtype=torch.bool, device=device)
        return self.schedule.executed(device, self.batch, self.length)

    def _check_stream(self, stream: Tensor) -> None:
        if stream.dim() != 3 or stream.shape[:2] != (self.batch, self.length):
            raise RuntimeError(
                f"void_ext: the residual stream entering layer 0 has shape {tuple(stream.shape)}; expected one vector "
                f"per input token, ({self.batch}, {self.length}, width). This model cannot be traced: "
                "void_ext.unpatch(model) leaves it as it was"
            )

    def _open(self, stream: Tensor) -> None:
        self._check_stream(stream)
        self._inference = stream.is_inference() or torch.is_inference_mode_enabled()
        self._use(stream.device, stream.dtype)
        if self._halting is not None:
            self.halted = torch.zeros(self.batch * self.length, dtype=torch.bool, device=stream.device)
        self._take_first(stream)
        if self.recording.mode == "exit":
            self.exit = ExitSelector(stream, self.norms, self.batch, self.recording, self.real)

    def _take_first(self, stream: Tensor) -> None:
        """What enters layer 0: its norm is taken now, or with all others at the end of the call."""
        if self._keeps(stream):
            self.streams = [stream]
        else:
            self.tap(self.norms, 0, stream)

    def _keeps(self, stream: Tensor) -> bool:
        # Norms of few rows cost less than getting at them. On a CPU all weights of a layer go through the caches
        # between two of them, and what is called once a layer is read from memory each time; on a GPU an op of ours
        # takes the host longer than torch's own, and the device longer, for the sum has to be waited for
        # (docs/design.md). Where the rows are many, the fused add spares a pass.
        if not self.recording.adds_alone or not self.native or self.halted is not None:
            return False
        kind = stream.device.type
        if kind == "cuda" and (self.captured or self.compiled):
            kind = "cuda graph"
        return stream.numel() <= _KEPT_ELEMENTS[kind]

    def _take_kept(self) -> None:
        """Take the norms of all streams kept so far."""
        streams, self.streams = self.streams, None
        assert streams is not None
        taken = 0 if self.writer is None else self.writer.write_all(streams)
        rest = streams[taken:]
        if len({stream.dtype for stream in rest}) == 1 and rest[0].dtype in NATIVE_DTYPES:
            if torch.is_grad_enabled():
                rest = [stream.detach() for stream in rest]
            _streams_l2norm(rest, self.norms, taken)
        else:  # a hook has changed the dtype
            for column, stream in enumerate(rest, taken):
                self.tap(self.norms, column, stream)

    def _use(self, device: torch.device, dtype: torch.dtype) -> None:
        self._devices.append((self.next, device))
        rows = self.batch * self.length
        # Each row's norm is written by a block of its own: a GPU's memory takes neighbours together. A verdict inside
        # of a call reads along the rows.
        by_row = self.compiled or self._halting is not None or self.recording.mode == "exit"
        by_column = device.type == "cuda" and not by_row
        if not self.captured and capturing(device):
            # What a CUDA graph writes to has to be the graph's own memory, which lives as long as it does, and nobody
            # else's.
            self.captured, self._tables = True, {}
        tables = self._tables.get(device)
        alike = tables is not None and tables.norms.shape[0] == rows and tables.by_column == by_column
        if tables is None or not alike:
            tables = self._tables[device] = Tables.new(self.recording, rows, device, by_column)
        self.norms, self.updates, self.halves = tables.norms, tables.updates, tables.halves
        self.writer = tables.writer
        self.ordinal = self.norms.get_device()
        self._judge_kernels(device, dtype)

    def _judge_kernels(self, device: torch.device, dtype: torch.dtype) -> None:
        self.native = device.type in self.recording.native_devices and dtype in NATIVE_DTYPES
        # Under grad mode the add must be differentiable: plain add, detached norms.
        self.plain = torch.is_grad_enabled() or not self.native

    def _move(self, stream: Tensor) -> None:
        if self.exit is not None or self.halted is not None:
            what = "mode='exit'" if self.exit is not None else "HaltPlan, which decides inside of a forward,"
            part = f"layer {self.next}" if self.next < self.recording.layers else "the final norm"
            raise RuntimeError(
                f"void_ext: {what} needs all layers on one device; {part} runs on {stream.device} and "
                f"the layers before it on {self.norms.device}. Use mode='trace', or load the model on one device"
            )
        if self.streams is not None:
            self._take_kept()
        self._use(stream.device, stream.dtype)
        self.last = None  # its norm is taken once more, into this device's table

    def _out_of_step(self, index: int) -> None:
        if index < self.next:
            what, then = f"layer {index} runs a second time in one forward", "This"
        else:
            what = f"layer {index} runs and layer {self.next} before it has not"
            then = (
                "If a layer was replaced or moved after patching, call void_ext.unpatch(model) and patch it again; "
                "otherwise this"
            )
        raise RuntimeError(
            f"void_ext: {what}; expected each of the {self.recording.layers} layers once, in order. {then} model "
            "cannot be traced: void_ext.unpatch(model) leaves it as it was"
        )
