"""CONTRACT 1-9: what a trace holds, which rows are real, where a trace begins."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache, StoppingCriteria, StoppingCriteriaList

import void_ext
from void_ext.store import TraceStore

EOS = 2
pytestmark = pytest.mark.usefixtures("both_ways_of_taking_norms")


def norms_of(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None, **extra: Any) -> torch.Tensor:
    """float64 norms of the residual stream ``[B, T, L+1]``, taken by hooks on the unpatched model."""
    taken: list[torch.Tensor] = []
    layers = model.model.layers
    hooks = [layers[0].register_forward_pre_hook(lambda m, args: taken.append(args[0].double().norm(dim=-1)))]
    hooks += [
        layer.register_forward_hook(lambda m, args, out: taken.append(out.double().norm(dim=-1))) for layer in layers
    ]
    try:
        model(input_ids=ids, attention_mask=mask, **extra)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(taken, dim=-1)


def close(actual: torch.Tensor, expected: torch.Tensor, rtol: float = 2e-6) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=rtol, atol=0)


def first(output: Any) -> torch.Tensor:
    """The stream in a layer's output, which is a tuple for some families of transformers 4.57."""
    return output[0] if isinstance(output, tuple) else output


def like(output: Any, stream: torch.Tensor) -> Any:
    return (stream, *output[1:]) if isinstance(output, tuple) else stream


# ---- 2, 3: phases and content ----


@torch.no_grad()
def test_none_before_the_first_call_and_readable_after_unpatching(tiny: Any, padded_batch: Any) -> None:
    model = tiny("llama")
    ids, mask = padded_batch
    handle = void_ext.patch(model)
    assert handle.trace is None
    model(input_ids=ids, attention_mask=mask)
    handle.unpatch()
    trace = handle.trace
    assert trace is not None
    close(trace.prompt.norms, norms_of(model, ids, mask))
    assert torch.equal(trace.prompt.tokens, ids)
    assert torch.equal(trace.prompt.mask, mask.bool())
    assert trace.prompt.executed.shape == (3, 9, 6)
    assert bool(trace.prompt.executed.all())
    assert trace.response.norms.shape == (3, 0, 7)
    assert trace.response.active().shape == (3, 0, 6)
    assert bool(trace.response.usage().isnan().all())


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("cache", [None, "static"])
@torch.no_grad()
def test_generate_separates_prompt_and_response(
    cache: str | None, use_cache: bool, tiny: Any, padded_batch: Any
) -> None:
    if cache and not use_cache:
        pytest.skip("no cache to be static")
    model = tiny("llama")
    ids, mask = padded_batch
    with void_ext.patch(model) as handle:
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=6,
            min_new_tokens=6,
            do_sample=False,
            use_cache=use_cache,
            cache_implementation=cache,
        )
    trace = handle.trace
    assert trace is not None
    assert trace.prompt.positions == list(range(9))
    # Six tokens were generated; the last one was never consumed.
    assert trace.response.positions == list(range(9, 14))
    assert torch.equal(trace.response.tokens, output[:, 9:14])
    assert torch.equal(trace.prompt.tokens, ids)
    assert torch.equal(trace.prompt.mask, mask.bool())
    full = torch.cat([mask, mask.new_ones(3, 5)], 1)
    expected = norms_of(model, output[:, :14], full, position_ids=(full.cumsum(1) - 1).clamp_min(0))
    real = full[:, :9].bool()
    close(trace.prompt.norms[real], expected[:, :9][real], rtol=1e-4)
    close(trace.response.norms, expected[:, 9:], rtol=1e-4)


@torch.no_grad()
def test_chunked_prefill_is_all_prompt(tiny: Any, padded_batch: Any) -> None:
    model = tiny("llama")
    ids = padded_batch[0][:1]
    settings = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    with void_ext.patch(model) as handle:
        model.generate(input_ids=ids, **settings)
        whole = handle.trace
        model.generate(input_ids=ids, prefill_chunk_size=4, **settings)
        chunked = handle.trace
    assert whole is not None
    assert chunked is not None
    assert chunked.prompt.positions == whole.prompt.positions
    assert chunked.response.positions == whole.response.positions
    close(chunked.prompt.norms, whole.prompt.norms, rtol=1e-4)


