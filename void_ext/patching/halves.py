"""A decoder layer of a known form, taken apart: what its attention adds to the stream, and what its MLP adds."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from void_ext.patching.registry import LayerForm


class Halves:
    """Calls a layer's own modules, with the arguments that its forward was given."""

    def __init__(self, layer: nn.Module, form: LayerForm):
        self.layer = layer
        self.form = form
        # What the layer's own forward takes after hidden_states, in this order, and would fill in.
        named = list(inspect.signature(type(layer).forward).parameters.values())[2:]
        named = [one for one in named if one.kind is not one.VAR_KEYWORD]
        self.defaults = {one.name: None if one.default is one.empty else one.default for one in named}
        self.needed = frozenset(self.defaults)

    def complete(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The layer's arguments after hidden_states by name, as its own forward hands them to the attention."""
        if not self.form.passes_rest:
            kwargs = {name: value for name, value in kwargs.items() if name in self.needed}
        if args:
            kwargs.update(zip(self.defaults, args, strict=False))
        return kwargs if self.needed.issubset(kwargs) else {**self.defaults, **kwargs}

    def attend(self, stream: Tensor, normed: Tensor | None, kwargs: dict[str, Any]) -> Tensor:
        """What the attention adds to ``stream``; ``normed`` where its input has been made already."""
        form = self.form
        modules: dict[str, Any] = self.layer._modules
        if normed is None:
            normed = stream if form.input_norm is None else modules[form.input_norm](stream)
        update = modules[form.attention](hidden_states=normed, **kwargs)[0]
        return self._finished(update, form.attention_after)

    def feed(self, middle: Tensor, normed: Tensor | None = None) -> Tensor:
        """What the MLP adds to ``middle``."""
        form = self.form
        modules: dict[str, Any] = self.layer._modules
        if normed is None:
            normed = middle if form.post_norm is None else modules[form.post_norm](middle)
        update = modules[form.mlp](normed)
        if isinstance(update, tuple):  # experts may give what their router said too
            update = update[0]
        return self._finished(update, form.mlp_after)

    def _finished(self, update: Tensor, after: tuple[str, ...]) -> Tensor:
        for name in after:
            update = self.layer._modules[name](update)  # type: ignore[misc]
        return update if self.form.scale is None else update * getattr(self.layer, self.form.scale)
