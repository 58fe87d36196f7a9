"""lm-evaluation-harness's model for transformers, watched: which tokens of its requests are real, and what they show.

For log-likelihoods the harness pads on the right and gives the model no attention mask; lengths tell real tokens apart.
The model's calls are the harness's own, so answers are those of plain lm-eval, bit for bit.
"""

from __future__ import annotations

import bisect
import contextlib
import copy
import functools
import logging
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.api import task as harness_task
from lm_eval.models import huggingface
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import Collator
from lm_eval.models.utils_hf import stop_sequences_criteria

from void_ext.evaluate.processes import Processes
from void_ext.evaluate.protocol.sampling import is_drawn_in_order, with_item_sampling
from void_ext.evaluate.tally import Tally
from void_ext.models._common import Progress, silent

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from void_ext.patching import Handle

_CPU_BATCH = 8
_LARGEST_BATCH = 64


class WatchedLM(HFLM):  # type: ignore[misc]
    """HFLM over a loaded model. Inside :meth:`watching`, every call is traced and counted.

    Processes that share the work each run some of the batches that one process would make, and all know all answers:
    the harness, which believes itself alone, has the same requests, answers and scores in each of them. Its own way of
    sharing gives each process other documents: with them other few-shot examples, which are drawn for one document
    after the other, other batches, and requests that are asked twice to fill up a smaller share.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int = 1,
        processes: Processes | None = None,
    ):
        # The harness sets a pad token where there is none; the caller's tokenizer stays as it is.
        super().__init__(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size, backend="causal")
        self.processes = processes or Processes()
        self.seconds = 0.0
        self._handle: Handle | None = None
        self._tally: Tally | None = None
        self._report: Progress = silent
        self._what = ""
        self._done = self._total = 0
        self._window_rows = 0
        self._batches: Iterator[list[int]] = iter(())
        self._lengths: Iterator[int] = iter(())

    @contextlib.contextmanager
    def watching(self, handle: Handle, tally: Tally, what: str = "", report: Progress = silent) -> Iterator[None]:
        """Count what ``handle`` traces in the requests inside; ``seconds`` is the time they take together.

        Both are of this process alone.
        """
        self._handle, self._tally, self._what, self._report = handle, tally, what, report
        self.seconds = 0.0
        try:
            yield
        finally:
            self._handle = self._tally = None
            self._report = silent

    # ---- requests ----

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
        with self._timed():
            return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
        rows = self.batch_size
        # The harness hands on the windows of all texts, a batch at a time. Here they come at once, to be shared.
        self.batch_size_per_gpu, self._window_rows = sys.maxsize, rows
        try:
            with self._timed():
                return super().loglikelihood_rolling(requests, disable_tqdm=True)
        finally:
            self.batch_size_per_gpu, self._window_rows = rows, 0

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
        with self._timed():
            part = self._in_one(self._batches_to_generate(requests))
            self._begin(len(part))
            return self._shared(requests, [part], functools.partial(super().generate_until, disable_tqdm=True))

    def _shared(self, requests: list[Any], parts: list[list[int]], answer: Callable[[list[Any]], Any]) -> list[Any]:
        """Answers to all ``requests``: to this process's ``parts`` by ``answer``, a call each; the others give theirs.

        The wait for the slowest is no part of this process's time.
        """
        found: dict[int, Any] = {}
        for part in filter(None, parts):
            found.update(zip(part, answer([requests[index] for index in part]), strict=True))
        with self._untimed():
            everything = {index: one for share in self.processes.gather(found) for index, one in share.items()}
        return [everything[index] for index in range(len(requests))]

    def _in_one(self, batches: list[list[int]]) -> list[int]:
        """The requests of this process's batches, in their old order: of them the harness makes these batches again."""
        return sorted(index for batch in self.processes.mine(batches) for index in batch)

    # ---- log-likelihoods ----

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = True, override_bs: int | None = None
    ) -> Any:
        if self._window_rows:
            indices = range(len(requests))
            batches = [list(indices[start : start + self._window_rows]) for start in indices[:: self._window_rows]]
            parts = self.processes.mine(batches)
        else:
            parts = [self._in_one(self._batches_to_score(requests))]
        if self._handle is not None:
            shares = ([requests[index] for index in part] for part in parts)
            lengths = [batch for share in shares for batch in self._lengths_of_batches(share)]
            self._begin(sum(map(len, lengths)))
            self._batches = iter(lengths)

        answer = functools.partial(super()._loglikelihood_tokens, disable_tqdm=True, override_bs=override_bs)
        found = self._shared(requests, parts, answer)
        if self._handle is not None and next(self._batches, None) is not None:
            raise self._out_of_step("fewer calls")
        return found

    def _batches_to_score(self, requests: list[Any]) -> list[list[int]]:
        """The requests of each batch that the harness would make of all of them; some share a row."""
        if self.processes.size == 1:
            return [list(range(len(requests)))]
        sharing: dict[tuple[int, ...], list[int]] = {}
        for index, request in enumerate(requests):
            sharing.setdefault(tuple(_input_of(request)), []).append(index)
        return [
            [index for request in batch for index in sharing[tuple(_input_of(request))]]
            for batch in self._in_batches(requests)
        ]

    def _in_batches(self, requests: list[Any]) -> Iterator[list[Any]]:
        """The batches that the harness is about to make of ``requests``, in its own order: the rows of each."""

        def order(request: Any) -> Any:
            tokens = request[1] + request[2]
            return -len(tokens), tuple(tokens)

        collator = Collator(requests, sort_fn=order, group_by="contexts", group_fn=_input_of)
        batches: Iterator[list[Any]] = collator.get_batched(n=self.batch_size)
        return batches

    def _lengths_of_batches(self, requests: list[Any]) -> list[list[int]]:
        """Tokens of each row of these batches."""
        return [
            [min(len(row[1]) + len(row[2]) - 1, self.max_length) for row in batch]
            for batch in self._in_batches(requests)
        ]

    def _model_call(self, inps: torch.Tensor, attn_mask: Any = None, labels: Any = None) -> torch.Tensor:
        handle, tally = self._handle, self._tally
        if handle is None or tally is None:
            logits: torch.Tensor = super()._model_call(inps, attn_mask=attn_mask, labels=labels)
            return logits
        lengths = next(self._batches, [])
        if len(lengths) != inps.shape[0] or max(lengths) != inps.shape[1]:
            raise self._out_of_step(f"a call of shape {tuple(inps.shape)} for rows of {lengths} tokens")
        with contextlib.ExitStack() as stack:
            if min(lengths) < max(lengths):
                positions = torch.arange(inps.shape[1], device=inps.device)
                real = positions < torch.tensor(lengths, device=inps.device)[:, None]
                stack.enter_context(handle.real_tokens(real))
            logits = super()._model_call(inps, attn_mask=attn_mask, labels=labels)
        self._lengths = iter(lengths)
        self._count(len(lengths))
        return logits

    def _select_cont_toks(self, logits: Any, contlen: int | None = None, inplen: int | None = None) -> Any:
        if self._handle is not None:
            expected = next(self._lengths, None)
            if expected != inplen:
                raise self._out_of_step(f"a row of {inplen} tokens where {expected} were counted")
        return super()._select_cont_toks(logits, contlen=contlen, inplen=inplen)

    # ---- generation ----

    def _batches_to_generate(self, requests: list[Any]) -> list[list[int]]:
        """The requests of each batch that the harness would make of all of them; all in one where order matters."""
        if self.processes.size == 1 or any(is_drawn_in_order(request.args[1]) for request in requests):
            return [list(range(len(requests)))]

        def order(row: Any) -> Any:
            return -len(self.tok_encode(row[1])), row[1]

        rows = [(index, *request.args) for index, request in enumerate(requests)]
        collator = Collator(rows, sort_fn=order, group_by="gen_kwargs", group_fn=lambda row: row[2])
        batches: Any = collator.get_batched(n=self.batch_size)
        return [[row[0] for row in batch] for batch in batches]

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **settings: Any) -> Any:
        settings = with_item_sampling(context, max_length, settings, torch.initial_seed())
        tokens = super()._model_generate(context, max_length, stop, **settings)
        if self._handle is not None:
            # One row goes on to its own end and no further.
            lengths = None if len(tokens) == 1 else self._answer_lengths(tokens[:, context.shape[1] :].tolist(), stop)
            self._count(context.shape[0], lengths)
        return tokens

    def _answer_lengths(self, answers: list[list[int]], stop: list[str]) -> torch.Tensor:
        """Consumed tokens of each answer up to its own stop string; the time this takes is not the requests'.

        The harness lets a batch go on until every row has said one. What a row says after its own is cut off, and is
        no part of its answer; alone, the row would have ended there.
        """
        with self._untimed():
            criteria = stop_sequences_criteria(self.tokenizer, stop, 0, 1)
            windows = [(criterion.sequence, criterion.sequence_id_len) for criterion in criteria]
            return torch.tensor(
                [min(stop_position(self.tokenizer, answer, *window) for window in windows) - 1 for answer in answers]
            )

    # ---- around them ----

    def _count(self, rows: int, answer_lengths: torch.Tensor | None = None) -> None:
        assert self._handle is not None
        assert self._tally is not None
        trace = self._handle.trace
        if trace is not None:
            self._tally.add(trace, answer_lengths)
        self._done += rows
        self._report(self._what, self._done, self._total)

    def _begin(self, total: int) -> None:
        self._done, self._total = 0, total
        self._report(self._what, 0, total)

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - start

    @contextlib.contextmanager
    def _untimed(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds -= time.perf_counter() - start

    def _out_of_step(self, found: str) -> RuntimeError:
        import lm_eval

        return RuntimeError(
            f"lm-eval {lm_eval.__version__} batches its requests in another way than void_ext expects ({found}), so "
            "padding cannot be told from tokens; 0.4.13 is known to work"
        )


def _input_of(request: Any) -> Any:
    """The tokens that a log-likelihood's request puts into the model: requests with the same ones share a row."""
    return request[1] + request[2][:-1]


def stop_position(tokenizer: PreTrainedTokenizerBase, answer: list[int], stop: str, window: int) -> int:
    """After how many tokens the harness's criterion sees ``stop`` in the last ``window`` of them; all where never.

    What an answer begins with holds the stop string from some length on: a few decodings find it.
    """

    def seen(tokens: list[int]) -> bool:
        return stop in tokenizer.decode(tokens)

    if not seen(answer):
        return len(answer)
    found = bisect.bisect_left(range(len(answer)), True, lo=1, key=lambda length: seen(answer[:length]))
    if seen(answer[:found][-window:]):
        return found
    # Spread over more tokens than the criterion looks at.
    ends = range(found, len(answer))
    return next((end for end in ends if seen(answer[max(0, end - window) : end])), len(answer))


def choose_batch_size(lm: WatchedLM, longest: int) -> int:
    """The largest power of two up to 64 whose logits for ``longest`` tokens fit on the GPU; 8 on a CPU."""
    if lm.device.type != "cuda":
        return _CPU_BATCH
    size = _LARGEST_BATCH
    while size > 1:
        try:
            tokens = torch.ones((size, longest), dtype=torch.long, device=lm.device)
            torch.nn.functional.log_softmax(lm._model_call(tokens), dim=-1)
            return size
        except torch.OutOfMemoryError:
            size //= 2
        finally:
            torch.cuda.empty_cache()
    return 1


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the harness's own bars, hints and prints: stdout belongs to results."""
    import datasets

    logger, level = logging.getLogger("lm_eval"), logging.getLogger("lm_eval").level
    bars = [(module, module.tqdm) for module in (harness_task, huggingface)]
    had_bars = datasets.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    for module, bar in bars:
        module.tqdm = functools.partial(bar, disable=True)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        for module, bar in bars:
            module.tqdm = bar
        logger.setLevel(level)
        if not had_bars:
            datasets.enable_progress_bars()
