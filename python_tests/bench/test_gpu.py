"""bench.gpu, as far as it goes without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import gpu


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Which steps ran; each takes a hundred seconds of a clock that stands still otherwise."""
    ran: list[str] = []
    now = [0.0]

    def step(name: str):
        def run(step: gpu.Step) -> bool:
            assert step.left() <= 100
            ran.append(name)
            now[0] += 100
            return True

        return run

    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu, "_has_gpu", lambda: True)
    monkeypatch.setattr(gpu, "build", lambda step: True)
    monkeypatch.setattr(gpu, "describe", lambda device: {})
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(gpu, "STEPS", {name: step(name) for name in ("build", "test", "ops", "e2e")})
    return ran


def test_all_steps_run_in_their_order(steps: list[str]) -> None:
    assert gpu.main(["all", "--limit", "100"]) == 0
    assert steps == ["test", "ops", "e2e"]


def test_no_step_is_begun_when_the_time_for_all_is_over(steps: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["all", "--limit", "100", "--total", "229"]) == 1
    assert steps == ["test", "ops"]
    assert "e2e: the time is over; run it again for the rest" in capsys.readouterr().out
    assert gpu.main(["e2e", "--limit", "100"]) == 0


def test_without_a_gpu_nothing_is_measured(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_has_gpu", lambda: False)
    assert gpu.main(["ops"]) == 2
    assert "found none: nothing measured" in capsys.readouterr().err
