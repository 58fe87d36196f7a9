"""Policies: who decides which layers run, from what the tokens so far have shown.

Whether a layer is void is known only after it ran, so what to leave out must be predicted:

- :class:`StaticPlan`: a plan made beforehand;
- :class:`PromptPlan`: what the prompt of a sequence showed decides what its response goes without;
- :class:`RefreshPlan`: every k-th token of the response runs dense, and what it showed decides for those that follow;
- :class:`HaltPlan`: after a token's first void, its remaining layers are off.

A policy of one's own is a class with one method, which is called at the start of a trace, before the first forward of
the response, and, with ``every_token``, before every other one:

>>> import torch
>>> from void_ext import History, Policy, PhasePlan, VoidPlan
>>> class LastThird(Policy):
...     # The response goes without its last layers, but keeps their keys and values.
...     def decide(self, history, phase):
...         if history is None or phase == "prompt":
...             return None  # as before: at the start, everything runs
...         off = range(2 * history.layers // 3, history.layers - 1)
...         attention = [1 if layer in off else 2 for layer in range(history.layers)]  # PROJECT, RUN
...         mlp = [0 if layer in off else 2 for layer in range(history.layers)]  # SKIP, RUN
...         return VoidPlan(PhasePlan.dense(history.layers), PhasePlan(attention, mlp))
>>> norms = torch.ones(1, 4, 10)
>>> ran = torch.ones(1, 4, 9, dtype=torch.bool)
>>> LastThird().decide(History(norms, ran, ran[..., 0], None, [0] * 4), "response")
VoidPlan(layers=9, prompt_skipped=0, response_skipped=2)
"""

from void_ext.policies._halt import HaltPlan
from void_ext.policies._policy import History, Policy, check_decision
from void_ext.policies._ranked import PromptPlan, RefreshPlan
from void_ext.policies._static import StaticPlan

__all__ = ["HaltPlan", "History", "Policy", "PromptPlan", "RefreshPlan", "StaticPlan", "check_decision"]
