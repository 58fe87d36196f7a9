"""Compiles the CUDA kernels for every default architecture and reads what the compiler says: no warnings, no spills, no
stack frames; and, where a cuobjdump is found, that aligned rows move in 128-bit accesses.

Register counts are compared with those in registers.json, which --record renews.

Needs nvcc (found as the build finds it) and a C++ compiler, no GPU and no torch; writes to a temporary folder alone.
Exit status: 0 all is well, 1 something is not, 2 no nvcc.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "build_backend"))

from find_cuda import Arch, Toolkit, arches_for, find_toolkit  # noqa: E402

RECORD = ROOT / "tools" / "registers.json"
FLAGS = ("-std=c++17", "-O3", "-Xptxas=-v", "-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror")
TYPES = {"f": "f32", "6__half": "f16", "13__nv_bfloat16": "bf16"}
# Kernels with a flag for aligned rows have it first; the resident one is for such rows alone.
ALIGNED = re.compile(
    r"(add_l2norm|row_l2norm|streams_l2norm|exit_select|keep_rows|gather_rows|scatter_rows)<\w+, 1.*>"
    r"|add_rms_norm_reread<\w+, \w+, 1.*>|add_rms_norm_resident<.*>"
)
# These read norms, flags or an index as well; so does an add with modes, the last of whose flags says so.
SELECTING = re.compile(r"(exit_select|keep_rows|gather_rows|scatter_rows)<.*|add_(l2norm|rms_norm_reread)<.*, 1>")


@dataclass
class Usage:
    """What ptxas reports for one kernel."""

    registers: int
    shared: int
    stack: int
    spills: int


def readable(symbol: str) -> str:
    """`add_l2norm<bf16, 1, 0>` for the mangled name of that kernel."""
    match = re.search(r"7kernelsL?\d+(\w+?)_kernel(?:I(\w+?)EEv|E)", symbol)
    if match is None:
        return symbol
    name, arguments = match.groups()
    if not arguments:
        return name
    parts: list[str] = []
    while (part := re.match(r"f|6__half|13__nv_bfloat16|S\d*_", arguments)) is not None:
        # A name that was spelt out once is referred to after that.
        parts.append(TYPES.get(part[0], parts[0] if parts else part[0]))
        arguments = arguments[part.end() :]
    return f"{name}<{', '.join([*parts, *re.findall(r'Lb([01])', arguments)])}>"


def compile_for(arch: Arch, toolkit: Toolkit, folder: Path) -> tuple[Path, str, int]:
    """The object file, what nvcc said, its exit status."""
    number = arch.number
    code = f"[sm_{number},compute_{number}]" if arch.ptx else f"sm_{number}"
    made = folder / f"launch-{number}.o"
    command = [str(toolkit.nvcc), *FLAGS, f"-gencode=arch=compute_{number},code={code}", "-c", "-o", str(made)]
    if compiler := os.environ.get("CUDAHOSTCXX"):
        command.append(f"-ccbin={compiler}")
    result = subprocess.run([*command, str(ROOT / "csrc" / "launch.cu")], cwd=folder, capture_output=True, text=True)
    return made, result.stdout + result.stderr, result.returncode


def usages(report: str) -> dict[str, Usage]:
    """Kernel name -> what `ptxas -v` reports."""
    found: dict[str, Usage] = {}
    for block in re.split(r"Compiling entry function '", report)[1:]:
        stack, stores, loads = (
            int(re.search(rf"(\d+) bytes {what}", block)[1])  # type: ignore[index]  # a change of format must not pass
            for what in ("stack frame", "spill stores", "spill loads")
        )
        shared = re.search(r"(\d+) bytes smem", block)
        registers = int(re.search(r"Used (\d+) registers", block)[1])  # type: ignore[index]
        found[readable(block[: block.index("'")])] = Usage(
            registers, int(shared[1]) if shared else 0, stack, stores + loads
        )
    return found


def find_cuobjdump(toolkit: Toolkit) -> Path | None:
    """In the toolkit, on PATH, or in the triton package (which is not imported)."""
    places = [toolkit.home / "bin" / "cuobjdump"]
    if found := shutil.which("cuobjdump"):
        places.append(Path(found))
    spec = importlib.util.find_spec("triton")
    for folder in spec.submodule_search_locations or () if spec else ():
        places.append(Path(folder) / "backends" / "nvidia" / "bin" / "cuobjdump")
    return next((place for place in places if os.access(place, os.X_OK)), None)


def narrow_accesses(cuobjdump: Path, made: Path) -> tuple[int, list[str]]:
    """How many kernels for aligned rows were looked at, and what is wrong with which."""
    dump = subprocess.run([str(cuobjdump), "--dump-sass", str(made)], capture_output=True, text=True, check=True).stdout
    looked, wrong = 0, []
    for part in re.split(r"Function : ", dump)[1:]:
        name = readable(part.split(None, 1)[0])
        if not ALIGNED.fullmatch(name):
            continue
        looked += 1
        loads = re.findall(r"\bLDG\.[\w.]+", part)
        stores = re.findall(r"\bSTG\.[\w.]+", part)
        wide = [len([access for access in accesses if access.endswith(".128")]) for accesses in (loads, stores)]
        # Beside the rows: what selects them is read, and norms are written (two tables at most), and the verdict.
        selecting = SELECTING.fullmatch(name) is not None
        narrow_loads = 0 if selecting else len(loads) - wide[0]
        most = 3 if selecting else 2
        if (
            wide[0] == 0
            or narrow_loads
            or (wide[1] == 0) != name.startswith(("row_l2norm", "streams_l2norm"))
            or len(stores) - wide[1] > most
        ):
            wrong.append(
                f"{name}: {wide[0]} of {len(loads)} loads and {wide[1]} of {len(stores)} stores are 128 bits wide"
            )
        if re.search(r"\b(LDL|STL)\b", part):
            wrong.append(f"{name}: uses local memory")
    return looked, wrong


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Compile the CUDA kernels for every architecture; no spills, wide loads."
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilations at a time")
    parser.add_argument("--record", action="store_true", help=f"write the register counts to {RECORD.name}")
    options = parser.parse_args()

    spec = importlib.util.find_spec("torch")
    where = Path(spec.origin).parent if spec and spec.origin else Path(sys.prefix)
    toolkit = find_toolkit(where)
    if isinstance(toolkit, str):
        print(f"check_nvcc: {toolkit}. Install a CUDA toolkit, or name one by CUDA_HOME.", file=sys.stderr)
        return 2
    arches = arches_for(toolkit)
    print(f"nvcc {toolkit.version} in {toolkit.home} ({toolkit.found_by}); {', '.join(map(str, arches))}")

    faults: list[str] = []
    table: dict[str, dict[str, Usage]] = {}
    with tempfile.TemporaryDirectory(prefix="void_ext_nvcc_") as work:
        folder = Path(work)
        with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
            results = list(pool.map(lambda arch: compile_for(arch, toolkit, folder), arches))
        for arch, (_, report, status) in zip(arches, results, strict=True):
            if status != 0:
                print(report, file=sys.stderr)
                faults.append(f"sm_{arch.number}: does not compile without warnings")
                continue
            for kernel, usage in usages(report).items():
                table.setdefault(kernel, {})[arch.number] = usage
                if usage.stack or usage.spills:
                    faults.append(f"sm_{arch.number}: {kernel}: stack frame {usage.stack} B, spills {usage.spills} B")
        _print_table(table, [arch.number for arch in arches])
        counts = {kernel: {arch: usage.registers for arch, usage in row.items()} for kernel, row in table.items()}
        if options.record:
            RECORD.write_text(
                json.dumps({"nvcc": toolkit.version, "registers": counts}, indent=1, sort_keys=True) + "\n"
            )
        else:
            faults += worse(json.loads(RECORD.read_text()), toolkit.version, counts)

        cuobjdump = find_cuobjdump(toolkit)
        if cuobjdump is None:
            print("128-bit accesses: not checked, no cuobjdump in the toolkit, on PATH or in a triton package")
        else:
            looked = 0
            for arch, (made, _, status) in zip(arches, results, strict=True):
                if status == 0:
                    count, wrong = narrow_accesses(cuobjdump, made)
                    looked += count
                    faults += [f"sm_{arch.number}: {fault}" for fault in wrong]
                    if count == 0:
                        faults.append(f"sm_{arch.number}: cuobjdump shows no kernel for aligned rows")
            print(f"128-bit accesses: looked at {looked} kernels for aligned rows ({cuobjdump})")
    for fault in faults:
        print(f"FAULT {fault}", file=sys.stderr)
    print("faults: none" if not faults else f"faults: {len(faults)}")
    return 1 if faults else 0


def worse(record: dict[str, Any], version: str, counts: dict[str, dict[str, int]]) -> list[str]:
    """Kernels that need more registers than were recorded, with the same nvcc: another one allocates otherwise."""
    if record["nvcc"] != version:
        print(f"registers: not compared, they were recorded with nvcc {record['nvcc']} (--record renews them)")
        return []
    faults = []
    for kernel, row in counts.items():
        for arch, registers in row.items():
            before = record["registers"].get(kernel, {}).get(arch)
            if before is None:
                faults.append(f"sm_{arch}: {kernel}: no register count recorded; run it with --record, and commit that")
            elif registers > before:
                faults.append(f"sm_{arch}: {kernel}: {registers} registers, {before} recorded")
    return faults


def _print_table(table: dict[str, dict[str, Usage]], arches: list[str]) -> None:
    width = max(map(len, table), default=0)
    print(
        "registers a thread, and bytes of shared memory; flags: aligned rows (resident: zero-centred), updates or modes"
    )
    print(f"{'':{width}}  {'  '.join(f'{arch:>4}' for arch in arches)}    smem")
    for kernel in sorted(table):
        row = table[kernel]
        cells = "  ".join(f"{row[arch].registers:4}" if arch in row else "   -" for arch in arches)
        print(f"{kernel:{width}}  {cells}  {max(usage.shared for usage in row.values()):6}")


if __name__ == "__main__":
    sys.exit(main())
