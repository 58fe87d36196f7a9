"""One step on a machine with a GPU: `python -m bench.gpu build|test|ops|e2e|skip|sanitize|profile|all`.

Uses the Python it runs under, downloads nothing, ends within 9 minutes a step (`--limit`; `--total` is for all of them
together) and takes up where the last call left off as long as the sources are the same. Results, and what was
unavailable, go to bench/results/gpu-*.json and to $OUT where that is set. Pure wheels that lie in build/wheels (`make
gpu-wheels`) are used where the packages are not installed, and build/rivals (`make gpu-rivals`) is: rivals to be
compared with.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from bench.environment import RESULTS, ROOT, describe, sources, write_json

# Tests marked gpu, in parts that run beside each other.
TESTS = (
    ("python_tests/gpu",),
    ("python_tests/ops/test_add_choice.py",),
    ("python_tests/ops", "--ignore=python_tests/ops/test_add_choice.py"),
    ("python_tests", "--ignore=python_tests/gpu", "--ignore=python_tests/ops"),
)
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
PROCESSES = 14  # of the op benchmarks at once; each holds some GB of the device's memory
ROUNDS = 12  # of each variant of an op, in turns
LEAST = 30  # seconds that a step is begun with
QUOTED = 30  # lines of a failed command's output
WHEELS = ROOT / "build" / "wheels"
RIVALS = ROOT / "build" / "rivals"
COUNTERS = "dram__throughput.avg.pct_of_peak_sustained_elapsed,dram__bytes.sum.per_second,gpu__time_duration.sum"


class Step:
    """A step's record, its deadline, and the commands it runs."""

    def __init__(self, name: str, limit: float):
        self.name = name
        RESULTS.mkdir(parents=True, exist_ok=True)
        self.path = RESULTS / f"gpu-{name}.json"
        self.deadline = time.monotonic() + limit
        self.sources = sources()
        old = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.done: dict[str, Any] = old.get("done", {}) if old.get("sources") == self.sources else {}
        self.unavailable: dict[str, str] = {}
        self.lock = threading.Lock()

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def run(self, *command: str, env: dict[str, str] | None = None, log: str | None = None) -> int:
        """The command's exit status; 124 where the step's time ran out. Its output is passed through, or goes to
        bench/results/<log>.log, of which the end is shown where the command failed."""
        print("+", " ".join(command), flush=True)
        if self.left() <= 5:
            return 124
        path = RESULTS / f"{log}.log"
        with path.open("wb") if log else contextlib.nullcontext() as stream:
            streams: dict[str, Any] = {"stdout": stream, "stderr": subprocess.STDOUT} if log else {}
            try:
                environment = os.environ | (env or {})
                status = subprocess.run(command, cwd=ROOT, env=environment, timeout=self.left(), **streams).returncode
            except subprocess.TimeoutExpired:
                status = 124
        if log and status != 0:
            print("\n".join(path.read_text(errors="replace").splitlines()[-QUOTED:]), flush=True)
        return status

    def note(self, name: str, outcome: str) -> None:
        """What came of a part, kept at once: a step that is cut off goes on from there."""
        with self.lock:
            self.done[name] = outcome
            self.save()

    def save(self) -> None:
        facts = describe("cuda" if _has_gpu() else "cpu")
        record = {"step": self.name, "sources": self.sources, "environment": facts, "unavailable": self.unavailable}
        write_json(self.path, record | {"done": self.done})


