"""Patched models under ``torch.compile``: captured whole, recorded as eager ones are, compiled once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation import CompileConfig

import void_ext
from python_tests.compiling import UNGROUPED, decode, graphs
from void_ext.patching import call
from void_ext.testing.compare import assert_bits_equal
from void_ext.testing.tolerance import tolerance

LAYERS, LENGTH, STEPS = 2, 9, 5
pytestmark = pytest.mark.usefixtures("nothing_compiled")


def compiled(model: Any, backend: str = "eager") -> Any:
    return torch.compile(model, fullgraph=True, backend=backend)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("llama", {"fuse": "norm"}),
        ("llama", {"updates": True, "halves": True}),
        ("llama", {"mode": "exit", "granularity": "sequence"}),
        ("gemma2", {"mode": "exit", "fuse": "norm"}),
        ("gpt2", {"updates": True}),
        ("bloom", {"mode": "exit", "reference_quirks": True}),
    ],
    ids=str,
)
@torch.no_grad()
def test_captured_whole(family: str, options: dict[str, Any], tiny: Any, padded_batch: Any) -> None:
    model = tiny(family, layers=LAYERS)
    ids, mask = padded_batch
    with void_ext.patch(model, **options) as handle:
        expected = model(input_ids=ids, attention_mask=mask).logits
        eager = handle.trace.prompt
        forward = compiled(model, "aot_eager")
        actual = forward(input_ids=ids, attention_mask=mask).logits
        trace = handle.trace.prompt
    assert_bits_equal(actual, expected)
    assert graphs() == 1
    assert_bits_equal(trace.norms, eager.norms)
    assert torch.equal(trace.mask, eager.mask)
    assert torch.equal(trace.tokens, eager.tokens)
    for name in ("updates", "halves"):
        if options.get(name):
            assert_bits_equal(getattr(trace, name), getattr(eager, name))


@pytest.mark.parametrize("many", [False, True], ids=["few rows", "many rows"])
@torch.no_grad()
def test_what_of_ours_is_in_the_graph(
    many: bool, tiny: Any, padded_batch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few rows' adds stay torch's, for inductor to fuse: their norms are one op at the end. Many rows' norms ride on
    the adds."""
    if many:
        monkeypatch.setattr(call, "_KEPT_ELEMENTS", dict.fromkeys(call._KEPT_ELEMENTS, 0))
    model = tiny("llama", layers=LAYERS)
    ids, mask = padded_batch
    found: list[str] = []

    def look(graph: torch.fx.GraphModule, example: Any) -> Any:
        targets = [str(node.target) for node in graph.graph.nodes]
        found.extend(target.split(".")[1] for target in targets if target.startswith("void_ext."))
        return graph.forward

    with void_ext.patch(model) as handle:
        expected = model(input_ids=ids, attention_mask=mask).logits
        eager = handle.trace.prompt
        actual = torch.compile(model, fullgraph=True, backend=look)(input_ids=ids, attention_mask=mask).logits
    assert found == (["row_l2norm"] + ["add_l2norm"] * LAYERS if many else ["streams_l2norm"])
    assert_bits_equal(actual, expected)
    assert_bits_equal(handle.trace.prompt.norms, eager.norms)


@pytest.mark.parametrize("mode", ["trace", "skip"])
@torch.no_grad()
def test_another_final_norm_than_at_patching(mode: str, tiny: Any, padded_batch: Any) -> None:
    """Nothing settles the last layer's stream then but the end of the call."""
    model = tiny("llama", layers=LAYERS)
    inputs = dict(zip(("input_ids", "attention_mask"), padded_batch, strict=True))
    plan = None if mode == "trace" else void_ext.VoidPlan.from_layers(LAYERS, skip=[0])
    with void_ext.patch(model, mode=mode, plan=plan) as handle:
        model.model.norm = torch.nn.LayerNorm(model.config.hidden_size)
        forward = compiled(model, "aot_eager")
        for scale in (1.0, 3.0):  # a table that a call does not fill has what the one before left there
            model.model.embed_tokens.weight.mul_(scale)
            forward(**inputs)
            found = handle.trace.prompt.norms
            model(**inputs)
            eager = handle.trace.prompt.norms
            assert_bits_equal(found, eager)


