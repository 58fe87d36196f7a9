"""The paper's prompts, to the last space: the indentation comes with the published code and is part of what was asked.

Source: eval.py of github.com/manishemirani/void_in_language_models. The prompt is the only message, of the user; no
system message, no example.
"""

from __future__ import annotations

from void_ext.evaluate.protocol.items import LETTERS, Item


def paper_prompt(item: Item) -> str:
    """What the user's message says. BoolQ's question stands under "Options:", as in the paper's code."""
    if item.dataset == "boolq":
        return (
            "\n    Respond to the given question based on the passage with True or False.\n"
            f"    Passage:\n    {item.passage}\n\n"
            f"    Options:\n    {item.question}\n\n"
            "    Output Format:\n    [True/False]\n    "
        )
    options = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, item.options, strict=True))
    return (
        f"\n    Question:\n    {item.question}\n\n"
        f"    Options:\n    {options}\n\n"
        "    Output format:\n    [Option]\n\n    "
    )
