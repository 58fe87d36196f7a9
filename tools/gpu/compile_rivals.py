"""Compiles FlashInfer's and quack's add + RMSNorm ahead for sm_90 (H100, H200), into build/rivals, to be carried to a
machine without a network and put on PYTHONPATH there, as bench.gpu does by itself. In that folder:

    flashinfer   what `import flashinfer.norm` reads, and its CUDA C++ norms; FLASHINFER_USE_CUDA_NORM=1,
                 FLASHINFER_DISABLE_JIT=1 and a writable FLASHINFER_WORKSPACE_BASE must be set
    rivals_aot   FlashInfer's CuTe-DSL kernel (its default on Hopper) and quack's, see tools/gpu/rivals_aot
    tvm_ffi, …   what these import and the interpreter lacks

Cost: 160 MB from PyPI, 1 GB of temporary files, three minutes; the folder takes 22 MB.
Needs: a network, nvcc of CUDA 13, a C++ compiler, an interpreter (--python) like the GPU machine's: Python 3.12 with
torch 2.11 or later for CUDA 13, numpy and pip; nothing is installed into it. No GPU.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PLACE = ROOT / "build" / "rivals"
# Apart, because FlashInfer imports far more where it finds the CuTe-DSL.
PLAIN = """flashinfer-python==0.7.2.post1 apache-tvm-ffi==0.1.15.post2 ninja==1.13.2 nvidia-ml-py==13.615.71
    requests==2.34.2 urllib3==2.8.0 charset-normalizer==3.5.3 certifi==2026.10.19.post1 idna==3.20 tqdm==4.70.1
    packaging==26.4"""
DSL = """quack-kernels==0.6.5 nvidia-cutlass-dsl==4.8.1 nvidia-cutlass-dsl-libs-base==4.8.1 einops==0.8.2
    nvidia-cutlass-dsl-libs-core==4.8.1 nvidia-cutlass-dsl-libs-cu13==4.8.1 protobuf==7.36.2
    torch-c-dlpack-ext==0.1.5"""
WIDTHS = (64, 576, 1536, 2048, 3584, 4096, 8192, 16384)
DTYPES = {"bfloat16": "BFloat16", "float16": "Float16", "float32": "Float32"}  # torch's name, the CuTe-DSL's
H100 = SimpleNamespace(shared_memory_per_block_optin=232448)  # by which FlashInfer chooses clusters of blocks
# All that the kernels need, on errors, of a library of 43 MB.
SHIM = """extern "C" int snprintf(char*, unsigned long, const char*, ...);
extern "C" __attribute__((visibility("hidden"))) void CuteDSLRT_TVMFFISetRaisedCudaError(
    void (*raise)(const char*, const char**, int), int code) {
  char number[16];
  snprintf(number, sizeof number, "%d", code);
  const char* parts[] = {"CUDA Error: ", number};
  if (raise) raise("RuntimeError", parts, 2);
}"""
PROBE = """import json, sys, numpy, pip, torch
cudart = sorted({line.split()[-1] for line in open("/proc/self/maps") if "libcudart" in line})
right = sys.version_info[:2] == (3, 12) and tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)
if not (right and cudart and torch.version.cuda.startswith("13.")):
    sys.exit(f"it is Python {sys.version.split()[0]} with torch {torch.__version__}, CUDA {torch.version.cuda}")
