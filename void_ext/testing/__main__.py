"""``python -m void_ext.testing DIRECTORY``: write the evaluation tasks that need no network into a directory."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from void_ext.testing.tasks import write_capitals, write_topics


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m void_ext.testing", description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--force", action="store_true", help="replace files that exist")
    options = parser.parse_args(arguments)
    try:
        options.directory.mkdir(exist_ok=True)
        for write in (write_capitals, write_topics):
            print(write(options.directory, force=options.force))
    except (OSError, ImportError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
