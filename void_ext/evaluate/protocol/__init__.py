"""The paper's experiment: MMLU, GPQA Diamond and BoolQ in its layout, or as lm-evaluation-harness asks them.

``build_protocol("paper", data_dir=…)`` gives what ``void_ext.evaluate.run`` takes as tasks; ``summarize`` counts
unparsable answers and accuracy by the place of the right one. See docs/protocol.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from void_ext._lazy import names_at_first_use

if TYPE_CHECKING:
    from void_ext.evaluate.protocol.datasets import DATASETS, ORDERS, DataSet
    from void_ext.evaluate.protocol.extraction import Extraction, extract
    from void_ext.evaluate.protocol.items import Item
    from void_ext.evaluate.protocol.presets import MODELS, PROTOCOLS, SEEDS, resolve_model
    from void_ext.evaluate.protocol.prompts import paper_prompt
    from void_ext.evaluate.protocol.runs import Protocol, build_protocol, check_tokenizer, long_prompts
    from void_ext.evaluate.protocol.sources import Loaded, load_items, local_files
    from void_ext.evaluate.protocol.summary import Summary, answer_rows, render, save_summary, summarize
    from void_ext.evaluate.tasks import DataError

# Imported at first use: the command line's parser knows the names without torch.
_NAMES_OF = {
    "datasets": ("DATASETS", "ORDERS", "DataSet"),
    "extraction": ("Extraction", "extract"),
    "items": ("Item",),
    "presets": ("MODELS", "PROTOCOLS", "SEEDS", "resolve_model"),
    "prompts": ("paper_prompt",),
    "runs": ("Protocol", "build_protocol", "check_tokenizer", "long_prompts"),
    "sources": ("DataError", "Loaded", "load_items", "local_files"),
    "summary": ("Summary", "answer_rows", "render", "save_summary", "summarize"),
}
_MODULE_OF = {name: module for module, names in _NAMES_OF.items() for name in names}

__all__ = [
    "DATASETS",
    "MODELS",
    "ORDERS",
    "PROTOCOLS",
    "SEEDS",
    "DataError",
    "DataSet",
    "Extraction",
    "Item",
    "Loaded",
    "Protocol",
    "Summary",
    "answer_rows",
    "build_protocol",
    "check_tokenizer",
    "extract",
    "load_items",
    "local_files",
    "long_prompts",
    "paper_prompt",
    "render",
    "resolve_model",
    "save_summary",
    "summarize",
]

__getattr__, __dir__ = names_at_first_use(__name__, _MODULE_OF)
