"""docs/ops.md, from the docstrings of the public ops.

``python -m void_ext.testing.docs docs/ops.md`` writes it, ``--check`` says whether it is what would be written.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import void_ext
from void_ext import _files, ops

_HEAD = """# The ops

Made by `python -m void_ext.testing.docs docs/ops.md` from the docstrings; a test compares. Everything here can be used
by itself, in eager code and under `torch.compile`, and `help(void_ext.add_l2norm)` shows the same. All ops are
registered in torch's namespace `void_ext`; `(a!)` in a schema marks what is written in place. They run on CPU and,
where the build has CUDA, on CUDA; they check their arguments before they write.
"""
_SECTION = re.compile(r"^(\w+):(?: (.*))?$")
_ENTRY = re.compile(r"^ {4}(\S[^:]*): (.*)$")


def page() -> str:
    """The whole page, markdown."""
    names = [*ops.__all__, "run_rows"]
    contents = [f"- [`{name}`](#{name}): {_first_line(getattr(void_ext, name))}" for name in names]
    parts = [_HEAD, "\n".join(contents) + "\n", *(_entry(name) for name in names)]
    return "\n".join(parts)


def _first_line(function: Callable[..., Any]) -> str:
    return _marked((inspect.getdoc(function) or "").split("\n\n", 1)[0].replace("\n", " "))


def _entry(name: str) -> str:
    function = getattr(void_ext, name)
    signature = str(inspect.signature(function)).replace("'", "")
    parts = [f"## {name}\n", f"```python\nvoid_ext.{name}{signature}\n```\n"]
    if name in ops.__all__:
        packet = getattr(torch.ops.void_ext, name)
        schemas = [str(getattr(packet, overload)._schema) for overload in sorted(packet.overloads())]
        parts.append("```\n" + "\n".join(schemas) + "\n```\n")
    parts.append(_body(inspect.getdoc(function) or ""))
    return "\n".join(parts)


def _body(text: str) -> str:
    """A docstring as markdown: its sections in bold, what they list as lists."""
    lines: list[str] = []
    for line in text.splitlines():
        section, entry = _SECTION.match(line), _ENTRY.match(line)
        if section is not None:
            if lines and lines[-1]:
                lines.append("")
            lines.append(f"**{section[1]}.**" + (f" {section[2]}" if section[2] else ""))
            lines += [] if section[2] else [""]
        elif entry is not None and _lists(lines):
            lines.append(f"- `{entry[1]}`: {entry[2]}")
        elif line.startswith("    ") and lines and lines[-1].startswith(("- ", "  ")):
            lines.append("  " + line.strip())
        else:
            lines.append(line.strip())
    return _marked("\n".join(lines)) + "\n"


def _lists(lines: list[str]) -> bool:
    """Whether the section that is being read lists things by name."""
    head = next((line for line in reversed(lines) if line.startswith("**")), "")
    return head in ("**Args.**", "**Raises.**")


def _marked(text: str) -> str:
    """reStructuredText's marks as markdown's."""
    text = re.sub(r":(?:func|class|meth|mod):`~?([^`]+)`", r"`\1`", text)
    return text.replace("``", "`")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m void_ext.testing.docs", description=__doc__)
    parser.add_argument("path", type=Path, help="the page, docs/ops.md")
    parser.add_argument("--check", action="store_true", help="write nothing; 1 where the page is another")
    given = parser.parse_args(arguments)
    text = page()
    if given.check:
        if given.path.is_file() and given.path.read_text() == text:
            return 0
        print(f"{given.path}: not what the docstrings say; python -m void_ext.testing.docs {given.path}")
        return 1
    with _files.replacing(given.path, force=True) as temporary:
        temporary.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
