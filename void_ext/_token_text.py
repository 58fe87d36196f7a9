"""Tokens as labels: every character visible (spaces, newlines, half characters), none that the font cannot draw."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.font_manager import FontProperties
    from transformers import PreTrainedTokenizerBase

_VISIBLE = str.maketrans({" ": "·", "\n": "↵", "\r": "␍", "\t": "⇥", "\u00a0": "⍽"})
_LONGEST = 18
# Beside matplotlib's own font, which has no Chinese, Japanese, Korean or Indic letters and no emoji.
_OTHER_FONTS = (
    *("Noto Sans CJK JP", "Noto Sans CJK SC", "WenQuanYi Zen Hei", "Droid Sans Fallback", "Noto Sans"),
    *("Noto Sans Devanagari", "Noto Emoji", "Noto Sans Symbols2", "FreeSans", "Unifont"),
)


class Font:
    """The fonts that are here, and what they can draw."""

    def __init__(self) -> None:
        self._files = [("DejaVu Sans", _file_of("DejaVu Sans"))]
        self._files += [(name, file) for name in _OTHER_FONTS if (file := _installed(name))]

    def properties(self, size: float, weight: str = "normal") -> FontProperties:
        from matplotlib.font_manager import FontProperties

        return FontProperties(family=[name for name, _ in self._files], size=size, weight=weight)

    def shown(self, text: str) -> str:
        """``text`` with its code point in place of each character that no font here can draw."""
        return "".join(char if self._draws(char) else f"\\u{ord(char):x}" for char in text)

    def _draws(self, char: str) -> bool:
        return char.isprintable() and any(_has_glyph(file, char) for _, file in self._files)


def token_texts(ids: list[int], tokenizer: PreTrainedTokenizerBase | None, font: Font) -> list[str]:
    """One label per token id; without a tokenizer the id itself, for -1 (unknown) a question mark."""
    return [_clipped(font.shown(_text(token, tokenizer).translate(_VISIBLE))) for token in ids]


def _text(token: int, tokenizer: PreTrainedTokenizerBase | None) -> str:
    if token < 0:
        return "?"
    if tokenizer is None:
        return str(token)
    text = str(tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False))
    pieces: Any = tokenizer.convert_ids_to_tokens([token])
    raw = pieces[0] if pieces and isinstance(pieces[0], str) else ""
    if "\ufffd" in text:  # a part of a character: its bytes, where the vocabulary is one of bytes
        table = _bytes_of_characters()
        if raw and all(char in table for char in raw):
            return "⟨" + "".join(f"{table[char]:02X}" for char in raw) + "⟩"
        return raw or text
    if raw.startswith("▁") and not text.startswith(" "):  # sentencepiece: decoding one token alone drops its space
        return " " + text
    return text if text else raw or f"id {token}"


def _clipped(text: str) -> str:
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


@cache
def _bytes_of_characters() -> dict[str, int]:
    """The printable stand-ins for the 256 bytes in byte-level vocabularies (as GPT-2 introduced them)."""
    own = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + index): byte for index, byte in enumerate(others)}


def _file_of(name: str) -> str:
    from matplotlib.font_manager import FontProperties, findfont

    return str(findfont(FontProperties(family=name)))


@cache
def _installed(name: str) -> str | None:
    from matplotlib.font_manager import fontManager

    if name not in fontManager.get_font_names():
        return None
    return _file_of(name)


@cache
def _font(file: str) -> Any:
    from matplotlib.font_manager import get_font

    return get_font(file)


def _has_glyph(file: str, char: str) -> bool:
    return bool(_font(file).get_char_index(ord(char)))