@pytest.mark.parametrize("make_cache", [None, DynamicCache, StaticCache])
@torch.no_grad()
def test_plain_calls(make_cache: Any, tiny: Any, padded_batch: Any) -> None:
    model = tiny("llama")
    ids = padded_batch[0][:1]
    expected = norms_of(model, ids)
    with void_ext.patch(model) as handle:
        if make_cache is None:
            cache = model(input_ids=ids[:, :4], use_cache=True).past_key_values
        else:
            cache = make_cache(config=model.config, **({"max_cache_len": 32} if make_cache is StaticCache else {}))
            model(input_ids=ids[:, :4], past_key_values=cache, use_cache=True)
        first = handle.trace
        model(input_ids=ids[:, 4:7], past_key_values=cache, use_cache=True)  # several tokens: still prompt
        model(input_ids=ids[:, 7:8], past_key_values=cache, use_cache=True)  # one token: response
        with handle.phase("prompt"):
            model(input_ids=ids[:, 8:9], past_key_values=cache, use_cache=True)
        trace = handle.trace
        assert trace is not None
        assert first is not None
        assert trace.prompt.positions == [0, 1, 2, 3, 4, 5, 6, 8]
        assert trace.response.positions == [7]
        close(trace.prompt.norms[:, :7], expected[:, :7], rtol=1e-4)
        close(trace.response.norms, expected[:, 7:8], rtol=1e-4)
        model(input_ids=ids[:, :2])  # without a cache: a new trace
        newer = handle.trace
        assert newer is not None
        assert newer.prompt.positions == [0, 1]
        assert trace.response.positions == [7]
        handle.reset()
        assert handle.trace is None


@torch.no_grad()
def test_cropping_overwrites_rows(tiny: Any, padded_batch: Any) -> None:
    model = tiny("llama")
    ids = padded_batch[0][:1]
    with void_ext.patch(model) as handle:
        cache = model(input_ids=ids, use_cache=True).past_key_values
        cache.crop(-4)
        model(input_ids=ids[:, 1:4], past_key_values=cache, use_cache=True)
        trace = handle.trace
    assert trace is not None
    assert trace.prompt.positions == list(range(8))
    assert trace.prompt.tokens[0].tolist() == ids[0, :5].tolist() + ids[0, 1:4].tolist()


@torch.no_grad()
def test_going_on_with_a_conversation(tiny: Any, padded_batch: Any) -> None:
    """A second generate() on the same cache: what was generated before belongs to the prompt now."""
    model = tiny("llama")
    ids = padded_batch[0][:1]
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    with void_ext.patch(model) as handle:
        first = model.generate(input_ids=ids, **settings)
        longer = torch.cat([first.sequences, ids[:, :3]], 1)
        model.generate(
            input_ids=longer, attention_mask=torch.ones_like(longer), past_key_values=first.past_key_values, **settings
        )
        trace = handle.trace
    assert trace is not None
    assert trace.prompt.positions == list(range(longer.shape[1]))
    assert torch.equal(trace.prompt.tokens, longer)
    assert trace.response.positions == list(range(longer.shape[1], longer.shape[1] + 3))
    close(trace.prompt.norms, norms_of(model, longer), rtol=1e-4)


@torch.no_grad()
def test_embeddings_have_no_tokens(tiny: Any, padded_batch: Any) -> None:
    model = tiny("llama")
    ids, mask = padded_batch
    embeds = model.get_input_embeddings()(ids)
    with void_ext.patch(model) as handle:
        model(inputs_embeds=embeds, attention_mask=mask)
        assert handle.trace is not None
        assert bool((handle.trace.prompt.tokens == -1).all())
        model.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        assert handle.trace.prompt.positions == list(range(9))
        assert bool((handle.trace.prompt.tokens == -1).all())
        assert bool((handle.trace.response.tokens >= 0).all())


@torch.no_grad()
def test_assisted_generation(tiny: Any, padded_batch: Any) -> None:
    """Candidates that were rejected leave no rows behind."""
    model, assistant = tiny("llama"), tiny("llama", seed=1)
    ids = padded_batch[0][:1]
    settings = {"max_new_tokens": 8, "eos_token_id": None, "do_sample": False}
    plain = model.generate(input_ids=ids, **settings)
    with void_ext.patch(model) as handle:
        output = model.generate(input_ids=ids, assistant_model=assistant, **settings)
    assert torch.equal(output, plain)
    trace = handle.trace
    assert trace is not None
    assert trace.prompt.positions == list(range(9))
    consumed = trace.response.tokens.shape[1]
    assert consumed >= 7
    assert torch.equal(trace.response.tokens[:, :7], output[:, 9:16])


def test_what_was_cropped_is_not_real_where_nobody_wrote_again() -> None:
    """Calls that the patch does not see may fill a cache between two that it does."""
    store = TraceStore(1, 2, torch.device("cpu"))
    norms = {"norms": torch.ones(1, 6, 3)}
    store.write(0, 6, [0] * 6, 0, norms, None, None)
    store.crop(2)
    store.write(4, 1, [1], 1, {"norms": norms["norms"][:, :1]}, None, None)
    assert store.view("mask").tolist() == [[True, True, False, False, True]]