@torch.inference_mode()
def test_no_token_is_compiled_anew(tiny: Any) -> None:
    model = tiny("llama", layers=LAYERS, **UNGROUPED)
    ids = torch.randint(3, 96, (2, LENGTH))
    with void_ext.patch(model) as handle:
        expected = decode(model, model, ids, STEPS)
        eager = handle.trace
        forward = compiled(model)
        decode(forward, model, ids, 2)
        before = graphs()
        with torch._dynamo.config.patch(error_on_recompile=True):
            actual = decode(forward, model, ids, STEPS)
        assert graphs() == before
        trace = handle.trace
    assert_bits_equal(actual, expected)
    for phase in ("prompt", "response"):
        assert_bits_equal(getattr(trace, phase).norms, getattr(eager, phase).norms)
        assert torch.equal(getattr(trace, phase).tokens, getattr(eager, phase).tokens)
    assert trace.response.norms.shape == (2, STEPS, LAYERS + 1)


@torch.no_grad()
def test_dynamic_cache_is_compiled_for_any_length(tiny: Any) -> None:
    model = tiny("llama", layers=LAYERS)
    ids = torch.randint(3, 96, (1, LENGTH))

    def run(forward: Any) -> Tensor:
        output, logits = model(input_ids=ids), []
        for _ in range(STEPS):
            output = forward(input_ids=output.logits[:, -1:].argmax(-1), past_key_values=output.past_key_values)
            logits.append(output.logits)
        return torch.cat(logits, 1)

    with void_ext.patch(model) as handle:
        expected, eager = run(model), handle.trace
        forward = compiled(model)
        run(forward)
        before = graphs()
        with torch._dynamo.config.patch(error_on_recompile=True):
            actual = run(forward)
        assert graphs() == before <= 2
    assert_bits_equal(actual, expected)
    assert_bits_equal(handle.trace.response.norms, eager.response.norms)


@pytest.mark.parametrize("cache", ["static", None])
def test_generate_compiles(cache: str | None, tiny: Any, padded_batch: Any) -> None:
    model = tiny("llama", layers=LAYERS, **UNGROUPED)
    ids, mask = padded_batch
    config = CompileConfig(backend="eager", mode=None, fullgraph=True)
    config._compile_all_devices = True

    def run(**more: Any) -> Tensor:
        return model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=6,
            do_sample=False,
            cache_implementation=cache,
            **more,
        )

    expected = run()
    with void_ext.patch(model) as handle:
        assert torch.equal(run(), expected)
        eager = handle.trace
        assert graphs() == 0
        run(compile_config=config)
        first = graphs()
        assert (first > 0) == (cache == "static")
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert torch.equal(run(compile_config=config), expected)
        assert graphs() == first
        trace = handle.trace
    for phase in ("prompt", "response"):
        assert_bits_equal(getattr(trace, phase).norms, getattr(eager, phase).norms)
        assert torch.equal(getattr(trace, phase).mask, getattr(eager, phase).mask)


def test_the_compiled_forward_of_generate_is_dropped(tiny: Any, padded_batch: Any) -> None:
    model = tiny("llama", layers=LAYERS)
    config = CompileConfig(backend="eager", mode=None)
    config._compile_all_devices = True

    def run() -> None:
        model.generate(
            input_ids=padded_batch[0], max_new_tokens=4, cache_implementation="static", compile_config=config
        )

    run()
    assert "_compiled_call" in model.__dict__
    with void_ext.patch(model) as handle:
        assert "_compiled_call" not in model.__dict__
        run()
        assert handle.trace.response.norms.shape[1] > 0
        assert "_compiled_call" in model.__dict__
    assert "_compiled_call" not in model.__dict__
    assert "_last_compile_config" not in model.__dict__


def _module(model: Any) -> Any:
    return compiled(model)


def _in_place(model: Any) -> Any:
    model.compile(fullgraph=True, backend="eager")
    return model


def _forward(model: Any) -> Any:
    model.forward = compiled(model.forward)
    return model


