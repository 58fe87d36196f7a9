"""The paper's experiment: MMLU, GPQA Diamond and BoolQ in its layout, or as lm-evaluation-harness asks them.

``build_protocol("paper", data_dir=…)`` gives what ``void_ext.evaluate.run`` takes as tasks; ``summarize`` counts
unparsable answers and accuracy by the place of the right one. See docs/protocol.md.
"""

from void_ext.evaluate.protocol.datasets import DATASETS, ORDERS, DataSet
from void_ext.evaluate.protocol.extraction import Extraction, extract
from void_ext.evaluate.protocol.items import Item
from void_ext.evaluate.protocol.presets import PRESETS, resolve_model
from void_ext.evaluate.protocol.prompts import paper_prompt
from void_ext.evaluate.protocol.runs import PROTOCOLS, SEEDS, Protocol, build_protocol, check_tokenizer, long_prompts
from void_ext.evaluate.protocol.sources import Loaded, load_items, local_files
from void_ext.evaluate.protocol.summary import Summary, render, summarize
from void_ext.evaluate.tasks import DataError

__all__ = [
    "DATASETS",
    "ORDERS",
    "PRESETS",
    "PROTOCOLS",
    "SEEDS",
    "DataError",
    "DataSet",
    "Extraction",
    "Item",
    "Loaded",
    "Protocol",
    "Summary",
    "build_protocol",
    "check_tokenizer",
    "extract",
    "load_items",
    "local_files",
    "long_prompts",
    "paper_prompt",
    "render",
    "resolve_model",
    "summarize",
]
