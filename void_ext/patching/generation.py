"""What ``generate()`` knows and a forward does not: the prompt's length, the eos set, the plain attention mask."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from void_ext.patching.recorder import Generation, Recorder


class _Method:
    """An instance attribute that stands in for a method and shows its signature."""

    name: str

    def __init__(self, recorder: Recorder, model: nn.Module):
        self.recorder = recorder
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
        recorder = self.recorder
        if recorder.generation is not None:
            paused, recorder.paused = recorder.paused, True
            try:
                return self.__wrapped__(*args, **kwargs)
            finally:
                recorder.paused = paused
        settings = _Settings(self.model, args, kwargs)
        recorder.recount(kwargs.get("past_key_values"))
        recorder.generation = settings.generation()
        try:
            output = self.__wrapped__(*args, **kwargs)
            if recorder.store is not None and recorder.generation.started and settings.ends_by_criteria():
                sequences = output if isinstance(output, Tensor) else getattr(output, "sequences", None)
                if isinstance(sequences, Tensor) and sequences.shape[0] == recorder.store.batch:
                    recorder.store.final_tokens = sequences
                    recorder.store.final_start = settings.prompt_length() if settings.ids() is None else 0
                    recorder.store.final_pad = settings.pad()
            return output
        finally:
            recorder.generation = None


class WatchedInputs(_Method):
    """``model.prepare_inputs_for_generation``, from which the two-dimensional attention mask is read before it is
    turned into the four-dimensional one of a static cache."""

    name = "prepare_inputs_for_generation"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        generation = self.recorder.generation
        if generation is not None and not self.recorder.paused:
            mask = kwargs.get("attention_mask")
            generation.mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        return self.__wrapped__(*args, **kwargs)


class NeverCompile:
    """Answers generate()'s question whether to compile the forward for a static cache."""

    def __call__(self, *args: Any, **kwargs: Any) -> bool:
        return False


class _Settings:
    """The settings in effect for one call of generate(): arguments, then the config passed, then the model's own."""

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]):
        self.model: Any = model
        self.inputs = args[0] if args else None
        self.kwargs = kwargs
        self.config = args[1] if len(args) > 1 else kwargs.get("generation_config")
        self.criteria = args[3] if len(args) > 3 else kwargs.get("stopping_criteria")

    def get(self, name: str) -> Any:
        if name in self.kwargs:
            return self.kwargs[name]
        for config in (self.config, getattr(self.model, "generation_config", None)):
            if config is not None and getattr(config, name, None) is not None:
                return getattr(config, name)
        return None

    def generation(self) -> Generation:
        beams = self.get("num_beams") or 1
        return Generation(
            prompt_length=self.prompt_length(),
            fresh_cache=self.kwargs.get("past_key_values") is None,
            eos=self.eos(),
            beams=int(beams) > 1,
        )

    def prompt_length(self) -> int:
        embeds = self.kwargs.get("inputs_embeds")
        given = embeds if embeds is not None else self.ids()
        length = 1 if given is None else int(given.shape[1])  # with no input generation starts from the bos token
        mask = self.kwargs.get("attention_mask")
        # With a cache the caller may pass only the new tokens, but then the mask spans the whole sequence.
        return max(length, int(mask.shape[1])) if isinstance(mask, Tensor) and mask.dim() == 2 else length

    def ids(self) -> Tensor | None:
        given: list[Tensor | None] = [self.inputs, self.kwargs.get("input_ids"), self.kwargs.get("inputs")]
        return next((ids for ids in given if ids is not None), None)

    def eos(self) -> tuple[int, ...]:
        value = self.get("eos_token_id")
        if value is None:
            return ()
        if isinstance(value, Tensor):
            value = value.tolist()
        return tuple(value) if isinstance(value, (list, tuple)) else (int(value),)

    def pad(self) -> int | None:
        value = self.get("pad_token_id")
        if isinstance(value, Tensor):
            value = int(value)
        eos = self.eos()
        return int(value) if value is not None else (eos[0] if eos else None)

    def ends_by_criteria(self) -> bool:
        return bool(self.criteria) or self.get("stop_strings") is not None or self.get("max_time") is not None
