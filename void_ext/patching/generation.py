"""What ``generate()`` knows and a forward does not: the prompt's length, ended rows, the plain attention mask."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor, nn
from transformers import StoppingCriteriaList

from void_ext.patching.ledger import cache_in
from void_ext.patching.recorder import Recorders
from void_ext.patching.running import Generation


class _Method:
    """An instance attribute that stands in for a method and shows its signature."""

    name: str

    def __init__(self, recorders: Recorders, model: nn.Module):
        self.recorders = recorders
        self.model = model
        self.before = model.__dict__.get(self.name)

    @property
    def __wrapped__(self) -> Any:
        return self.before or getattr(type(self.model), self.name).__get__(self.model)


class TracedGenerate(_Method):
    """``model.generate``, telling the recorder what it is about to do. Nested calls (an assistant that shares the
    model) are not recorded."""

    name = "generate"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        recorder = self.recorders.own
        if recorder.generation is not None:
            paused, recorder.paused = recorder.paused, True
            try:
                return self.__wrapped__(*args, **kwargs)
            finally:
                recorder.paused = paused
        settings = _Settings(self.model, args, kwargs)
        generation = settings.generation()
        if generation.beams and recorder.skipper is not None and recorder.skipper.by_row:
            raise ValueError(
                f"policy: {type(recorder.skipper.policy).__name__} may decide otherwise for each row, and beam search "
                "moves rows between beams unseen; use granularity='batch', or num_beams=1"
            )
        finished = False
        recorder.recount(cache_in(kwargs))
        recorder.generation = generation
        try:
            output = self.__wrapped__(*args, **kwargs)
            finished = True
            return output
        finally:
            recorder.end_generation(finished)


class WatchedInputs(_Method):
    """``model.prepare_inputs_for_generation``, from which the two-dimensional attention mask is read before it is
    turned into the four-dimensional one of a static cache."""

    name = "prepare_inputs_for_generation"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        generation = self.recorders.own.generation
        if generation is not None and not generation.wrapped and not self.recorders.own.paused:
            mask = kwargs.get("attention_mask")
            generation.mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
            generation.expected = True
            inputs = self.__wrapped__(*args, **kwargs)
            tokens = inputs.get("input_ids")
            generation.tokens = tokens if isinstance(tokens, Tensor) and tokens.dim() == 2 else None
            return inputs
        return self.__wrapped__(*args, **kwargs)


class WatchedCriteria(_Method):
    """``model._get_stopping_criteria``: everything that can end a row passes through the list it returns."""

    name = "_get_stopping_criteria"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        criteria = self.__wrapped__(*args, **kwargs)
        generation = self.recorders.own.generation
        return criteria if generation is None or self.recorders.own.paused else RecordedCriteria(criteria, generation)


class RecordedCriteria(StoppingCriteriaList):
    """The criteria of one ``generate()``, telling the recorder which rows are done."""

    def __init__(self, criteria: StoppingCriteriaList, generation: Generation):
        super().__init__(criteria)
        self.generation = generation

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        done = super().__call__(input_ids, scores, **kwargs)
        self.generation.stop(input_ids.shape[1], done)
        return done


class Refused(_Method):
    """A method whose forwards are not one row per sequence; it works again once the model is unpatched."""

    def __init__(self, recorders: Recorders, model: nn.Module, name: str):
        self.name = name
        super().__init__(recorders, model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            f"void_ext: {self.name}() packs sequences into one row and cannot be traced; use generate() with a padded "
            "batch, or call void_ext.unpatch(model) first"
        )


class AutoCompile(_Method):
    """``model._valid_auto_compile_criteria``, by which generate() decides whether to compile its decoding steps."""

    name = "_valid_auto_compile_criteria"

    def __call__(self, model_kwargs: dict[str, Any], generation_config: Any, *args: Any, **kwargs: Any) -> bool:
        if not self.__wrapped__(model_kwargs, generation_config, *args, **kwargs):
            return False
        skipper = self.recorders.own.skipper
        reason = None if skipper is None else skipper.not_compiled
        if reason is None and skipper is not None and skipper.by_row:
            # It has not decided yet: what it may decide has to do.
            generation = self.recorders.own.generation
            one = generation is not None and generation.rows == 1
            reason = None if one else f"{type(skipper.policy).__name__} may decide otherwise for each row"
        if reason is not None and getattr(generation_config, "compile_config", None) is not None:
            warnings.warn(f"void_ext: generate() does not compile its forward here: {reason}", stacklevel=2)
        return reason is None


class _Settings:
    """The settings in effect for one call of generate(): arguments, then the config passed, then the model's own."""

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]):
        self.model: Any = model
        self.inputs = args[0] if args else None
        self.kwargs = kwargs
        self.config = args[1] if len(args) > 1 else kwargs.get("generation_config")

    def get(self, name: str) -> Any:
        if name in self.kwargs:
            return self.kwargs[name]
        for config in (self.config, getattr(self.model, "generation_config", None)):
            if config is not None and getattr(config, name, None) is not None:
                return getattr(config, name)
        return None

    def generation(self) -> Generation:
        beams = self.get("num_beams") or 1
        wrapped = not isinstance(self.model.prepare_inputs_for_generation, WatchedInputs)
        if wrapped and self.get("prefill_chunk_size"):
            raise ValueError(
                "prefill_chunk_size: expected None where another library prepares the inputs of generate() (PEFT's "
                f"prompt learning), got {self.get('prefill_chunk_size')!r}: its first forward tells the prompt's end"
            )
        return Generation(
            prompt_length=self.prompt_length(),
            fresh_cache=cache_in(self.kwargs) is None,
            beams=int(beams) > 1,
            wrapped=wrapped,
            offset=self.prompt_length() - self.ids_length(),
            rows=self.rows(),
            masked=self.mask() is not None and not wrapped,
        )

    def mask(self) -> Tensor | None:
        """The caller's word on which tokens are real. transformers drops it where that is all of them."""
        mask = self.kwargs.get("attention_mask")
        return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def rows(self) -> int:
        """Rows of its batch, as far as arguments tell."""
        embeds = self.kwargs.get("inputs_embeds")
        given = embeds if embeds is not None else self.ids()
        return (1 if given is None else int(given.shape[0])) * int(self.get("num_return_sequences") or 1)

    def prompt_length(self) -> int:
        embeds = self.kwargs.get("inputs_embeds")
        given = embeds if embeds is not None else self.ids()
        length = 1 if given is None else int(given.shape[1])  # with no input generation starts from the bos token
        mask = self.mask()
        # With a cache the caller may pass only the new tokens, but then the mask spans the whole sequence.
        return length if mask is None else max(length, int(mask.shape[1]))

    def ids(self) -> Tensor | None:
        given: list[Tensor | None] = [self.inputs, self.kwargs.get("input_ids"), self.kwargs.get("inputs")]
        return next((ids for ids in given if ids is not None), None)

    def ids_length(self) -> int:
        """Width of the ids that generate() starts from: none with embeddings, one (bos) with no input."""
        ids = self.ids()
        if ids is not None:
            return int(ids.shape[1])
        return 0 if self.kwargs.get("inputs_embeds") is not None else 1
