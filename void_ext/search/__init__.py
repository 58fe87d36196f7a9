"""Search for plans: which layers, or halves of layers, a model can go without, measured on a text.

from void_ext.search import Settings, default_text, find_plans, passages

texts = passages(tokenizer, default_text(), None, sequences=12, length=256)
found = find_plans(model, texts, Settings(budgets=(2, 4)))
found.plans[4].save("plan.json")
"""

from void_ext.search.frontier import Frontier, Point
from void_ext.search.measure import Quality
from void_ext.search.plan_search import Found, find_plans
from void_ext.search.settings import Costs, Settings, costs_of
from void_ext.search.text import Passage, Text, default_text, passages, read_text

__all__ = [
    "Costs",
    "Found",
    "Frontier",
    "Passage",
    "Point",
    "Quality",
    "Settings",
    "Text",
    "costs_of",
    "default_text",
    "find_plans",
    "passages",
    "read_text",
]