@pytest.mark.parametrize(("family", "way"), [("llama", _module), ("gpt2", _in_place), ("llama", _forward)])
@torch.no_grad()
def test_compiled_before_or_after_patching(family: str, way: Callable[[Any], Any], tiny: Any) -> None:
    model = tiny(family, layers=LAYERS)
    ids = torch.randint(3, 95, (2, LENGTH))
    expected = model(input_ids=ids).logits
    forward = way(model)
    forward(input_ids=ids)
    if way is _forward:
        with pytest.raises(void_ext.UnsupportedModelError, match=r"replaced by a compiled one.*del that attribute"):
            void_ext.patch(model)
        del model.forward
    for mode in ("trace", "exit"):  # what one patch compiled is not what another runs
        if way is _forward:
            break
        with void_ext.patch(forward, mode=mode) as handle:
            before = graphs()
            actual = forward(input_ids=ids).logits
            assert graphs() == before + 1
            assert handle.trace.prompt.norms.shape == (2, LENGTH, LAYERS + 1)
            assert mode == "exit" or torch.equal(actual, expected)
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert_bits_equal(forward(input_ids=ids).logits, expected)
    handle = void_ext.patch(model)
    forward = way(model)
    assert_bits_equal(forward(input_ids=ids).logits, expected)
    trace = handle.trace
    assert trace.prompt.norms.shape == (2, LENGTH, LAYERS + 1)
    handle.unpatch()
    assert_bits_equal(forward(input_ids=ids + 1).logits, tiny(family, layers=LAYERS)(input_ids=ids + 1).logits)
    assert torch.equal(trace.prompt.tokens, ids)  # recorded nothing since


@torch.no_grad()
def test_patches_do_not_use_up_the_graphs_of_each_other(tiny: Any) -> None:
    model = tiny("llama", layers=LAYERS)
    ids = torch.randint(3, 96, (2, LENGTH))
    forward = compiled(model)
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        for _ in range(4):
            with void_ext.patch(model) as handle:
                forward(input_ids=ids)
                assert handle.trace is not None
    assert graphs() == 4


@torch.no_grad()
def test_inside_of_a_function(tiny: Any) -> None:
    model = tiny("llama", layers=LAYERS)
    ids = torch.randint(3, 96, (2, LENGTH))
    expected = model(input_ids=ids).logits * 2

    def function(ids: Tensor) -> Tensor:
        return model(input_ids=ids).logits * 2

    with void_ext.patch(model) as handle:
        assert_bits_equal(torch.compile(function, backend="eager")(ids), expected)
        assert handle.trace.prompt.norms.shape == (2, LENGTH, LAYERS + 1)
        handle.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported, match="Compile the patched model itself"):
            compiled(lambda ids: function(ids))(ids)
        model.train()  # records nothing, and so breaks no graph
        assert_bits_equal(compiled(lambda ids: function(ids))(ids), expected)
        model.eval()
        assert handle.trace is None
    assert_bits_equal(compiled(lambda ids: function(ids))(ids), expected)


@pytest.mark.parametrize("fullgraph", [True, False])
@torch.no_grad()
def test_parts_are_refused(fullgraph: bool, tiny: Any) -> None:
    model = tiny("llama", layers=LAYERS)
    ids = torch.randint(3, 96, (2, LENGTH))
    with void_ext.patch(model) as handle:
        body = torch.compile(model.model, fullgraph=fullgraph, backend="eager")
        with pytest.raises(RuntimeError, match=r"LlamaModel was compiled as a part .* Compile the patched model"):
            body(input_ids=ids)
        model(input_ids=ids)
        assert handle.trace is not None
    model.model.layers[1].compile(backend="eager")
    with pytest.raises(void_ext.UnsupportedModelError, match=r"layer 1 went through torch\.compile by itself"):
        void_ext.patch(model)


def test_gradients_and_training(tiny: Any) -> None:
    model = tiny("llama", layers=LAYERS)
    ids = torch.randint(3, 96, (2, LENGTH))

    def gradients(forward: Any) -> list[Tensor]:
        model.zero_grad()
        forward(input_ids=ids).logits.square().mean().backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    expected = gradients(compiled(model, "aot_eager"))
    with void_ext.patch(model) as handle:
        actual = gradients(compiled(model, "aot_eager"))
        assert handle.trace.prompt.norms.shape == (2, LENGTH, LAYERS + 1)
        assert not handle.trace.prompt.norms.requires_grad
        handle.reset()
        model.train()
        gradients(compiled(model))
        assert handle.trace is None
        model.eval()
    assert len(expected) == len(actual) > LAYERS
    for ours, theirs in zip(actual, expected, strict=True):
        assert_bits_equal(ours, theirs)


