"""What all tests share: the devices they run on, and tiny random models of many families."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

_LLAMA_LIKE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_GPT_LIKE = {"vocab_size": 96, "n_embd": 32, "n_layer": 6, "n_head": 4, "n_positions": 128}
_PLAIN = {k: v for k, v in _LLAMA_LIKE.items() if k != "num_key_value_heads"}

#: family -> (class stem, configuration)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", _LLAMA_LIKE),
    "mistral": ("Mistral", {**_LLAMA_LIKE, "sliding_window": None}),
    "qwen2": ("Qwen2", _LLAMA_LIKE),
    "qwen3": ("Qwen3", {**_LLAMA_LIKE, "head_dim": 8}),
    "gemma": ("Gemma", {**_LLAMA_LIKE, "head_dim": 8}),
    "gemma2": ("Gemma2", {**_LLAMA_LIKE, "head_dim": 8}),
    "olmo2": ("Olmo2", _LLAMA_LIKE),
    "phi3": ("Phi3", _LLAMA_LIKE),
    "mixtral": ("Mixtral", {**_LLAMA_LIKE, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt2": ("GPT2", _GPT_LIKE),
    "gpt_neox": ("GPTNeoX", _PLAIN),
    "opt": ("OPT", {**_PLAIN, "ffn_dim": 64, "word_embed_proj_dim": 32}),
    "bloom": ("Bloom", {"vocab_size": 96, "hidden_size": 32, "n_layer": 6, "n_head": 4}),
    "falcon": ("Falcon", _PLAIN),
}
_HEADS = {"GPT2": "GPT2LMHeadModel"}


def build_tiny(
    family: str,
    *,
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    seed: int = 0,
    layers: int = 6,
    scaled_norms: bool = False,
    **changes: Any,
) -> Any:
    """``scaled_norms``: each norm has weights of its own. New ones are all alike and could stand in for each other.
    ``changes`` are of the family's configuration.
    """
    import transformers

    stem, settings = FAMILIES[family]
    settings = {name: layers if name in ("num_hidden_layers", "n_layer") else value for name, value in settings.items()}
    settings |= changes
    torch.manual_seed(seed)
    # A large initializer range makes deltas of both signs and voids in most layers.
    config = getattr(transformers, f"{stem}Config")(
        **settings,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.3,
        attn_implementation="eager" if family in ("bloom", "gemma2") else attention,  # not all releases have sdpa
    )
    model = getattr(transformers, _HEADS.get(stem, f"{stem}ForCausalLM"))(config)
    if scaled_norms:
        for name, parameter in model.named_parameters():
            if "norm" in name and parameter.dim() == 1:
                parameter.data += torch.empty_like(parameter).uniform_(-0.3, 0.3)
    return model.to(dtype).eval()


#: folders whose tensors and models are so small that a second thread would only be waited for
_ONE_THREAD = {"architectures", "conformance", "distributed", "evaluate", "kernels", "patch", "search", "skip", "ways"}


@pytest.fixture(scope="module", autouse=True)
def _one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    folder = request.path.relative_to(Path(__file__).parent).parts[0]
    threads = torch.get_num_threads()
    if folder in _ONE_THREAD:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """cpu, and cuda where this machine and this build have it; `-m gpu` selects the latter alone."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        from void_ext import _library

        if not _library.build_info()["cuda"]:
            pytest.skip(f"built without CUDA: {_library.build_info()['cuda_reason']}")
    return torch.device(request.param)


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Any]:
    """``tiny(family, dtype=…, attention=…, seed=…, layers=6, **changes)``: a fresh small causal language model."""
    return build_tiny


@pytest.fixture
def tiny_directory(tmp_path: Path) -> Path:
    """A tiny llama and a tokenizer of characters, as ``save_pretrained`` leaves them."""
    from tokenizers import Regex, Tokenizer, pre_tokenizers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    place = tmp_path / "model"
    tokens = ["<pad>", "<s>", "</s>", *map(chr, range(32, 125))]
    core = Tokenizer(kinds.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="<s>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>").save_pretrained(place)
    build_tiny("llama").save_pretrained(place)
    return place


@pytest.fixture
def padded_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids ``[3, 9]`` and their attention mask; row 1 has three pads on the left, row 2 one."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(3, 96, (3, 9), generator=generator)
    mask = torch.ones_like(ids)
    for row, pads in ((1, 3), (2, 1)):
        ids[row, :pads] = 0
        mask[row, :pads] = 0
    return ids, mask


@pytest.fixture
def nothing_compiled() -> Iterator[None]:
    logging.getLogger("torch.__trace").propagate = False  # pytest would keep, and format, what dynamo says of itself
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture(params=["kept", "in-the-adds", "by-ops"])
def ways_of_taking_norms(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows have their norms taken at the end of a call, many in each layer's add: models this small need the
    threshold moved to see the second way. On a GPU, and where a torch does not show its tensors, ops take them."""
    from void_ext import store
    from void_ext.patching import call

    if request.param == "in-the-adds":
        monkeypatch.setattr(call, "_KEPT_ELEMENTS", dict.fromkeys(call._KEPT_ELEMENTS, 0))
    if request.param == "by-ops":
        monkeypatch.setattr(call, "tensors_visible", lambda: False)
        monkeypatch.setattr(store, "put_positions", lambda *arguments: False)