def build(step: Step) -> bool:
    """The libraries in place, for this GPU's architecture alone: made where they are missing, older or without CUDA."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    arch = f"{major}.{minor}"
    libraries = [*ROOT.glob("void_ext/_ops*.so"), *ROOT.glob("void_ext/_host*.so")]
    newest = max(path.stat().st_mtime for path in [*(ROOT / "csrc").rglob("*.*"), ROOT / "setup.py"])
    probe = "from void_ext import _library as l; l.load(); i = l.build_info(); print(i['cuda'], *i['cuda_arches'])"
    stale = len(libraries) < 2 or min(path.stat().st_mtime for path in libraries) < newest
    if not stale:
        shown = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True)
        words = shown.stdout.split()
        stale = shown.returncode != 0 or words[:1] != ["True"] or f"{major}{minor}" not in words
    status = 0
    if stale:
        environment = {"VOID_EXT_CUDA": "1", "TORCH_CUDA_ARCH_LIST": arch}
        status = step.run(sys.executable, "setup.py", "build_ext", "--inplace", env=environment)
    step.done["build"] = {"made": stale, "arch": arch, "status": status}
    return status == 0


def test(step: Step) -> bool:
    """The tests marked gpu; those that passed on the same sources are not run again."""
    for package in ("hypothesis", "pytest_timeout", "transformers"):
        if importlib.util.find_spec(package) is None:
            step.unavailable[package] = "not installed"

    def look(part: int) -> int:
        command = (sys.executable, "-m", "bench.gpu_tests", str(step.left() - 20), step.sources, *TESTS[part])
        return step.run(*command, log=f"gpu-tests-{part}")

    with ThreadPoolExecutor(len(TESTS)) as pool:
        statuses = list(pool.map(look, range(len(TESTS))))
    report = RESULTS / "gpu-tests.jsonl"
    outcomes: dict[str, str] = {}
    if report.exists():
        for line in report.read_text().splitlines():
            entry = json.loads(line)
            if entry["sources"] == step.sources:
                outcomes[entry["test"]] = entry["outcome"]
    step.done["tests"] = outcomes
    counts = {kind: list(outcomes.values()).count(kind) for kind in sorted(set(outcomes.values()))}
    step.done["counts"] = counts
    step.done["complete"] = all(status in (0, 1) for status in statuses)
    print(f"gpu tests: {counts}")
    for name, outcome in outcomes.items():
        if outcome == "failed":
            print(f"failed: {name}")
    return not any(statuses)


def wheels(step: Step) -> dict[str, str]:
    """What to add to the environment so that the packages of build/wheels and build/rivals are found."""
    place = ROOT / "build" / "wheels-unpacked"
    for wheel in sorted(WHEELS.glob("*-none-any.whl")):
        with zipfile.ZipFile(wheel) as archive:  # unpacked: Triton reads the source of its kernels
            archive.extractall(place)
    places = [folder for folder in (place, RIVALS) if folder.exists()]
    for packages in (("liger_kernel",), ("flashinfer",), ("quack", "rivals_aot")):
        carried = any((folder / package).exists() for folder in places for package in packages)
        if not carried and not any(importlib.util.find_spec(package) for package in packages):
            step.unavailable[packages[0]] = "not installed, and not in build/wheels or build/rivals"
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), *map(str, places)]))}
    if RIVALS in places:  # its FlashInfer has the CUDA norms alone and nothing to compile; the home may be read-only
        environment |= {"FLASHINFER_USE_CUDA_NORM": "1", "FLASHINFER_DISABLE_JIT": "1"}
        environment["FLASHINFER_WORKSPACE_BASE"] = str(ROOT / "build")
    return environment


def ops(step: Step) -> bool:
    """The op benchmarks, one process for an op and dtype, merged into gpu-ops-rows.json for bench.report."""
    from bench.op_cases import DTYPES, OPS, WITHOUT_DTYPE  # behind the build, which they need

    environment = wheels(step)
    names = [f"add_rms_norm-{dtype}-{kind}" for dtype in DTYPES for kind in ("decode", "prefill")]  # the longest first
    rest = [op for op in OPS if op != "add_rms_norm"]
    # Rows of one kind alone have no dtype.
    names += [f"{op}-{dtype}" for dtype in DTYPES for op in rest if op not in WITHOUT_DTYPE or dtype == "float32"]
    parts = {name: RESULTS / f"gpu-ops-{name}.json" for name in names}
    environment["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # there are as many processes
    lock = RESULTS / "gpu-ops.lock"

    def measure(name: str) -> None:
        wanted = ("-k", f"test_op and {name}-", "--device=cuda", f"--rounds={ROUNDS}", f"--lock={lock}")
        command = ("-m", "pytest", "bench/bench_ops.py", "-q", f"--benchmark-json={parts[name]}", *wanted)
        status = step.run(sys.executable, *command, env=environment, log=f"gpu-ops-{name}")
        step.note(name, "measured" if status == 0 else f"exit status {status}")

    missing = [name for name, part in parts.items() if not (step.done.get(name) == "measured" and part.exists())]
    # Compiling the alternatives takes most of the time, and little of the GPU's; one process at a time measures.
    with ThreadPoolExecutor(max(1, min(PROCESSES, (os.cpu_count() or 1) - 2))) as pool:
        list(pool.map(measure, missing))
    found = [part for name, part in parts.items() if step.done.get(name) == "measured" and part.exists()]
    rows = [json.loads(part.read_text()) for part in found]
    if rows:
        merged = rows[0] | {"benchmarks": [row for part in rows for row in part["benchmarks"]]}
        write_json(RESULTS / "gpu-ops-rows.json", merged)
        step.run(sys.executable, "-m", "bench.report", str(RESULTS / "gpu-ops-rows.json"))
    return all(step.done.get(name) == "measured" for name in parts)


def e2e(step: Step) -> bool:
    """Models of 7 and 8 billion random weights, patched against unpatched; resumes by cell."""
    if importlib.util.find_spec("transformers") is None:
        step.unavailable["transformers"] = "not installed"
        return False
    status = step.run(sys.executable, "-m", "bench.bench_e2e", "--limit", str(int(step.left() - 20)))
    step.done["e2e"] = "measured" if status == 0 else f"exit status {status}"
    return status == 0


def skip(step: Step) -> bool:
    """The same models with layers skipped, against models that lack them; resumes by cell."""
    if importlib.util.find_spec("transformers") is None:
        step.unavailable["transformers"] = "not installed"
        return False
    options = ("--device", "cuda", "--cell-seconds", "5", "--limit", str(int(step.left() - 20)))
    status = step.run(sys.executable, "-m", "bench.bench_skip", *options)
    step.done["skip"] = "measured" if status == 0 else f"exit status {status}"
    return status == 0


def sanitize(step: Step) -> bool:
    """The kernels under each tool of compute-sanitizer, beside each other."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        step.unavailable["compute-sanitizer"] = "not on PATH"
        return False

    def look(check: str) -> None:
        driver = (sys.executable, "tools/gpu/drive_ops.py")
        status = step.run(tool, f"--tool={check}", "--error-exitcode=77", *driver, log=f"gpu-{check}")
        step.note(check, {0: "clean", 77: "errors found", 124: "out of time"}.get(status, f"exit status {status}"))
        print(f"{check}: {step.done[check]}", flush=True)

    with ThreadPoolExecutor(len(SANITIZERS)) as pool:
        list(pool.map(look, [check for check in SANITIZERS if step.done.get(check) != "clean"]))
    return all(step.done[check] == "clean" for check in SANITIZERS)


