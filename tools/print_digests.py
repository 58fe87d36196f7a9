"""Print the digests of the decoder layers' and attentions' forwards of the installed transformers, grouped.

A new release that changes a forward makes its layers fall back to the generic adapter; what is printed here goes into
void_ext/patching/registry.py once somebody has read the forward it stands for.
"""

from __future__ import annotations

import argparse
import ast
import collections
import pathlib
import sys

import transformers

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from void_ext.patching.registry import digest_of_source


def forwards(suffix: str) -> dict[str, list[str]]:
    """digest -> classes whose name ends so, of all modeling files, read as text: nothing is imported."""
    found: dict[str, list[str]] = collections.defaultdict(list)
    for file in sorted((pathlib.Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name.endswith(suffix):
                for part in node.body:
                    if isinstance(part, ast.FunctionDef) and part.name == "forward":
                        found[digest_of_source(part)].append(node.name)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suffix", nargs="*", default=["DecoderLayer", "Attention", "RMSNorm"])
    arguments = parser.parse_args()
    print(f"transformers {transformers.__version__}")
    for suffix in arguments.suffix:
        print(f"\n{suffix}")
        for found, names in sorted(forwards(suffix).items(), key=lambda item: -len(item[1])):
            print(f"{found}  {' '.join(names)}")


if __name__ == "__main__":
    main()
