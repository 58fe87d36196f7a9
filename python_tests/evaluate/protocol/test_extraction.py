"""The answer extractor on answers as models write them, cut off after 50 tokens or not."""

from __future__ import annotations

from pathlib import Path

import pytest

import void_ext
from void_ext.evaluate.protocol import extraction
from void_ext.evaluate.protocol.extraction import extract
from void_ext.evaluate.protocol.items import LETTERS, Item

CAPITALS = ("Paris", "New York", "New York City", "-4")

#: answer -> (letter or None, rule)
LETTER_ANSWERS: dict[str, tuple[str | None, str]] = {
    # the letter first
    "B": ("B", "first"),
    "b": ("B", "first"),
    "B.": ("B", "first"),
    " [B]": ("B", "first"),
    "[B. New York]": ("B", "first"),
    "[Option B]": ("B", "first"),
    "[Option] B": ("B", "first"),
    "(c)": ("C", "first"),
    "d) because the others are not": ("D", "first"),
    "**D**": ("D", "first"),
    "**Answer: D**": ("D", "first"),
    "Answer: C\n\nExplanation: B is wrong, since": ("C", "first"),
    "Option: A": ("A", "first"),
    "The correct answer is D.": ("D", "first"),
    "The answer is (A).": ("A", "first"),
    "The correct option is:\n\nC. New York City": ("C", "first"),
    "A. Paris\n\nExplanation: Paris has been the capital": ("A", "first"),
    "D: -4": ("D", "first"),
    "D - minus four": ("D", "first"),
    "C) both A and B": ("C", "first"),
    "A. B and C": ("A", "first"),
    "'B'": ("B", "first"),
    "```\nB\n```": ("B", "first"),
    "    [A]\n    ": ("A", "first"),
    "$C$": ("C", "first"),
    "> B": ("B", "first"),
    # a statement
    "The correct answer is option B, as": ("B", "stated"),
    "Looking at the options, the correct answer is: **C**": ("C", "stated"),
    "Based on the passage, the right option is (D). It": ("D", "stated"),
    "After careful thought I would choose option C.": ("C", "stated"),
    "I'd go with B here": ("B", "stated"),
    "Since the sum is even, the answer would be A because": ("A", "stated"),
    "To solve this, note that... Final answer: D": ("D", "stated"),
    "The answer is not A, the answer is B.": ("B", "stated"),
    "Option A is tempting. However, the correct answer is C.": ("C", "stated"),
    "The answer is indeed D. Chisinau.": ("D", "stated"),
    "The most preferred option is D. Canberra.": ("D", "stated"),
    "The most likely answer is C. S. E.": ("C", "stated"),
    "[Option]\n\nThe answer is: D. Budapest": ("D", "stated"),
    "Birut\n\nExplanation:\n\nThe answer is D. Niamey.\n\nThe reason is that option C. Gitega is not": ("D", "stated"),
    "The only option is: C": ("C", "stated"),
    # a letter named somewhere
    "You are correct to provide the answer C. Kabul. The correct answer is:": ("C", "named"),
    'You are correct, option C. "Birra" is indeed the capital of Argentina.': ("C", "named"),
    "Option B is correct.": ("B", "named"),
    "It must be [C], I think": ("C", "named"),
    "Let me think.\n\nB. New York": ("B", "named"),
    "So we get \\boxed{D}": ("D", "named"),
    "So we get $\\boxed{\\text{(D)}}$": ("D", "named"),
    "I believe this is **A**": ("A", "named"),
    # the text of an option
    "Paris": ("A", "text"),
    "[Paris]": ("A", "text"),
    "paris.": ("A", "text"),
    "New York City": ("C", "text"),
    "New  York": ("B", "text"),
    "The answer is New York City, which": ("C", "text"),
    "-4": ("D", "text"),
    "Paris, the capital of France": ("A", "text"),
    "The answer is: Paris": ("A", "text"),
    "The capital of France is Paris.": ("A", "text"),
    "The capital of France is indeed Paris, not New York.": ("A", "text"),
    "The largest are New York City": ("C", "text"),
    "The result is **-4**": ("D", "text"),
    # two, or none
    "A, B and C": (None, "several"),
    "B, C": (None, "several"),
    "The answer is A or B": (None, "several"),
    "Option A or B": (None, "several"),
    "A. Paris\nB. New York\nC. New York City\nD. -4": (None, "several"),
    "Option A is wrong. Option B is right.": (None, "several"),
    "The answer is B. Wait, the answer is C.": ("B", "first"),
    "I think the answer is B. Wait, the answer is C.": (None, "several"),
    "A or B": (None, "none"),
    "A cat sat on the mat": (None, "none"),
    "A-level questions of this kind are": (None, "none"),
    "C_6H_{12} burns": (None, "none"),
    "A's": (None, "none"),
    "CO2 is": (None, "none"),
    "The answer is a large star": (None, "none"),
    "The answer is A large star": (None, "none"),
    "The correct answer is not A": (None, "none"),
    "Parisian": (None, "none"),
    "4": (None, "none"),
    "The capital of France is Paris and New York is not": (None, "none"),
    "The question is Parisian": (None, "none"),
    "This is not Paris": (None, "none"),
    "The capital is Paris, or it is New York.": (None, "several"),
    "C FULL.": (None, "none"),
    "B D": (None, "none"),
    "The most possible answer is not possible. The most appropriate answer is:": (None, "none"),
    "Bahrain is a landlocked country, bordered by Paris to the east": (None, "none"),
    "An answer A person would give": (None, "none"),
    "To find the answer we first have to": (None, "none"),
    "The question asks about France.": (None, "none"),
    "[Option]": (None, "none"),
    "": (None, "none"),
    "   \n": (None, "none"),
    "E": (None, "none"),
    "Dogs": (None, "none"),
}

