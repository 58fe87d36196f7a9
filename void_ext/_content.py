"""What a model's weights hold, in one hash: enough to tell two checkpoints of one architecture apart."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

#: Numbers read of a parameter: 2 KiB of bfloat16, some 0.5 MB of a model of 30 layers.
_SAMPLE = 1024
#: Steps of the golden ratio spread over any shape; even steps through a matrix could stay in one of its columns.
_STEP = 0.6180339887498949


def content_digest(model: nn.Module) -> str:
    """sha256, in hex, over name, shape, dtype and up to 1024 numbers of every parameter and every persistent buffer.

    Which numbers are read depends on the shape alone, so the digest is the same on every device. It is another one
    after training, merging an adapter or another initialisation, whichever parameters those left alone, and for another
    dtype. A change of a few single numbers can be missed.

    Quantised weights are read as they are stored: packed numbers, and scales where they are parameters, buffers or
    inner tensors (torchao). Tied weights are read once. Of weights on the meta device (offloaded) name and shape are
    all there is; of weights spread over processes (DTensor) each reads its own part.

    Raises TypeError for what is no module. Cost: one small copy to the host per parameter.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    result = hashlib.sha256()
    with torch.no_grad():
        for name, tensor in _stored(model):
            result.update(f"{name} {list(tensor.shape)} {tensor.dtype} {tensor.device.type == 'meta'}\n".encode())
            if tensor.device.type != "meta":
                result.update(_sample(tensor))
    return result.hexdigest()


def _stored(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    seen: set[int] = set()
    for path, module in model.named_modules():
        # Buffers that are not stored (rotary tables, caches) may change as the model runs.
        buffers = {k: v for k, v in module._buffers.items() if k not in module._non_persistent_buffers_set}
        for name, tensor in {**module._parameters, **buffers}.items():
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                yield from _parts(f"{path}.{name}", tensor)


def _parts(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The plain tensors of which a tensor subclass is made; of any other, itself."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        yield name, tensor
        return
    for part in flatten()[0]:
        inner = getattr(tensor, part)
        if isinstance(inner, Tensor):  # a DTensor's mesh is one of its parts too
            yield from _parts(f"{name}.{part}", inner)


def _sample(tensor: Tensor) -> bytes:
    flat = tensor.detach().reshape(-1)
    count = flat.numel()
    if count > _SAMPLE:
        step = int(count * _STEP) | 1
        flat = flat[(torch.arange(_SAMPLE) * step % count).to(flat.device)]
    return flat.to("cpu").contiguous().view(torch.uint8).numpy().tobytes() if count else b""
