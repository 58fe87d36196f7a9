"""Bad input: an error that names the argument, what was expected and what came; nothing is changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import void_ext


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"alpha": -0.1}, ValueError, r"alpha: expected a finite number >= 0, got -0\.1"),
        ({"alpha": float("nan")}, ValueError, "alpha: expected a finite number >= 0, got nan"),
        ({"alpha": float("inf")}, ValueError, "alpha: expected a finite number >= 0, got inf"),
        (
            {"alpha": 1e39},
            ValueError,
            "alpha: expected at most 3.40.*e[+]38, the largest number of float32, got 1e[+]39",
        ),
        (
            {"alpha": 10**400},
            ValueError,
            "alpha: expected at most 3.40.*e[+]38, the largest number of float32, got 1000",
        ),
        ({"alpha": "0.8"}, TypeError, "alpha: expected a number >= 0, got str '0.8'"),
        ({"alpha": True}, TypeError, "alpha: expected a number >= 0, got bool True"),
        ({"mode": "skipp"}, ValueError, "mode: expected one of 'trace', 'exit', 'skip', got 'skipp'"),
        ({"fuse": "mul"}, ValueError, "fuse: expected one of 'add', 'norm', got 'mul'"),
        (
            {"granularity": "layer"},
            ValueError,
            "granularity: expected one of 'token', 'sequence', 'batch', got 'layer'",
        ),
        ({"reference_quirks": "no"}, TypeError, "reference_quirks: expected True or False, got str 'no'"),
        ({"reference_quirks": True, "granularity": "batch"}, ValueError, "granularity: expected 'token' with"),
        ({"updates": 1}, TypeError, "updates: expected True or False, got int 1"),
        ({"threshold": 0.8}, TypeError, "unknown option 'threshold'; the options are mode, alpha"),
    ],
)
def test_options(options: dict[str, Any], error: type[Exception], message: str, tiny: Any) -> None:
    model = tiny("llama")
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    with pytest.raises(error, match=message):
        void_ext.patch(model, **options)
    assert {name: dict(module.__dict__) for name, module in model.named_modules()} == before


def small(stem: str, cls: str, **settings: Any) -> Any:
    return getattr(transformers, cls)(getattr(transformers, f"{stem}Config")(**settings)).eval()


def test_models_without_a_residual_stream_per_token(tiny: Any) -> None:
    bert = {
        "vocab_size": 96,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    t5 = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    for model, message in (
        (small("T5", "T5ForConditionalGeneration", **t5), "T5ForConditionalGeneration .* is an encoder-decoder"),
        (small("Bert", "BertModel", **bert), "BertModel .* attends in both directions"),
        (small("Bert", "BertLMHeadModel", **bert), "BertLMHeadModel .* attends in both directions"),
    ):
        with pytest.raises(void_ext.UnsupportedModelError, match=message):
            void_ext.patch(model)
        assert not any(module._forward_hooks for module in model.modules())


def test_decoder_halves_are_traced() -> None:
    settings = {
        "vocab_size": 96,
        "d_model": 32,
        "decoder_layers": 3,
        "decoder_attention_heads": 4,
        "decoder_ffn_dim": 64,
    }
    model = small("Bart", "BartForCausalLM", **settings, encoder_layers=2, pad_token_id=0, max_position_embeddings=64)
    ids = torch.randint(3, 96, (2, 7))
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        with void_ext.patch(model) as handle:
            assert torch.equal(model(input_ids=ids, use_cache=False).logits, expected)
    assert handle.trace is not None
    assert handle.trace.prompt.norms.shape == (2, 7, 4)


@pytest.mark.parametrize("what", [None, "gpt2", 3, {}])
def test_not_a_module(what: Any) -> None:
    with pytest.raises(TypeError, match=f"model: expected a transformers PreTrainedModel, got {type(what).__name__}"):
        void_ext.patch(what)
    with pytest.raises(TypeError, match=f"model: expected a patched model, got {type(what).__name__}"):
        void_ext.unpatch(what)


def test_not_a_transformers_model() -> None:
    with pytest.raises(TypeError, match=r"expected a transformers PreTrainedModel \(or a wrapper .*\), got Sequential"):
        void_ext.patch(torch.nn.Sequential(torch.nn.Linear(2, 2)))


def test_patched_twice(tiny: Any) -> None:
    model = tiny("llama")
    with void_ext.patch(model):
        with pytest.raises(void_ext.AlreadyPatchedError, match=r"call void_ext\.unpatch\(model\) first"):
            void_ext.patch(model)
        for other in (torch.nn.ModuleDict({"inner": model}), model.model):
            with pytest.raises(void_ext.AlreadyPatchedError):
                void_ext.patch(other)
    with pytest.raises(ValueError, match="LlamaForCausalLM is not patched"):
        void_ext.unpatch(model)


def test_recurrent_models_are_refused() -> None:
    settings = {"vocab_size": 96, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2}
    with pytest.raises(void_ext.UnsupportedModelError, match=r"MambaForCausalLM .* instead of a KV cache"):
        void_ext.patch(small("Mamba", "MambaForCausalLM", **settings))
    settings = {"vocab_size": 96, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64}
    with pytest.raises(void_ext.UnsupportedModelError, match="XLNetLMHeadModel"):
        void_ext.patch(small("XLNet", "XLNetLMHeadModel", **settings))


def test_packed_generation_is_refused(tiny: Any) -> None:
    model = tiny("llama")
    if not hasattr(model, "generate_batch"):
        pytest.skip("this transformers has no generate_batch")
    with void_ext.patch(model), pytest.raises(NotImplementedError, match=r"generate_batch\(\) packs sequences"):
        model.generate_batch([[5, 6, 7]])


def test_half_layers_need_a_fused_forward(tiny: Any) -> None:
    with pytest.raises(ValueError, match=r"halves: expected a model with a fused forward; .*GPT2Block"):
        void_ext.patch(tiny("gpt2"), halves=True)


def test_exit_needs_a_final_norm(tiny: Any) -> None:
    model = tiny("llama")
    model.model.norm = torch.nn.Identity()
    with pytest.raises(void_ext.UnsupportedModelError, match=r"mode: 'exit' needs the norm after the last layer"):
        void_ext.patch(model, mode="exit")
    void_ext.patch(model).unpatch()


@torch.no_grad()
def test_a_layer_that_runs_twice(tiny: Any, padded_batch: Any) -> None:
    for family in ("llama", "gpt2"):
        model = tiny(family)
        layers = model.model.layers if family == "llama" else model.transformer.h
        layers[3] = layers[2]
        with void_ext.patch(model), pytest.raises(RuntimeError, match=r"void_ext: layer \d runs"):
            model(input_ids=padded_batch[0])


@torch.no_grad()
@pytest.mark.parametrize(
    ("index", "what"),
    [(0, "layer 1 runs and layer 0 before it has not"), (2, "layer 3 runs and layer 2"), (5, "only 5 of 6 layers ran")],
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_layer_replaced_after_patching(family: str, index: int, what: str, tiny: Any, padded_batch: Any) -> None:
    """Nobody watches the new one until the model is patched again: the message says so."""
    model, other = tiny(family), tiny(family, seed=1)
    layers, others = (found.model.layers if family == "llama" else found.transformer.h for found in (model, other))
    void_ext.patch(model)
    layers[index] = others[index]
    with pytest.raises(RuntimeError, match=rf"{what}.*replaced.*void_ext\.unpatch\(model\) and patch it again"):
        model(input_ids=padded_batch[0])
    void_ext.unpatch(model)
    with void_ext.patch(model) as handle:
        model(input_ids=padded_batch[0])
    assert handle.trace is not None
    assert handle.trace.prompt.norms.shape[-1] == 7


@torch.no_grad()
def test_layers_that_do_not_run(tiny: Any, padded_batch: Any) -> None:
    model = tiny("llama")
    with void_ext.patch(model):
        model.config.num_hidden_layers = 4
        with pytest.raises(RuntimeError, match="only 4 of 6 layers ran"):
            model(input_ids=padded_batch[0])
        model.config.num_hidden_layers = 6
        model(input_ids=padded_batch[0])


def test_phase_names(tiny: Any) -> None:
    with (
        void_ext.patch(tiny("llama")) as handle,
        pytest.raises(ValueError, match="phase: expected one of 'prompt', 'response', got 'answer'"),
        handle.phase("answer"),
    ):
        pass
