"""The toolkit behind a wrapped nvcc, the architectures asked for, and the words for what cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def find_cuda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The module, on a machine without any toolkit but what a test makes."""
    monkeypatch.syspath_prepend(str(ROOT / "build_backend"))
    import find_cuda as module

    for variable in ("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    everywhere = module._candidates
    monkeypatch.setattr(
        module, "_candidates", lambda torch: (c for c in everywhere(torch) if c[1] != "the usual place")
    )
    return module


def toolkit(home: Path, *, version: str = "13.0", missing: str = "", arches: str = "75 80 86 89 90 100 120") -> Path:
    """A toolkit as far as the search looks: an nvcc that answers questions, a header, a static runtime."""
    listed = "; ".join(f"echo compute_{arch}" for arch in arches.split())
    script = f"""#!/bin/sh
case "$1" in
  --version) echo "Cuda compilation tools, release {version}, V{version}.88" ;;
  --list-gpu-arch) {listed} ;;
  --dryrun) echo "#$ _HERE_=x" >&2; echo "#$ TOP={home}/bin/.." >&2 ;;
esac
"""
    for name, text in (("bin/nvcc", script), ("include/cuda_runtime.h", ""), ("lib64/libcudart_static.a", "")):
        if name != missing:
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            (home / name).write_text(text)
            (home / name).chmod(0o755)
    return home


def test_behind_a_wrapper_on_path(find_cuda, tmp_path, monkeypatch) -> None:
    home = toolkit(tmp_path / "real")
    wrapper = tmp_path / "bin" / "nvcc"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec {home}/bin/nvcc "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setattr(find_cuda.shutil, "which", lambda name: str(wrapper))
    found = find_cuda.find_toolkit(tmp_path / "torch")
    assert (found.home, found.version, found.found_by) == (home, "13.0", "nvcc on PATH")
    assert found.nvcc == home / "bin" / "nvcc"


@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH"])
def test_by_variable(find_cuda, tmp_path, monkeypatch, variable) -> None:
    monkeypatch.setenv(variable, str(toolkit(tmp_path / "here")))
    found = find_cuda.find_toolkit(tmp_path / "torch")
    assert (found.home, found.found_by) == (tmp_path / "here", variable)


def test_beside_torch(find_cuda, tmp_path) -> None:
    home = toolkit(tmp_path / "nvidia" / "cu13")
    assert find_cuda.find_toolkit(tmp_path / "torch").home == home


def test_incomplete_ones_are_passed_over_and_named(find_cuda, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path / "a", missing="include/cuda_runtime.h")))
    monkeypatch.setenv("CUDA_PATH", str(toolkit(tmp_path / "b", missing="lib64/libcudart_static.a")))
    reason = find_cuda.find_toolkit(tmp_path / "torch")
    assert "no nvcc" in reason
    assert f"{tmp_path}/a (CUDA_HOME) has no cuda_runtime.h" in reason
    assert f"{tmp_path}/b (CUDA_PATH) has no libcudart_static.a" in reason
    home = toolkit(tmp_path / "nvidia" / "cu13")
    assert find_cuda.find_toolkit(tmp_path / "torch").home == home


def test_default_architectures_are_those_nvcc_knows(find_cuda, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path / "new")))
    arches = find_cuda.arches_for(find_cuda.find_toolkit(tmp_path / "torch"))
    assert [str(arch) for arch in arches] == ["80", "86", "89", "90", "100", "120+PTX"]
    assert [arch.cmake for arch in arches] == ["80-real", "86-real", "89-real", "90-real", "100-real", "120"]
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path / "old", version="12.2", arches="50 70 80 86 89 90")))
    arches = find_cuda.arches_for(find_cuda.find_toolkit(tmp_path / "torch"))
    assert [str(arch) for arch in arches] == ["80", "86", "89", "90+PTX"]


@pytest.mark.parametrize(
    ("wish", "arches"),
    [
        ("9.0", ["90"]),
        ("8.0;9.0+PTX", ["80", "90+PTX"]),
        ("8.0 8.6, 8.9", ["80", "86", "89"]),
        ("9.0a", ["90a"]),
        ("9.0;9.0+PTX", ["90+PTX"]),
        ("9.0+PTX;9.0", ["90+PTX"]),
        ("12.0;", ["120"]),
    ],
)
def test_architectures_asked_for(find_cuda, tmp_path, monkeypatch, wish, arches) -> None:
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path / "here")))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wish)
    assert [str(arch) for arch in find_cuda.arches_for(find_cuda.find_toolkit(tmp_path / "torch"))] == arches


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ("Hopper", 'expected entries like "8.0", "9.0a" or "9.0\\+PTX", got \'Hopper\''),
        ("90", "got '90'"),
        ("6.0", "'6.0' is not among what nvcc 13.0 compiles for: 75, 80"),
    ],
)
def test_senseless_architectures_are_refused(find_cuda, tmp_path, monkeypatch, wish, message) -> None:
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path / "here")))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wish)
    with pytest.raises(find_cuda.CudaError, match="TORCH_CUDA_ARCH_LIST: .*" + message):
        find_cuda.arches_for(find_cuda.find_toolkit(tmp_path / "torch"))


@pytest.fixture
def configure(find_cuda, monkeypatch: pytest.MonkeyPatch):
    import configure as module

    return module


def test_wishes_about_cuda(configure, find_cuda, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("VOID_EXT_CUDA", "yes")
    with pytest.raises(find_cuda.CudaError, match="VOID_EXT_CUDA: expected auto, 1 or 0, got 'yes'"):
        configure.decide()
    monkeypatch.setenv("VOID_EXT_CUDA", "1")
    with pytest.raises(find_cuda.CudaError, match="VOID_EXT_CUDA=1, but no nvcc found"):
        configure.decide()
    monkeypatch.setenv("VOID_EXT_CUDA", "auto")
    without = configure.decide()
    assert without.cmake()["VOID_EXT_CUDA"] == "OFF"
    assert "void-ext: CUDA no: no nvcc found" in without.report()
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path / "here")))
    with_cuda = configure.decide()
    assert with_cuda.cmake()["CMAKE_CUDA_ARCHITECTURES"] == "80-real;86-real;89-real;90-real;100-real;120"
    assert with_cuda.cmake()["CMAKE_CUDA_COMPILER"] == str(tmp_path / "here" / "bin" / "nvcc")
    assert "void-ext: CUDA yes: nvcc 13.0 found by CUDA_HOME" in with_cuda.report()
    monkeypatch.setenv("VOID_EXT_CUDA", "0")
    assert configure.decide().cuda_reason == "VOID_EXT_CUDA=0"