@torch.no_grad()
def test_a_failed_compilation_records_nothing(tiny: Any) -> None:
    model = tiny("llama", layers=LAYERS)
    ids = torch.randint(3, 96, (2, LENGTH))

    def backend(graph: Any, inputs: Any) -> Any:
        raise MemoryError("this backend compiles nothing")

    with void_ext.patch(model) as handle:
        with pytest.raises(Exception, match="compiles nothing"):
            torch.compile(model, backend=backend)(input_ids=ids)
        assert handle.trace is None
        assert handle._recorder.call is None
        with torch.compiler.set_stance("force_eager"):
            compiled(model)(input_ids=ids)
        assert handle.trace.prompt.norms.shape == (2, LENGTH, LAYERS + 1)
        assert graphs() == 0


@torch.no_grad()
def test_a_wrapper_around_the_model(tiny: Any) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny("llama", layers=LAYERS), peft.LoraConfig(target_modules=["q_proj"])).eval()
    ids = torch.randint(3, 96, (2, LENGTH))
    expected = model(input_ids=ids).logits
    with void_ext.patch(model) as handle:
        assert_bits_equal(compiled(model)(input_ids=ids).logits, expected)
        assert handle.trace.prompt.norms.shape == (2, LENGTH, LAYERS + 1)
        assert "forward" in model.__dict__
    assert "forward" not in model.__dict__


@torch.no_grad()
def test_copies_of_a_patched_model_compile(tiny: Any) -> None:
    model = tiny("llama", layers=LAYERS)
    ids = torch.randint(3, 96, (2, LENGTH))
    with void_ext.patch(model) as handle:
        expected = compiled(model)(input_ids=ids).logits
        handle.reset()
        twin = copy.deepcopy(model)
        assert_bits_equal(compiled(twin)(input_ids=ids).logits, expected)
        assert handle.trace is None


@pytest.mark.slow  # a C++ compiler builds each model's kernels
@pytest.mark.parametrize("many", [False, True], ids=["few rows", "many rows"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_inductor_keeps_float32_and_stays_as_close_in_bfloat16(
    family: str, many: bool, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream that has to be stored, and an opaque add, keep inductor from fusing it unrounded: bfloat16 differs, but
    is no further from eager for it."""
    if many:
        monkeypatch.setattr(call, "_KEPT_ELEMENTS", dict.fromkeys(call._KEPT_ELEMENTS, 0))
    inputs = [torch.randint(3, 96, (2, 33), generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny(family, dtype=dtype, layers=3)

        def run(forward: Any) -> Tensor:
            return torch.cat([forward(input_ids=ids).logits for ids in inputs]).float()

        eager, unpatched = run(model), run(torch.compile(model, fullgraph=True))
        with void_ext.patch(model) as handle:
            patched = run(torch.compile(model, fullgraph=True))
            assert handle.trace.prompt.norms.shape == (2, 33, 4)
        if dtype == torch.float32:
            assert_bits_equal(patched, unpatched)
        else:
            ours, theirs = ((logits - eager).square().mean().sqrt() for logits in (patched, unpatched))
            assert 0 < ours <= theirs * (1 + tolerance("compiled", dtype).rtol)


@torch.no_grad()
def test_a_wrapper_that_hands_on_positional_arguments(tiny: Any) -> None:
    model = tiny("llama")
    forward = model.forward
    model.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    ids = torch.arange(8)[None]
    with void_ext.patch(model) as handle:
        expected = model(ids).logits
        assert_bits_equal(torch.compile(model, backend="eager")(ids).logits, expected, "logits")
        assert handle.trace.prompt.norms.shape[1] == 8


@torch.no_grad()
def test_an_entry_left_by_an_earlier_patch_stays_asleep(tiny: Any) -> None:
    model = tiny("llama")
    handle = void_ext.patch(model)
    forward = model.forward
    model.forward = lambda input_ids, **kwargs: forward(input_ids=input_ids, **kwargs)  # keeps the first entry
    handle.unpatch()
    ids = torch.arange(8)[None]
    with void_ext.patch(model) as second:
        expected = model(ids).logits
        assert_bits_equal(torch.compile(model, backend="eager")(ids).logits, expected, "logits")
        assert second.trace.prompt.norms.shape[1] == 8