# ---- 4: real rows ----


def force_tokens(model: Any, rows: list[list[int]]) -> Any:
    """A logits processor that makes row b generate rows[b], one token a step."""

    class Forced:
        def __init__(self) -> None:
            self.step = 0

        def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            forced = torch.full_like(scores, -torch.inf)
            for row, tokens in enumerate(rows):
                forced[row, tokens[min(self.step, len(tokens) - 1)]] = 0
            self.step += 1
            return forced

    return [Forced()]


def test_rows_end_before_their_eos(tiny: Any, padded_batch: Any) -> None:
    model = tiny("llama")
    ids, mask = padded_batch
    rows = [[5, 6, EOS], [5, 6, 7, 8, 9, 10], [EOS]]
    with void_ext.patch(model) as handle:
        output = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=6, logits_processor=force_tokens(model, rows)
        )
    assert output.shape[1] == 15
    trace = handle.trace
    assert trace is not None
    assert trace.response.mask.tolist() == [
        [True, True, False, False, False],
        [True, True, True, True, True],
        [False, False, False, False, False],
    ]
    # An eos in the prompt (chat templates end turns with it) ends nothing.
    assert torch.equal(trace.prompt.mask, mask.bool())
    usage = trace.response.usage()
    active = trace.response.active()
    real = torch.cat([active[0, :2], active[1]])
    torch.testing.assert_close(usage, real.float().mean(0))
    per_row = trace.response.usage(per="row")
    torch.testing.assert_close(per_row[1], active[1].float().mean(0))
    assert bool(per_row[2].isnan().all())


def test_the_effective_eos_set(tiny: Any, padded_batch: Any) -> None:
    model = tiny("llama")
    ids, mask = padded_batch
    rows = [[5, 40, 6, 41, 7, 8], [5, 6, EOS, 40, 8, 8], [5, 6, 7, 8, 41, 8]]

    def run(**extra: Any) -> list[int]:
        model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=6, logits_processor=force_tokens(model, rows), **extra
        )
        assert handle.trace is not None
        return handle.trace.response.mask.sum(1).tolist()

    with void_ext.patch(model) as handle:
        assert run(eos_token_id=[40, 41]) == [1, 3, 4]
        assert run(eos_token_id=40) == [1, 3, 5]
        config = type(model.generation_config)(eos_token_id=[40, 41], pad_token_id=0, max_new_tokens=6)
        model.generate(ids, config, attention_mask=mask, logits_processor=force_tokens(model, rows))
        assert handle.trace is not None
        assert handle.trace.response.mask.sum(1).tolist() == [1, 3, 4]
        model.generation_config.eos_token_id = 7
        assert run() == [4, 5, 2]


class StopAt(StoppingCriteria):
    """Ends a row once it has generated ``token``."""

    def __init__(self, token: int):
        self.token = token

    def __call__(self, ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return ids[:, -1] == self.token


def test_rows_ended_by_a_criterion(tiny: Any, padded_batch: Any) -> None:
    """A row alone ends before its last token is consumed; in a batch it must say the same."""
    model = tiny("llama")
    ids, mask = padded_batch
    rows = [[5, 6, 33], [5, 6, 7, 8, 9, 10], [33]]
    criteria = StoppingCriteriaList([StopAt(33)])
    with void_ext.patch(model) as handle:
        model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=6,
            stopping_criteria=criteria,
            logits_processor=force_tokens(model, rows),
        )
        assert handle.trace is not None
        together = handle.trace.response.mask.sum(1).tolist()
        alone = []
        for row in range(3):
            model.generate(
                input_ids=ids[row : row + 1],
                attention_mask=mask[row : row + 1],
                max_new_tokens=6,
                stopping_criteria=criteria,
                logits_processor=force_tokens(model, rows[row : row + 1]),
            )
            alone.append(int(handle.trace.response.mask.sum()))
        # With embeddings for a prompt, generate() returns the new tokens alone.
        model.generate(
            inputs_embeds=model.get_input_embeddings()(ids),
            attention_mask=mask,
            max_new_tokens=6,
            stopping_criteria=criteria,
            logits_processor=force_tokens(model, rows),
        )
        assert handle.trace.response.mask.sum(1).tolist() == together
    assert together == alone == [2, 5, 0]