TRUTH_ANSWERS: dict[str, tuple[bool | None, str]] = {
    "True": (True, "first"),
    "true.": (True, "first"),
    "[True]": (True, "first"),
    "**False**": (False, "first"),
    "FALSE": (False, "first"),
    "False. The passage says that it is not true": (False, "first"),
    "Answer: True": (True, "first"),
    "The answer is False, because": (False, "first"),
    "[True/False]\nTrue": (True, "first"),
    "Yes, it does": (True, "first"),
    "No.": (False, "first"),
    "yes": (True, "first"),
    "Based on the passage, the answer is True.": (True, "stated"),
    "According to the text, the correct answer is: no": (False, "stated"),
    "The statement is true.": (True, "named"),
    "Based on the passage, this is False": (False, "named"),
    "[True/False]": (None, "none"),
    "True/False": (None, "none"),
    "True or False": (None, "several"),
    "It could be true, or false": (None, "several"),
    "That is not true": (None, "none"),
    "It isn't clear if this is false": (None, "none"),
    "The passage does not say whether this is true": (None, "none"),
    "No one knows": (None, "none"),
    "Truthfully, the passage": (None, "none"),
    "The passage describes ethanol": (None, "none"),
    "": (None, "none"),
}


@pytest.mark.parametrize("answer", LETTER_ANSWERS)
def test_letters(answer: str) -> None:
    letter, rule = LETTER_ANSWERS[answer]
    found = extract(Item("mmlu", "k", "q", CAPITALS, 0), answer)
    assert (None if found.option is None else LETTERS[found.option], found.rule) == (letter, rule)


@pytest.mark.parametrize("answer", TRUTH_ANSWERS)
def test_truth(answer: str) -> None:
    value, rule = TRUTH_ANSWERS[answer]
    found = extract(Item("boolq", "k", "q", ("True", "False"), 0), answer)
    assert (None if found.option is None else found.option == 0, found.rule) == (value, rule)


def test_a_letter_wins_over_the_text_beside_it() -> None:
    assert extract(Item("mmlu", "k", "q", CAPITALS, 0), "B. Paris").option == 1


def test_two_options_with_the_same_text_are_told_apart_by_letters_only() -> None:
    item = Item("mmlu", "k", "q", ("one", "one", "two", "three"), 1)
    assert extract(item, "one").rule == "several"
    assert extract(item, "B. one").option == 1


def test_a_long_answer_takes_no_long_time() -> None:
    # Nested repetition would take minutes here.
    for text in ("[" * 20000, "The answer " * 5000, "not " * 5000 + "tru", "A" + " " * 20000 + "x", "* " * 10000):
        extract(Item("mmlu", "k", "q", CAPITALS, 0), text)
        extract(Item("boolq", "k", "q", ("True", "False"), 0), text)


def test_the_rules_in_the_docs_are_those_of_the_code() -> None:
    page = Path(void_ext.__file__).parents[1] / "docs/protocol.md"
    rules = (extraction.__doc__ or "").partition("The rules are tried")[2].replace("``", "`").strip()
    assert rules
    assert rules in page.read_text(encoding="utf-8")