print(json.dumps([torch.__path__[0], cudart[0]]))"""
CHECK = """import torch, flashinfer.norm, rivals_aot as r
assert flashinfer.norm.get_norm_module().fused_add_rmsnorm
for rival in ("quack", "flashinfer_cute"):
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        print("loaded", rival, dtype, *[width for width in r.widths(rival) if r.kernel(rival, dtype, width)])"""


def run(*command: str | Path, **options: Any) -> None:
    subprocess.run([str(part) for part in command], check=True, text=True, **options)


def look(python: str) -> tuple[Path, Path, Path, str]:
    """torch's folder and libcudart, the CUDA toolkit's folder, the C++ compiler; or ends, and says what is missing."""
    sys.path.insert(0, str(ROOT / "build_backend"))
    from find_cuda import find_toolkit

    missing, torch, cudart = [], "/nowhere", ""
    try:
        alone = os.environ | {"PYTHONPATH": ""}
        probed = subprocess.run([python, "-c", PROBE], check=True, capture_output=True, text=True, env=alone)
        torch, cudart = json.loads(probed.stdout)
    except (OSError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
        missing.append(f"--python with torch 2.11+ for CUDA 13, Python 3.12, numpy and pip; {python}: {said}")
    toolkit: Any = find_toolkit(Path(torch))
    if isinstance(toolkit, str) or not toolkit.version.startswith("13."):
        missing.append(f"nvcc of CUDA 13: {toolkit if isinstance(toolkit, str) else toolkit.nvcc}")
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        missing.append("a C++ compiler; CXX names one")
    if missing or compiler is None:
        raise SystemExit("\n".join(f"compile_rivals: missing: {line}" for line in missing))
    return Path(torch), Path(cudart), toolkit.home, compiler


def norms(work: Path) -> None:
    """FlashInfer's norms by its own build, and the packages its import reads, into work/site. Runs in --python."""
    plain = work / "plain"
    sys.path.append(str(plain))  # last: what the interpreter has need not be carried
    importlib.import_module("flashinfer.norm")
    files = [Path(getattr(module, "__file__", None) or "/") for module in list(sys.modules.values())]
    paths = [path.relative_to(plain) for path in files if plain in path.parents]
    unused = shutil.ignore_patterns("__pycache__", "3rdparty", "include", "share", "src")
    # Packages as they are, but of FlashInfer's 10,000 files the 300 that were read.
    for path in {path if path.parts[0] == "flashinfer" else Path(path.parts[0]) for path in paths}:
        target = work / "site" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if (plain / path).is_dir():
            shutil.copytree(plain / path, target, ignore=unused)
        else:
            shutil.copy2(plain / path, target)
    module = importlib.import_module("flashinfer.jit.norm").gen_norm_module()
    module.build(verbose=False)
    # Where FlashInfer looks before it thinks of compiling; it checks neither hash nor date there.
    target = work / "site" / "flashinfer" / "data" / "aot" / "norm" / "norm.so"
    target.parent.mkdir(parents=True)
    shutil.copy2(module.jit_library_path, target)


def cute(work: Path) -> None:
    """Object files of both rivals' CuTe-DSL kernels, as they choose to launch them on an H100. Runs in --python."""
    sys.path += [str(work / name) for name in ("plain", "dsl", "dsl/nvidia_cutlass_dsl/dsl_packages")]
    import torch

    cutlass, quack, pool = map(importlib.import_module, ("cutlass", "quack.rmsnorm", "quack.cache.async_compile"))
    pool._pin_dsl_arch("sm_90a")  # as quack's own processes compile, which see no GPU
    pool._install_gpu_blind_device_attrs()
    vars(torch.cuda).update(current_device=lambda: 0, get_device_properties=lambda *_: H100)
    flashinfer = importlib.import_module("flashinfer.norm.kernels.fused_add_rmsnorm")
    quack_kernel = quack._compile_rmsnorm_fwd.__wrapped__
    flashinfer_kernel = flashinfer._get_compiled_fused_add_rmsnorm_kernel.__wrapped__
    for dtype, width in itertools.product(DTYPES, WIDTHS):
        number = getattr(cutlass, DTYPES[dtype])
        # Of x, out, residual, weight, bias and residual out. No statistics are written, the weight is as it is; and
        # dependent launch is on, as FlashInfer has it on sm_90.
        types = (number, number, number, number, None, number)
        kernels = {
            "quack": quack_kernel(*types, width, False, False, False, False, 0.0),
            "flashinfer_cute": flashinfer_kernel(dtype, width, 0.0, True, 90, contiguous=True),
        }
        for rival, kernel in kernels.items():
            (work / "objects" / rival).mkdir(parents=True, exist_ok=True)
            path = work / "objects" / rival / f"{dtype}_{width}.o"
            kernel.export_to_c(object_file_path=str(path), function_name="func")