def profile(step: Step) -> bool:
    """What ncu counts for the two main kernels at 16384 x 4096 in bfloat16: device memory's bandwidth, and time."""
    tool = shutil.which("ncu")
    if tool is None:
        step.unavailable["ncu"] = "not on PATH"
        return False
    report = RESULTS / "gpu-profile.csv"
    counting = (
        "--clock-control",
        "none",
        "--csv",
        "--log-file",
        str(report),
        "--metrics",
        COUNTERS,
        "--kernel-name",
        "regex:add_.*norm",
    )
    driver = (sys.executable, "tools/gpu/drive_ops.py", "--large")
    status = step.run(tool, *counting, *driver)
    text = report.read_text() if report.exists() else ""
    counted = [line for line in text.splitlines() if line.startswith('"')]
    refused = [line for line in text.splitlines() if line.startswith("==ERROR==")]
    if status != 0 or len(counted) < 2:
        step.unavailable["ncu"] = refused[0] if refused else f"exit status {status}"
        return False
    step.done["profile"] = counted
    return True


STEPS: dict[str, Callable[[Step], bool]] = {
    "build": build,
    "test": test,
    "ops": ops,
    "e2e": e2e,
    "skip": skip,
    "sanitize": sanitize,
    "profile": profile,
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("step", choices=[*STEPS, "all"])
    parser.add_argument("--limit", type=float, default=520, help="seconds a step may take, the build included")
    parser.add_argument("--total", type=float, help="seconds that all steps may take together; a second call goes on")
    options = parser.parse_args(arguments)
    if not _has_gpu():
        print("bench.gpu: expected a CUDA device that torch sees, found none: nothing measured", file=sys.stderr)
        return 2
    names = [name for name in STEPS if name != "build"] if options.step == "all" else [options.step]
    end = time.monotonic() + (options.total or math.inf)
    results = {}
    for name in names:
        left = end - time.monotonic()
        if left < LEAST:
            print(f"{name}: the time is over; run it again for the rest")
            results[name] = False
            continue
        step = Step(name, min(options.limit, left))
        built = build(step)
        results[name] = built and (name == "build" or STEPS[name](step))
        step.save()
    print("; ".join(f"{name}: {'done' if fine else 'NOT done or failed'}" for name, fine in results.items()))
    return 0 if all(results.values()) else 1


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    sys.exit(main())
