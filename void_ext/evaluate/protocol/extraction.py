r"""Which option an answer chose. The paper's code stores answers and scores none, so these rules are ours; they are
published here and in docs/protocol.md, and change only with :data:`VERSION`.

The rules are tried in this order; the first that finds anything decides. A rule that finds two different options
decides too: the answer is *unparsable*, as is one in which no rule finds anything. Nothing is ever guessed.

Options with letters (MMLU, GPQA):

1. ``first``: the answer begins with a letter A to D, in brackets or emphasis or not, after "Option", "Answer", "The
   correct answer is" or not, and the letter ends there or is closed by one of ``. ) ] } : , ;``, a quote, a dash or the
   end of the line. Small letters count when alone, in brackets, or before ``.`` or ``)``. "A, B" and a list whose first
   two lines begin with different letters name two.
2. ``stated``: "answer is B", "answer is indeed (B)", "option: B", "best choice is B", "I choose B"; not "is not B".
3. ``named``: "option B", "choice B", "answer B", "[B]", "(B)", "**B**", "\boxed{B}" anywhere, or a line that begins
   with "B." or "B)".
4. ``text``: the first line, or what follows "answer is" or "answer:", begins with the text of an option; or the first
   line says "is" (are, was, were), then the text of an option, then a punctuation mark or nothing. Case, runs of white
   space, and brackets and quotes around it do not count; of two options that fit, the longer one is meant.

True or False (BoolQ), where the repeated "[True/False]" of the prompt is left out first:

1. ``first``: the answer begins with the word true or false, or with yes or no and a punctuation mark or the end.
2. ``stated``: "answer is true", "answer: no".
3. ``named``: exactly one of the words true and false stands anywhere, none of them within 40 characters after "not",
   "n't", "neither" or "whether".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from void_ext.evaluate.protocol.items import LETTERS, Item

VERSION = 1

# str.strip does in one pass what an expression would try anew from every place.
_OPENING = " \t\r\n[](){}<>*_#`'\"“‘$-"
_EDGES = (" \t\r\n[({<*_`'\"“‘", " \t\r\n])}>*_`'\"”’.,;:!")  # not the minus of "-4"
_LABEL = re.compile(
    r"(?:the\s+)?(?:correct\s+|right\s+|best\s+|final\s+)?(?:answer|option|choice)\b\s*(?:is\b)?\s*:?", re.IGNORECASE
)
# "C_6", "A's", "A-level" and "B*x" begin with no letter of an option.
_CLOSED = r"(?=\s*$|\s*[\n\r]|[.)\]}:,;>\"”]|[*_`'’$-]+(?![A-Za-z0-9\\{])|\s+[-–—]\s)"
_FIRST = re.compile(rf"([A-D]){_CLOSED}", re.IGNORECASE)
_SMALL = re.compile(r"^(?:\s*$|[.)\]}*_`])")
_ANOTHER = re.compile(
    r"^[\s.)\]}:*_`'\"”’$]*(?:,|;|/|&|\+|\band\b|\bor\b)(?:\s*(?:and|or)\b)?[\s\[(*_`'\"]*([A-D])(?![A-Za-z0-9'’])"
)
_NEXT_LINE = re.compile(r"^[^\n]*\n\s*[\[(*_>-]*([A-D])[.):\]]")

_ADVERB = r"(?:(?:indeed|actually|clearly|definitely|therefore|thus|probably|(?:most\s+)?likely)\b[\s,:]*)?"
_SAY = rf"(?:is|are|would\s+be|should\s+be|must\s+be|will\s+be|=|:)(?!\s+not\b)[\s:]*{_ADVERB}"
# "A" may be an article: "the answer is A large star".
_LETTER = (
    r"([B-D](?![A-Za-z0-9'’])"
    r"|A(?![A-Za-z0-9'’]|\s+(?!(?:because|since|as|for|due|given|which|is|and|or|but)\b)[a-z]))"
)
_STATED = re.compile(
    r"\b(?i:answer|option|choice|(?:correct|right|best)\s+one)\b"
    rf"[\s\[(*_\])]*(?i:{_SAY})[\s*_:]*(?i:(?:the\s+)?(?:option|choice|letter)\s+)?[\s\[({{*_`'\"“‘$]*{_LETTER}"
    r"|\b(?i:choose|select|pick|go\s+with)\s+(?i:(?:the\s+)?(?:option|choice|letter|answer)\s+)?"
    rf"[\[({{*_`'\"“‘]*{_LETTER}"
)
_NAMED = re.compile(
    rf"\b(?i:option|choice|answer)\s+[\[(*_`'\"]*{_LETTER}"
    r"|[\[(]\s*([A-D])\s*[\])]"
    r"|\*\*\s*([A-D])\s*[.):]?\s*\*\*"
    r"|\\boxed\{\s*(?:\\text\{)?\s*\(?([A-D])\b"
    r"|^[ \t>*-]*([A-D])[.):](?=\s|$)",
    re.MULTILINE,
)
_AFTER_ANSWER = re.compile(rf"\banswer\b[\s*_]*{_SAY}", re.IGNORECASE)
_AFTER_IS = re.compile(rf"\b(?:is|are|was|were)\b(?!\s+not\b)[\s:]*{_ADVERB}", re.IGNORECASE)

_TRUTH = {"true": 0, "yes": 0, "false": 1, "no": 1}
_ECHO = re.compile(r"\[?true\s*/\s*false\]?", re.IGNORECASE)
_FIRST_TRUTH = re.compile(
    r"(?:(true|false)\b|(yes|no)\b(?=\s*$|\s*[\n\r]|\s*[.,;:!)\]}*_`'\"”’-]))"
    r"(?!\s*\]?\s*(?:/|or\b|and\b)\s*\[?\s*(?:true|false|yes|no)\b)",
    re.IGNORECASE,
)
_STATED_TRUTH = re.compile(
    rf"\banswer\b[\s\[(*_\])]*{_SAY}[\s\[({{*_`'\"“‘:]*(true|false|yes|no)\b(?!\s*/|\s*or\b)", re.IGNORECASE
)
_NAMED_TRUTH = re.compile(r"\b(true|false)\b", re.IGNORECASE)
_UNSURE = re.compile(r"(?:\bnot|n['’]t|\bneither|\bwhether)\b[^.\n]{0,40}?\b(?:true|false)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Extraction:
    """What was found.

    Attributes:
        option: index into the item's options; None: unparsable.
        rule: which rule decided: ``first``, ``stated``, ``named`` or ``text``; ``none`` where nothing was found, and
            ``several`` where one rule found different options.
    """

    option: int | None
    rule: str


def extract(item: Item, answer: str) -> Extraction:
    """The option that ``answer`` chose, by the rules at the head of this file."""
    if item.dataset == "boolq":
        rules, answer = _TRUTH_RULES, _ECHO.sub(" ", answer)
    else:
        rules = _letter_rules(item.options)
    for name, rule in rules:
        found = set(rule(answer))
        if len(found) == 1:
            return Extraction(found.pop(), name)
        if found:
            return Extraction(None, "several")
    return Extraction(None, "none")


_Rule = tuple[str, Callable[[str], Iterable[int]]]


def _letter_rules(options: tuple[str, ...]) -> tuple[_Rule, ...]:
    return (
        ("first", _first_letter),
        ("stated", lambda answer: _letters(_STATED, answer)),
        ("named", lambda answer: _letters(_NAMED, answer)),
        ("text", lambda answer: _option_text(answer, options)),
    )


def _without_label(answer: str) -> str:
    answer = answer.lstrip(_OPENING)
    label = _LABEL.match(answer)
    return answer[label.end() :].lstrip(_OPENING) if label else answer


def _first_letter(answer: str) -> list[int]:
    answer = _without_label(answer)
    match = _FIRST.match(answer)
    if match is None:
        return []
    letter, rest = match[1], answer[1:]
    if letter.islower() and not _SMALL.match(rest):
        return []
    others = [pattern.match(rest) for pattern in (_ANOTHER, _NEXT_LINE)]
    return [LETTERS.index(letter.upper()), *(LETTERS.index(other[1]) for other in others if other)]


def _letters(pattern: re.Pattern[str], answer: str) -> list[int]:
    found = []
    for match in pattern.finditer(answer):
        found.append(next(filter(None, match.groups())))
        another = _ANOTHER.match(answer[match.end() :])
        found += [another[1]] if another else []
    return [LETTERS.index(letter) for letter in found]


def _option_text(answer: str, options: tuple[str, ...]) -> list[int]:
    first = next(iter(answer.strip().splitlines()), "")
    begins = [first, *(answer[match.end() :] for match in _AFTER_ANSWER.finditer(answer))]
    closed = [first[match.end() :] for match in _AFTER_IS.finditer(first)]
    found = []
    for places, fit in ((begins, _begins), (closed, _is_closed)):
        for place in map(_plain, places):
            fits = [(len(text), index) for index, text in enumerate(map(_plain, options)) if text and fit(place, text)]
            longest = max(fits, default=(0, -1))[0]
            found += [index for length, index in fits if length == longest]
    return found


def _begins(place: str, text: str) -> bool:
    return place.startswith(text) and not (place[len(text) :][:1].isalnum() and text[-1:].isalnum())


def _is_closed(place: str, text: str) -> bool:
    return place.startswith(text) and place[len(text) :][:1] in ("", *".,;:!)]*\"'”’")


def _plain(text: str) -> str:
    return " ".join(text.split()).lstrip(_EDGES[0]).rstrip(_EDGES[1]).casefold()


def _first_truth(answer: str) -> list[int]:
    match = _FIRST_TRUTH.match(_without_label(answer))
    return [_TRUTH[(match[1] or match[2]).lower()]] if match else []


def _truths(pattern: re.Pattern[str], answer: str) -> list[int]:
    return [_TRUTH[match[1].lower()] for match in pattern.finditer(answer)]


def _named_truth(answer: str) -> list[int]:
    return [] if _UNSURE.search(answer) else _truths(_NAMED_TRUTH, answer)


_TRUTH_RULES: tuple[_Rule, ...] = (
    ("first", _first_truth),
    ("stated", lambda answer: _truths(_STATED_TRUTH, answer)),
    ("named", _named_truth),
)