@torch.no_grad()
def test_right_padding_and_prepared_masks(tiny: Any, padded_batch: Any) -> None:
    model = tiny("llama")
    ids, mask = padded_batch
    right = mask.flip(1)
    with void_ext.patch(model) as handle:
        model(input_ids=ids.flip(1), attention_mask=right)
        assert handle.trace is not None
        assert torch.equal(handle.trace.prompt.mask, right.bool())
        allowed = torch.ones(9, 9, dtype=torch.bool).tril() & mask.bool()[:, None, None, :]
        model(input_ids=ids, attention_mask=allowed)
        assert torch.equal(handle.trace.prompt.mask, mask.bool())
        additive = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)
        model(input_ids=ids, attention_mask=additive)
        assert torch.equal(handle.trace.prompt.mask, mask.bool())


# ---- 5, 6: verdicts and edges ----


@torch.no_grad()
def test_granularity_pools_one_forward_call(tiny: Any, padded_batch: Any) -> None:
    model = tiny("llama")
    ids, mask = padded_batch
    for granularity in ("sequence", "batch"):
        with void_ext.patch(model, granularity=granularity, alpha=0.3) as handle:
            model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        assert handle.trace is not None
        prompt, response = handle.trace.prompt, handle.trace.response
        squares = prompt.norms.double().square() * prompt.mask[..., None]
        pooled = squares.sum(1) if granularity == "sequence" else squares.sum((0, 1), keepdim=True)[0]
        expected = void_ext.void_mask(pooled.sqrt().float(), 0.3)
        assert torch.equal(prompt.active(), expected[:, None].expand(3, 9, 6))
        if granularity == "sequence":
            token = void_ext.void_mask(response.norms.flatten(0, 1), 0.3).view(3, 3, 6)
            assert torch.equal(response.active(), token)
        else:
            assert torch.equal(response.active()[0], response.active()[2])


@torch.no_grad()
def test_any_alpha_after_the_fact(tiny: Any, padded_batch: Any) -> None:
    model = tiny("llama")
    ids, mask = padded_batch
    with void_ext.patch(model, alpha=0.8) as handle:
        model(input_ids=ids, attention_mask=mask)
    trace = handle.trace
    assert trace is not None
    deltas = trace.prompt.deltas()
    for alpha in (0.0, 0.2, 0.8, 3.0):
        expected = torch.ones_like(deltas, dtype=torch.bool)
        expected[..., 0] = ~(deltas[..., 0] < 0)
        for layer in range(1, 6):
            before = deltas[..., :layer]
            expected[..., layer] = ~(deltas[..., layer] < alpha * (before.amax(-1) - before.amin(-1)))
        assert torch.equal(trace.prompt.active(alpha), expected)
        real = expected[mask.bool()].float().mean(0)
        torch.testing.assert_close(trace.prompt.usage(alpha), real)
    for alpha in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"alpha: expected a finite number >= 0, got {alpha}"):
            trace.prompt.active(alpha)
    with pytest.raises(ValueError, match="per: expected None or 'row', got 'layer'"):
        trace.prompt.usage(per="layer")


