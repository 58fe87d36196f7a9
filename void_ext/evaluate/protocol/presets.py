"""What can be asked for by a short name: protocols, and the models that the paper evaluates."""

from __future__ import annotations

PROTOCOLS = ("paper", "likelihood")
SEEDS = (0, 1, 2)
"""Of the sampled runs."""

MODELS = {
    "llama3-8b": "meta-llama/Meta-Llama-3-8B-Instruct",
    "mistral-7b": "mistralai/Mistral-7B-Instruct-v0.3",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B-Instruct",
}
"""Beside them ``smollm2`` is known to :func:`void_ext.models.load`, and so is every hub id and directory."""


def resolve_model(name: str) -> str:
    """The hub id of a preset; any other name as it is. Write ``./llama3-8b`` for a directory of that name."""
    return MODELS.get(name, name)
