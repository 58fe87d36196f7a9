"""The watched harness model: answers of plain lm-eval, bit for bit, and statistics of real tokens alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

import void_ext
from void_ext.evaluate import ModeSpec, Settings, run
from void_ext.evaluate.tally import Tally
from void_ext.testing import assert_close, tolerance

pytest.importorskip("lm_eval")

NAMES = ("choices", "telling", "writing")


def plain_answers(model: Any, tokenizer: Any, task: Any, batch_size: int) -> tuple[list[Any], dict[str, Any]]:
    """What lm-eval says without any of ours: answers by document, and its metrics."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size, backend="causal")
    results = evaluate(lm, {"tasks": {"task": task}, "groups": {}}, bootstrap_iters=0, log_samples=True)
    samples = sorted(results["samples"]["task"], key=lambda sample: sample["doc_id"])
    answers = [[a[0] if isinstance(a, tuple) else a for a in sample["filtered_resps"]] for sample in samples]
    return answers, results["results"]["task"]


@pytest.mark.parametrize("batch_size", [1, 5])
@pytest.mark.parametrize("name", NAMES)
def test_dense_answers_are_plain_lm_evals(
    name: str, batch_size: int, tiny: Any, tokenizer: Any, load: Callable[..., Any]
) -> None:
    model = tiny("llama")
    expected, metrics = plain_answers(model, tokenizer, load(name)[name].task, batch_size)
    nothing = void_ext.VoidPlan.dense(6)
    report = run(
        model, tokenizer, load(name), [ModeSpec.dense(), ModeSpec.skip(plan=nothing)], Settings(batch_size=batch_size)
    )
    for cell in report.cells:
        assert [item.answers for item in cell.items] == expected  # floats and all
        for metric in cell.items[0].metrics:
            assert report.score(name, cell.mode, metric).score.value == metrics[f"{metric},none"]
    assert tokenizer.pad_token is None  # the caller's own is left alone


def test_exit_answers_are_those_of_a_model_patched_so(tiny: Any, tokenizer: Any, load: Callable[..., Any]) -> None:
    model = tiny("llama")
    with void_ext.patch(model, mode="exit", alpha=0.3):
        expected, _ = plain_answers(model, tokenizer, load("choices")["choices"].task, 4)
    dense, _ = plain_answers(model, tokenizer, load("choices")["choices"].task, 4)
    report = run(model, tokenizer, load("choices"), [ModeSpec.dense(), ModeSpec.exit(0.3)], Settings(batch_size=4))
    assert [item.answers for item in report.cells[1].items] == expected
    assert expected != dense


class Rows(Tally):
    """Also keeps the norms of every real token, by the tokens up to it."""

    kept: dict[tuple[str, tuple[int, ...]], torch.Tensor]

    def _count(self, phase: Any) -> Any:
        prompts = self._before if phase.name == "response" else [[] for _ in phase.mask]
        for row, before in enumerate(prompts):
            for norms, token, real in zip(phase.norms[row], phase.tokens[row].tolist(), phase.mask[row], strict=True):
                if real:
                    before.append(token)
                    self.kept[phase.name, tuple(before)] = norms
        self._before = prompts
        return super()._count(phase)


