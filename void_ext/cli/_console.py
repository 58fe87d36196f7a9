"""Output: results on stdout, progress and errors on stderr; plain text unless a terminal reads it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console

    from void_ext.models import Progress

_WIDTH_MOST = 110


class Terminal:
    """Where a command writes. ``NO_COLOR`` and ``TERM=dumb`` mean plain text as a pipe does."""

    def __init__(self) -> None:
        self.out = _console(sys.stdout)
        self.err = _console(sys.stderr)
        self.width = min(self.out.width, _WIDTH_MOST)
        # Blocks where the encoding has them: a bar must not end in a UnicodeEncodeError.
        self.blocks = _can_encode(sys.stdout, "█▏▊")

    def hush(self, silent: bool = True) -> None:
        """Write nothing more: another process has the word."""
        self.out.quiet = self.err.quiet = silent

    def print(self, text: str = "", style: str | None = None) -> None:
        # A terminal gets whole words on its lines (and spaces for tabs, to measure them), a file the lines as they are.
        if self.out.is_terminal:
            self.out.print(text, style=style, markup=False, highlight=False)
        else:
            self.document(text)

    def document(self, text: str) -> None:
        """Text for another program: not a character is added, not even on a terminal."""
        # Rich would take control characters out, and tabs.
        if not self.out.quiet:
            print(text, file=self.out.file, flush=True)

    def note(self, text: str) -> None:
        self.err.print(text, markup=False, highlight=False, soft_wrap=not self.err.is_terminal)

    def error(self, text: str) -> None:
        self.err.print("void-ext: error: ", style="bold red", end="", markup=False, highlight=False)
        self.note(text)

    @contextmanager
    def waiting(self, *, live: bool = True) -> Iterator[Progress]:
        """A report of what one waits for: ``report(what, done, total)``; not ``live`` leaves the line to others."""
        if live and self.err.is_terminal:
            with _live(self.err) as report:
                yield report
        else:
            yield self._lines()

    def _lines(self) -> Progress:
        said: list[str] = []

        def report(what: str, done: int, total: int) -> None:
            if what not in said:
                said.append(what)
                self.note(f"{what} …")

        return report


@contextmanager
def _live(console: Console) -> Iterator[Progress]:
    from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        tasks: dict[str, object] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                for task in list(progress.task_ids):
                    progress.remove_task(task)
                tasks.clear()
                tasks[what] = progress.add_task(what, total=None)
            progress.update(progress.task_ids[0], completed=done, total=total or None)

        yield report


def _console(stream: TextIO) -> Console:
    from rich.console import Console

    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="replace")
    plain = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
    if plain:
        return Console(file=stream, force_terminal=False, color_system=None, emoji=False)
    return Console(file=stream, emoji=False)


def _can_encode(stream: TextIO, text: str) -> bool:
    try:
        text.encode(stream.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
