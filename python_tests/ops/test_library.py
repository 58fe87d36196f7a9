"""Loading: light, once, and clear about what is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import void_ext
from void_ext import _library, ops

PACKAGE = Path(void_ext.__file__).parent


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, timeout=300
    )


def copy_without(tmp_path: Path, pattern: str) -> str:
    """Copies the package without some of its files; returns code that makes Python import the copy."""
    shutil.copytree(PACKAGE, tmp_path / "void_ext", ignore=shutil.ignore_patterns(pattern, "__pycache__"))
    # An editable installation's finder would come first.
    no_finder = "sys.meta_path = [f for f in sys.meta_path if 'ditable' not in str(f)]"
    return f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {no_finder}; "


def test_build_info_names_everything() -> None:
    info = _library.build_info()
    assert info["version"] == void_ext.__version__
    assert info["torch_target"] == "2.11"
    assert info["torch_built"].split(".")[0] == "2"
    assert info["compiler"].split()[0] in ("GNU", "Clang", "AppleClang")
    assert info["cuda_reason"]
    assert bool(info["cuda_version"]) == bool(info["cuda_arches"]) == info["cuda"]
    assert info["cpu_isas"][0] == "baseline"
    assert info["cpu_isa"] in info["cpu_isas"]


def test_build_info_is_a_copy() -> None:
    _library.build_info()["cuda"] = "changed"
    assert isinstance(_library.build_info()["cuda"], bool)


def test_every_op_is_registered_with_its_kernels() -> None:
    _library.load()
    _library.load()
    for op in ops.__all__:
        for key in ("CPU", "CUDA", "Meta"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"void_ext::{op}", key), (op, key)


@pytest.mark.parametrize(
    "first",
    ["import void_ext.ops", "from void_ext import _library; _library.load()", "import void_ext; void_ext.void_mask"],
)
def test_loads_from_any_side(first: str) -> None:
    code = (
        f"{first}\nimport torch; print(torch._C._dispatch_has_kernel_for_dispatch_key('void_ext::void_mask', 'Meta'))"
    )
    assert python(code).stdout.strip() == "True"


def test_threads_that_load_at_once_all_find_the_ops() -> None:
    code = (
        "import threading, torch; from void_ext import _library\n"
        "found = []\n"
        "def use():\n"
        "    _library.load()\n"
        "    found.append(torch.ops.void_ext.void_mask.default(torch.zeros(1, 2, device='meta'), 0.8))\n"
        "threads = [threading.Thread(target=use) for _ in range(8)]\n"
        "[t.start() for t in threads]; [t.join() for t in threads]; print(len(found))"
    )
    assert python(code).stdout.strip() == "8"


def test_a_cuda_call_that_cannot_be_says_why() -> None:
    """The CUDA kernels called on CPU tensors: no CUDA tensor can be made here. With a device, gpu tests call them."""
    if torch.version.cuda is not None:
        pytest.skip("this torch has CUDA")
    _library.load()
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    expected = "but the torch that is loaded has no CUDA"
    if not _library.build_info()["cuda"]:
        expected = "but void_ext was built without CUDA"
    rows, norms = torch.ones(2, 8), torch.zeros(2, 3)
    on, index, count = torch.ones(2, dtype=torch.bool), torch.arange(2), torch.tensor([2])
    for op, arguments in (
        ("add_l2norm", (rows, rows, norms, 1)),
        ("add_rms_norm", (rows, rows, torch.ones(8), 1e-5, norms, 1)),
        ("row_l2norm", (rows, norms, 1)),
        ("streams_l2norm", ([rows, rows], norms, 1)),
        ("void_mask", (norms, 0.8)),
        ("exit_select", (rows, rows, norms, 1, 0.8)),
        ("keep_rows", (rows, rows, on)),
        ("compact", (on,)),
        ("gather_rows", (rows, index, count, 2)),
        ("scatter_rows", (rows, rows.clone(), index, count)),
    ):
        with pytest.raises(ValueError, match=rf"void_ext::{op}: \w+(\[0\])?: is on cpu, {expected}"):
            getattr(torch.ops.void_ext, op).default.redispatch(cuda, *arguments)
    assert norms.count_nonzero() == 0


def test_importing_the_package_alone_imports_nothing_heavy() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import void_ext; import void_ext.ops;"
        "new = set(sys.modules) - before;"
        "print([m for m in new if m.split('.')[0] in ('transformers', 'matplotlib', 'rich', 'safetensors', 'gguf')])"
    )
    assert python(code).stdout.strip() == "[]"
    assert "torch" not in python("import sys, void_ext; print(*sys.modules)").stdout.split()


def test_public_names_resolve_and_unknown_ones_are_named() -> None:
    for name in void_ext.__all__:
        assert getattr(void_ext, name) is not None
    assert set(void_ext.__all__) <= set(dir(void_ext))
    with pytest.raises(AttributeError, match="has no attribute 'unknown_name'"):
        void_ext.unknown_name  # noqa: B018


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("_ops.abi3.so", "void_ext's op library is not built: no _ops.abi3.so in "),
        ("_host.*", "void_ext's native part is not built for this Python: No module named 'void_ext._host'"),
    ],
)
def test_what_is_not_built_is_named_with_what_to_do(tmp_path: Path, missing: str, message: str) -> None:
    code = copy_without(tmp_path, missing)
    assert python(code + "import void_ext; print(void_ext.__version__)").stdout.strip() == void_ext.__version__
    result = python(code + "import void_ext.ops")
    assert result.returncode != 0
    assert "LibraryError: " + message in result.stderr
    assert "pip install --no-build-isolation --no-deps -e ." in result.stderr


def test_a_library_that_does_not_load_says_why(tmp_path: Path) -> None:
    code = copy_without(tmp_path, "_ops.abi3.so")
    (tmp_path / "void_ext" / "_ops.abi3.so").write_bytes(b"not a library")
    result = python(code + "import void_ext.ops")
    assert f"LibraryError: void_ext's op library does not load into torch {torch.__version__}" in result.stderr
    assert "torch 2.11 or later" in result.stderr


def test_the_op_library_carries_no_path_of_the_machine_that_built_it() -> None:
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("no readelf")
    for library in (PACKAGE / "_ops.abi3.so", *PACKAGE.glob("_host.*.so")):
        dynamic = subprocess.run([readelf, "-d", library], capture_output=True, text=True, check=True).stdout
        assert "RPATH" not in dynamic
        assert "RUNPATH" not in dynamic
        if library.name.startswith("_ops"):
            needed = [line.split("[")[1].rstrip("]") for line in dynamic.splitlines() if "NEEDED" in line]
            assert "libtorch.so" in needed, "dropped by --as-needed: the weak symbol of the current stream stays null"
            assert not [name for name in needed if "python" in name or "cudart" in name]


def test_a_meta_tensor_among_others_is_refused() -> None:
    """It would send the call to the fake kernel, which computes nothing, and the result would be uninitialised."""
    rows, table = torch.randn(4, 8), torch.zeros(4, 3)
    meta = torch.zeros(4, 3, device="meta")
    with pytest.raises(ValueError, match="norms: expected cpu, got meta"):
        ops.add_l2norm(rows, rows, meta, 0)
    with pytest.raises(ValueError, match="norms: expected cpu, got meta"):
        ops.exit_select(rows.clone(), rows, meta, 1, 0.8)
    with pytest.raises(ValueError, match="executed: expected cpu, got meta"):
        ops.void_mask(table, 0.8, torch.ones(4, 2, dtype=torch.bool, device="meta"))
    with pytest.raises(ValueError, match="on: expected cpu, got meta"):
        ops.keep_rows(rows, rows, torch.ones(4, dtype=torch.bool, device="meta"))
    with pytest.raises(ValueError, match="index: expected cpu, got meta"):
        ops.gather_rows(rows, torch.arange(4, device="meta"), torch.tensor([4]), 4)
    with pytest.raises(ValueError, match="count: expected cpu, got meta"):
        ops.scatter_rows(rows.clone(), rows, torch.arange(4), torch.tensor([4], device="meta"))
    with pytest.raises(ValueError, match=r"norms: expected torch\.float32, got torch\.float64"):
        ops.add_l2norm(rows.to("meta"), rows.to("meta"), meta.double(), 0)