@pytest.mark.parametrize("name", NAMES)
def test_statistics_do_not_depend_on_batch_size_or_padding(
    name: str, tiny: Any, tokenizer: Any, load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32: the same real tokens, norms to tolerance, and voids that flip only where a rounding can flip them."""
    model, alpha = tiny("llama"), 0.4
    found = {}
    for batch_size in (1, 5):
        Rows.kept = {}
        monkeypatch.setattr("void_ext.evaluate.tally.Tally", Rows)
        report = run(
            model, tokenizer, load(name), [ModeSpec.dense(alpha)], Settings(batch_size=batch_size, alpha=alpha)
        )
        found[batch_size] = (report.cells[0].usage, Rows.kept)
    (alone, norms_alone), (together, norms_together) = found[1], found[5]
    assert norms_alone.keys() == norms_together.keys()
    assert len(norms_alone) > 50
    left, right = (torch.stack([norms[key] for key in norms_alone]) for norms in (norms_together, norms_alone))
    limit = tolerance("batched_norm", torch.float32)
    assert_close(left, right, limit)
    # A void may flip where delta - alpha * (max - min) is within what its norms may be off by: two in each delta.
    reach = (2 + 4 * alpha) * limit.rtol * right.max(1).values
    deltas = right.diff(dim=1)
    margin = torch.full_like(deltas, torch.inf)
    for layer in range(deltas.shape[1]):
        before = deltas[:, :layer]
        spread = before.max(1).values - before.min(1).values if layer else torch.zeros(len(deltas))
        margin[:, layer] = (deltas[:, layer] - alpha * spread).abs()
    doubtful = (margin <= reach[:, None]).sum(0)
    for phase in ("prompt", "response"):
        assert together[phase].tokens == alone[phase].tokens
        for layer, (a, b) in enumerate(zip(together[phase].active["0.4"], alone[phase].active["0.4"], strict=True)):
            assert abs(a - b) <= int(doubtful[layer])
    assert int(doubtful.sum()) < 0.02 * deltas.numel()  # else the line above would let anything pass


@pytest.mark.parametrize("batch_size", [1, 5])
def test_padding_does_not_count(batch_size: int, tiny: Any, tokenizer: Any, load: Callable[..., Any]) -> None:
    report = run(tiny("llama"), tokenizer, load("choices"), [ModeSpec.dense()], Settings(batch_size=batch_size))
    task = load("choices")["choices"].task
    task.build_all_requests(rank=0, world_size=1)
    # One token a character; the last one is never an input, and requests with the same input share a call.
    inputs = {("".join(request.args))[:-1] for request in task.instances}
    usage = report.cells[0].usage
    assert usage["prompt"].tokens == sum(map(len, inputs))
    assert usage["response"].tokens == 0
    assert usage["prompt"].executed == [usage["prompt"].tokens] * 6


def test_generated_tokens_are_the_response(tiny: Any, tokenizer: Any, load: Callable[..., Any]) -> None:
    report = run(tiny("llama"), tokenizer, load("writing"), [ModeSpec.dense()], Settings(batch_size=3))
    cell = report.cells[0]
    task = load("writing")["writing"].task
    assert cell.usage["prompt"].tokens == sum(len(doc["prompt"]) for doc in task.eval_docs)
    # Six are generated at most, and the last is not consumed.
    assert 0 < cell.usage["response"].tokens <= 5 * len(cell.items)


def test_answers_end_where_the_harness_would_stop_them(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.models.utils_hf import stop_sequences_criteria

    from void_ext.evaluate.harness import stop_position

    generator = torch.Generator().manual_seed(0)
    for stop in ("a", "a b", "a b a", "</s>"):  # this tokenizer puts spaces between its characters
        (criterion,) = stop_sequences_criteria(tokenizer, [stop], 0, 1)
        ends = []
        for _ in range(60):
            answer = torch.tensor([2, *tokenizer.encode("abc")])[torch.randint(4, (1, 40), generator=generator)]
            criterion.done_tracker = [False]
            steps = (said for said in range(1, 40) if criterion(answer[:, :said], None))
            expected = next(steps, 40)
            assert stop_position(tokenizer, answer[0].tolist(), stop, criterion.sequence_id_len) == expected
            ends.append(expected)
        assert len(set(ends)) > 3
    # Some decodings, not one a token: these go through the whole answer each time.
    calls: list[int] = []
    decode = type(tokenizer).decode
    monkeypatch.setattr(type(tokenizer), "decode", lambda *given, **named: calls.append(1) or decode(*given, **named))
    assert stop_position(tokenizer, tokenizer.encode("b" * 200 + "a" + "b" * 55), "a", 3) == 201
    assert len(calls) <= 10


def test_a_stop_string_wider_than_the_harness_looks_does_not_count(tokenizer: Any) -> None:
    from void_ext.evaluate.harness import stop_position

    assert stop_position(tokenizer, tokenizer.encode("xabcdx"), "a b c d", 3) == 6
    assert stop_position(tokenizer, tokenizer.encode("xabcdx"), "a b c d", 4) == 5


def test_looking_for_ends_is_not_the_requests_time(
    tiny: Any, tokenizer: Any, load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    from void_ext.evaluate import harness

    clock, looks = [0.0], []
    position = harness.stop_position

    def slow(*given: Any) -> int:
        clock[0] += 5
        looks.append(given)
        return position(*given)

    monkeypatch.setattr(harness, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(harness, "stop_position", slow)
    report = run(tiny("llama"), tokenizer, load("writing"), [ModeSpec.dense()], Settings(batch_size=4))
    assert looks
    assert report.cells[0].seconds == 0


def test_another_way_of_batching_is_noticed(
    tiny: Any, tokenizer: Any, load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from void_ext.evaluate.harness import WatchedLM

    right = WatchedLM._lengths_of_batches
    monkeypatch.setattr(WatchedLM, "_lengths_of_batches", lambda lm, requests: right(lm, requests)[::-1])
    with pytest.raises(RuntimeError, match=r"padding cannot be told from tokens; 0\.4\.13 is known to work"):
        run(tiny("llama"), tokenizer, load("choices"), [ModeSpec.dense()], Settings(batch_size=5))


def test_nothing_of_the_harness_reaches_stdout(
    tiny: Any, tokenizer: Any, load: Callable[..., Any], capfd: pytest.CaptureFixture[str]
) -> None:
    tasks = load(*NAMES)
    capfd.readouterr()
    run(tiny("llama"), tokenizer, tasks, [ModeSpec.dense()])
    assert capfd.readouterr() == ("", "")
