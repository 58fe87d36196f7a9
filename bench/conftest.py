"""Options of the benchmarks: what to measure on, and how much of it."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("void_ext benchmarks")
    group.addoption("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: cuda where there is one")
    group.addoption("--rounds", type=int, default=20, help="rounds a case is measured for")
    group.addoption("--shapes", choices=["all", "tiny"], default="all", help="tiny: a look at whether all cases run")
    group.addoption("--lock", default=None, metavar="FILE", help="held while measuring, where several processes do")