@torch.no_grad()
def test_optional_tables(tiny: Any, padded_batch: Any) -> None:
    ids, mask = padded_batch
    for family in ("llama", "gpt2"):
        model = tiny(family)
        with void_ext.patch(model, updates=True, halves=family == "llama") as handle:
            states = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
        assert handle.trace is not None
        prompt = handle.trace.prompt
        assert prompt.updates is not None
        for layer in range(5):  # the last hidden state is already normed
            change = (states[layer + 1].double() - states[layer].double()).norm(dim=-1)
            torch.testing.assert_close(prompt.updates[..., layer], change.float(), rtol=1e-5, atol=0)
        if family == "llama":
            middle: list[torch.Tensor] = []
            norm = model.model.layers[3].post_attention_layernorm
            hook = norm.register_forward_pre_hook(lambda m, args: middle.append(args[0]))  # noqa: B023
            model(input_ids=ids, attention_mask=mask)
            hook.remove()
            assert prompt.halves is not None
            close(prompt.halves[..., 3], middle[0].double().norm(dim=-1))
        else:
            assert prompt.halves is None


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_no_active_layer_exits_with_the_embedding(family: str, tiny: Any, padded_batch: Any) -> None:
    model = tiny(family)
    ids = padded_batch[0].clamp_min(3)  # the pad token's embedding is zero: its deltas are, too, and equality is active
    body = model.model if family == "llama" else model.transformer
    layers, norm = (body.layers, body.norm) if family == "llama" else (body.h, body.ln_f)
    seen: list[torch.Tensor] = []
    norm.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    entered: list[torch.Tensor] = []
    layers[0].register_forward_pre_hook(lambda m, args: entered.append(args[0].clone()))
    # Every layer takes a tenth off the stream: all deltas are negative, and below any range before them.
    for index, layer in enumerate(layers):
        layer.register_forward_hook(lambda m, args, out, factor=0.9 - 0.1 * index: like(out, args[0] * factor))
    with void_ext.patch(model, mode="exit", alpha=0.0) as handle:
        logits = model(input_ids=ids).logits
    assert handle.trace is not None
    assert not bool(handle.trace.prompt.active().any())
    assert torch.equal(logits, model.lm_head(norm(entered[0])))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_norms_are_of_the_stream_as_hooks_left_it(
    family: str, late: bool, in_place: bool, mode: Any, tiny: Any, padded_batch: Any
) -> None:
    model = tiny(family)
    ids, _ = padded_batch
    layers = model.model.layers if family == "llama" else model.transformer.h

    def steer_all() -> None:
        for index in (1, 5):
            layers[index].register_forward_hook(
                lambda m, a, o: like(o, first(o).mul_(3.0) if in_place else first(o) * 3.0)
            )

    if not late:
        steer_all()
    with void_ext.patch(model) as handle, mode():
        if late:
            steer_all()
        seen: list[torch.Tensor] = []
        layers[2].register_forward_pre_hook(lambda m, args: seen.append(args[0].clone()))
        model(input_ids=ids)
    assert handle.trace is not None
    norms = handle.trace.prompt.norms
    close(norms[..., 2], seen[0].double().norm(dim=-1))
    real = ids != 0  # the pad token's embedding is zero, and stays zero
    assert float((norms[..., 6] / norms[..., 5])[real].min()) > 1.5


# ---- 8: cost ----


@torch.no_grad()
def test_buffers_grow_by_doubling_and_can_be_released(tiny: Any, padded_batch: Any) -> None:
    model = tiny("llama")
    ids = padded_batch[0][:1]
    with void_ext.patch(model) as handle:
        cache = model(input_ids=ids, use_cache=True).past_key_values
        capacities = set()
        for _ in range(120):
            model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
            capacities.add(handle._recorder.store.capacity)
        assert capacities == {64, 128, 256}
        trace = handle.trace
        handle.release()
        assert handle.trace is None
        assert trace is not None
        assert trace.response.norms.shape == (1, 120, 7)
        model(input_ids=ids)
        assert handle.trace is not None


class CountSyncs(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the operations that would make the host wait for a device."""

    WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += any(name in func.name() for name in self.WAITS)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("granularity", ["token", "sequence", "batch"])
@pytest.mark.parametrize("mode", ["trace", "exit"])
@pytest.mark.parametrize("cache", [None, "static"])
def test_no_host_synchronisation_is_added(
    cache: str | None, mode: str, granularity: str, tiny: Any, padded_batch: Any
) -> None:
    model = tiny("llama")
    ids, mask = padded_batch

    def run() -> int:
        with CountSyncs() as counter:
            model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=6,
                min_new_tokens=6,
                do_sample=False,
                cache_implementation=cache,
            )
        return counter.count

    run()  # transformers 4.57 keeps a static cache on the model and finds it filled in the second run
    before = run()
    with void_ext.patch(model, mode=mode, granularity=granularity, updates=True, halves=True) as handle:
        assert run() == before
        assert handle.trace is not None


@torch.no_grad()
def test_real_tokens_tell_padding_where_no_mask_is_given(tiny: Any) -> None:
    """Right padding without a mask: the model is called as before, and only the tokens said to be real count."""
    model = tiny("llama")
    ids = torch.randint(3, 96, (2, 7), generator=torch.Generator().manual_seed(1))
    real = torch.ones(2, 7, dtype=torch.bool)
    real[1, 4:] = False
    expected = model(ids).logits
    with void_ext.patch(model) as handle:
        with handle.real_tokens(real):
            logits = model(ids).logits
            assert handle.trace is not None
            assert torch.equal(handle.trace.prompt.mask, real)
            model(ids, attention_mask=torch.ones_like(ids))  # a mask of the call's own comes first
            assert bool(handle.trace.prompt.mask.all())
            model(ids[:1])  # another shape
            assert bool(handle.trace.prompt.mask.all())
        model(ids)
        assert bool(handle.trace.prompt.mask.all())
        with (
            pytest.raises(ValueError, match=r"mask: expected a tensor \[batch, tokens\], got shape \(7,\)"),
            handle.real_tokens(real[0]),
        ):
            pass
    assert torch.equal(logits, expected)
