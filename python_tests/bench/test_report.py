"""bench.report on small made-up results, run as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
FACTS = {"device": "Some CPU", "threads": 2, "torch": "2.13.0", "commit": "abc"}


def report(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench.report", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def ops_file(path: Path, seconds: float, rows: tuple[int, ...] = (1, 8)) -> Path:
    def bench(count: int) -> dict[str, Any]:
        case = {"op": "add_l2norm", "dtype": "float32", "rows": count, "width": 64}
        figures = {"seconds": seconds * count, "gbps": 3.0, "share_of_copy": 0.75}
        slower = {"torch.add": {"seconds": 2.0, "ratio": 1.25}} if count == 1 else {}
        return {"extra_info": {**FACTS, **case, **figures, "alternatives": slower}}

    path.write_text(json.dumps({"benchmarks": [bench(count) for count in rows]}))
    return path


def pairs_file(path: Path) -> Path:
    row = {
        **{"model": "m", "dtype": "float32", "work": "decode", "variant": "fuse=add", "threads": 1, "pairs": 50},
        **{"base_seconds": 0.5, "subject_seconds": 0.505, "ratio": 1.01, "low": 1.005, "high": 1.015},
        **{"control_low": 0.995, "control_high": 1.004, "limit": 1.02, "verdict": "met"},
    }
    path.write_text(json.dumps({"kind": "overhead", "environment": FACTS, "rows": [row]}))
    return path


def test_ops_become_one_table_an_op_with_gaps_where_nothing_was_measured(tmp_path: Path) -> None:
    done = report(ops_file(tmp_path / "a.json", 2e-6))
    assert done.returncode == 0, done.stderr
    assert "Some CPU, 2 threads, torch 2.13.0, commit abc" in done.stdout
    assert "| float32 | 1 × 64 | 2 µs | 3.0 | 75 % | 1.25 |" in done.stdout
    assert "| float32 | 8 × 64 | 16 µs | 3.0 | 75 % | – |" in done.stdout


def test_pairs_show_interval_control_limit_and_verdict(tmp_path: Path) -> None:
    done = report(pairs_file(tmp_path / "a.json"))
    wanted = (
        "| m float32, decode, fuse=add, 1 threads | 500 ms | 1.010 (1.005 … 1.015) | 0.995 … 1.004 | 50 | 1.02 | met |"
    )
    assert wanted in done.stdout


def test_two_files_are_compared_row_by_row(tmp_path: Path) -> None:
    done = report(ops_file(tmp_path / "old.json", 2e-3), ops_file(tmp_path / "new.json", 1e-3, rows=(8, 64)))
    assert "| add_l2norm float32 8×64 | 16 ms | 8 ms | 0.500 |" in done.stdout
    assert "1 rows only in old, 1 only in new" in done.stdout


def test_kinds_do_not_mix(tmp_path: Path) -> None:
    done = report(ops_file(tmp_path / "a.json", 1.0), pairs_file(tmp_path / "b.json"))
    assert done.returncode == 2
    assert "expected two results of one kind, got ops and overhead" in done.stderr


def test_other_json_is_refused_with_its_keys(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"speed": 1}')
    done = report(tmp_path / "x.json")
    assert done.returncode != 0
    assert "expected results of one of the benchmarks, got keys ['speed']" in done.stderr


@pytest.mark.parametrize("make", [lambda path: ops_file(path, 1e-3), pairs_file])
def test_plots_are_pictures(tmp_path: Path, make: Any) -> None:
    done = report(make(tmp_path / "a.json"), "--plot", tmp_path / "a.png")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_some_rows(tmp_path: Path) -> None:
    path = ops_file(tmp_path / "a.json", 1e-3, rows=(1, 8, 64))
    done = report(path, "--rows", "(1|64)×64$")
    assert "| float32 | 1 × 64 |" in done.stdout
    assert "| float32 | 64 × 64 |" in done.stdout
    assert "| float32 | 8 × 64 |" not in done.stdout
    done = report(path, "--rows", "bfloat16")
    assert done.returncode != 0
    assert "expected rows with 'bfloat16' in their names, got none" in done.stderr
