"""Streamers: tokens as they come, from a thread that generates while another reads."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from transformers import TextIteratorStreamer
from transformers.generation.streamers import BaseStreamer

import void_ext

SETTINGS = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


class Collected(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.tokens.append(-1)


@pytest.mark.parametrize("skips", [False, True])
def test_a_streamer_gets_each_token(skips: bool, tiny: Any, padded_batch: Any, some_plan: Any) -> None:
    model, ids = tiny("llama"), padded_batch[0][:1]
    options = {"mode": "skip", "plan": some_plan(model)} if skips else {}
    expected = model.generate(ids, **SETTINGS)
    with void_ext.patch(model, **options) as handle:
        if skips:
            expected = model.generate(ids, **SETTINGS)
        streamer = Collected()
        model.generate(ids, streamer=streamer, **SETTINGS)
    assert streamer.tokens == [*expected[0].tolist(), -1]
    assert handle.trace is not None
    assert handle.trace.response.tokens.tolist() == [expected[0, 9:-1].tolist()]
    assert bool(handle.trace.response.mask.all())
    assert bool(handle.trace.response.executed.all()) is not skips


def test_from_another_thread(tiny: Any, tokenizer: Any, padded_batch: Any) -> None:
    """The usual way to stream: generate() in a thread, text read here. This thread is shown that thread's trace."""
    model, ids = tiny("llama"), padded_batch[0][:1]
    expected = model.generate(ids, **SETTINGS)
    with void_ext.patch(model) as handle:
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
        thread = threading.Thread(target=model.generate, args=(ids,), kwargs={"streamer": streamer, **SETTINGS})
        thread.start()
        text = "".join(streamer)
        thread.join()
        assert handle.trace is not None
        assert handle.trace.response.tokens.tolist() == [expected[0, 9:-1].tolist()]
    assert text == tokenizer.decode(expected[0, 9:])
