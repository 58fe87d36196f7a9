"""Runs the tests marked gpu until a deadline and notes each outcome at once, so that a second run takes up the rest."""

from __future__ import annotations

import json
import sys
import time

import pytest

from bench.environment import RESULTS

REPORT = RESULTS / "gpu-tests.jsonl"


class Resume:
    """pytest plugin: leaves out what passed on the same sources, notes outcomes, stops at the deadline."""

    def __init__(self, seconds: float, sources: str):
        self.deadline = time.monotonic() + seconds
        self.sources = sources
        REPORT.parent.mkdir(parents=True, exist_ok=True)
        lines = REPORT.read_text().splitlines() if REPORT.exists() else []
        entries = [entry for entry in map(json.loads, lines) if entry["sources"] == sources]
        self.passed = {entry["test"] for entry in entries if entry["outcome"] == "passed"}

    def pytest_addoption(self, parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
        # The project's settings name a timeout; without its plugin the strict settings would refuse to start.
        if not pluginmanager.hasplugin("timeout"):
            parser.addini("timeout", "seconds a test may take (the plugin is not installed: without effect)")

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        again = [item for item in items if item.nodeid in self.passed]
        if again:
            config.hook.pytest_deselected(items=again)
            items[:] = [item for item in items if item.nodeid not in self.passed]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            entry = {
                "sources": self.sources,
                "test": report.nodeid,
                "outcome": report.outcome,
                "seconds": report.duration,
            }
            with REPORT.open("a") as stream:
                stream.write(json.dumps(entry) + "\n")

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> None:
        if time.monotonic() > self.deadline:
            item.session.shouldstop = "the time for this step is over; run it again for the rest"


def main(seconds: str, sources: str, *paths: str) -> int:
    arguments = ["-m", "gpu", *(paths or ["python_tests"]), "--continue-on-collection-errors", "-p", "no:cacheprovider"]
    resume = Resume(float(seconds), sources)
    status = int(pytest.main(arguments, plugins=[resume]))
    return 0 if status == pytest.ExitCode.NO_TESTS_COLLECTED and resume.passed else status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
