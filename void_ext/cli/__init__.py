"""The command ``void-ext``: ``info``, ``trace``, ``generate``, ``plan``, ``eval`` and ``demo``.

Exit codes: 0 done, 1 an error (one message on stderr), 2 wrong usage, 130 interrupted, 143 ended by SIGTERM.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from void_ext.cli._parser import build_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; ``argv`` without the program's name, None takes the process's own."""
    arguments = build_parser().parse_args(argv)
    from void_ext.cli._console import Terminal

    try:
        terminal = Terminal()
    except ModuleNotFoundError as error:
        print(f"void-ext: error: the package {error.name} is missing: pip install {error.name}", file=sys.stderr)
        return 1
    try:
        code: int = arguments.run(arguments, terminal)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        terminal.error("interrupted")
        return 130
    except BrokenPipeError:
        # Whoever read the output has gone (`| head`). Python would complain once more while it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if arguments.debug:
            raise
        # What this package raises on purpose reads as a sentence; the name of anything else helps to report it.
        on_purpose = isinstance(error, (OSError, ValueError, ImportError))
        text = str(error) or type(error).__name__
        terminal.error(text if on_purpose else f"{type(error).__name__}: {text} (--debug shows where)")
        return 1