def link(work: Path, compiler: str) -> None:
    """The object files as libraries in work/site/rivals_aot, which need libtvm_ffi and libcudart alone."""
    package, shim = work / "site" / "rivals_aot", work / "shim.o"
    run(compiler, "-fPIC", "-x", "c++", "-c", "-", "-o", shim, input=SHIM)
    flags = ("-shared", "-s", "-Wl,-z,defs", "-Wl,--exclude-libs,ALL", "-Wl,--as-needed")
    runtime = work / "dsl" / "nvidia_cutlass_dsl" / "cu13" / "lib" / "libcuda_dialect_runtime_static.a"
    libraries = (runtime, f"-L{work / 'plain' / 'tvm_ffi' / 'lib'}", f"-L{work / 'stubs'}", "-ltvm_ffi", "-lcudart")
    for path in (work / "objects").glob("*/*.o"):
        (package / path.parent.name).mkdir(parents=True, exist_ok=True)
        run(compiler, *flags, path, shim, *libraries, "-o", package / path.parent.name / f"{path.stem}.so")
    shutil.copy2(ROOT / "tools" / "gpu" / "rivals_aot" / "__init__.py", package)


def make(python: str, work: Path) -> None:
    torch, cudart, toolkit, compiler = look(python)
    for name, packages in (("plain", PLAIN), ("dsl", DSL)):
        options = ("--quiet", "--no-deps", "--only-binary=:all:", "--target", work / name)
        run(python, "-m", "pip", "install", *options, *packages.split())
    stubs = work / "stubs"
    stubs.mkdir()
    (stubs / "libcudart.so").symlink_to(cudart)
    run(compiler, "-shared", "-x", "c", os.devnull, "-o", stubs / "libcuda.so")  # FlashInfer links a driver, needlessly
    environment = os.environ | {
        "PYTHONPATH": "",
        "PATH": os.pathsep.join((str(work / "plain" / "bin"), os.environ.get("PATH", os.defpath))),  # ninja
        "CXX": f"{compiler} -Wl,--as-needed",
        "CUDA_HOME": str(toolkit),
        "CUDA_VISIBLE_DEVICES": "",  # the same on a machine with a GPU
        # Headers that not every toolkit has; its own come first.
        "CPLUS_INCLUDE_PATH": str(torch.parent / "nvidia" / "cu13" / "include"),
        "LIBRARY_PATH": str(stubs),
        "FLASHINFER_WORKSPACE_BASE": str(work),
        "FLASHINFER_CUDA_ARCH_LIST": "9.0a",
        "FLASHINFER_USE_CUDA_NORM": "1",
        "QUACK_ARCH": "90",
        "CUTE_DSL_ARCH": "sm_90a",
    }
    run(python, __file__, "--step=norms", f"--work={work}", env=environment)
    run(python, __file__, "--step=cute", f"--work={work}", env=environment | {"FLASHINFER_USE_CUDA_NORM": "0"})
    link(work, compiler)
    carried = {"PYTHONPATH": str(work / "site"), "PYTHONDONTWRITEBYTECODE": "1", "FLASHINFER_DISABLE_JIT": "1"}
    run(python, "-c", CHECK, env=environment | carried, cwd=work)
    shutil.rmtree(PLACE, ignore_errors=True)
    shutil.copytree(work / "site", PLACE)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile FlashInfer's and quack's add + RMSNorm ahead, for sm_90.")
    parser.add_argument("--python", default=sys.executable, help="Python 3.12 with torch 2.11+, like the GPU machine's")
    parser.add_argument("--step", choices=["norms", "cute"], help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        {"norms": norms, "cute": cute}[options.step](options.work)
        return
    with tempfile.TemporaryDirectory(prefix="rivals-") as folder:
        make(options.python, Path(folder).resolve())
    print(f"compile_rivals: {PLACE}")


if __name__ == "__main__":
    main()
