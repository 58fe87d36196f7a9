"""What a user types: `pip install` of a source distribution, build isolated, where torch is and where it is not.

Needs a package index for setuptools and pybind11, as any isolated build does; skipped without one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SITE = Path(sysconfig.get_path("platlib"))

pytestmark = pytest.mark.slow


def environment(**changes: str) -> dict[str, str]:
    """This process's, less what would show the build an environment that it is not run for."""
    hidden = {"VIRTUAL_ENV", "UV_PROJECT_ENVIRONMENT", "CONDA_PREFIX", "PYTHONPATH", "VOID_EXT_TORCH_DIR"}
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    folders = kept["PATH"].split(os.pathsep)
    kept["PATH"] = os.pathsep.join(f for f in folders if not (Path(f).parent / "pyvenv.cfg").exists())
    return kept | changes


def fresh_environment(path: Path) -> Path:
    """An empty virtual environment; returns its interpreter."""
    venv.create(path, with_pip=True)
    return path / "bin" / "python"


def lend_torch(python: Path) -> None:
    """Makes this environment's torch an installed package of another one, by links; its dependencies by path."""
    code = "import sysconfig; print(sysconfig.get_path('platlib'))"
    site = Path(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip())
    for found in (Path(torch.__file__).parent, *SITE.glob("torch-*.dist-info")):
        (site / found.name).symlink_to(found)
    (site / "lent.pth").write_text(f"{SITE}\n")


def pip_install(python: Path, what: Path, *options: str, **changes: str) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [python, "-m", "pip", "install", "-v", "--no-deps", *options, what],
        capture_output=True,
        text=True,
        env=environment(**changes),
        cwd=what.parent,
        timeout=1200,
    )
    if "No matching distribution found for setuptools" in result.stdout + result.stderr:
        pytest.skip("no package index for setuptools")
    return result


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of what git knows or would, so that it holds no leftovers of this checkout's builds."""
    source = tmp_path_factory.mktemp("source")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    code = "import sys; sys.path.insert(0, 'build_backend'); import void_ext_backend as b; print(b.build_sdist('dist'))"
    built = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return source / "dist" / built.stdout.split()[-1]


def test_installs_where_torch_is_without_downloading_one(sdist: Path, tmp_path: Path) -> None:
    python = fresh_environment(tmp_path / "env")
    lend_torch(python)
    result = pip_install(python, sdist, VOID_EXT_CUDA="0")
    output = result.stdout + result.stderr
    assert result.returncode == 0, output
    assert f"void-ext: torch {torch.__version__}" in output
    assert "void-ext: CUDA no: VOID_EXT_CUDA=0" in output
    assert "Collecting torch" not in output
    assert "nvidia" not in output

    code = """
import json, torch, void_ext
from void_ext import _library, ops
norms = torch.zeros(2, 1)
ops.add_l2norm(torch.ones(2, 8), torch.ones(2, 8), norms, 0)
cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
try:
    torch.ops.void_ext.row_l2norm.default.redispatch(cuda, torch.ones(2, 8), norms, 0)
    refused = ""
except ValueError as error:
    refused = str(error)
print(json.dumps([void_ext.__file__, _library.build_info(), norms.tolist(), refused]))
"""
    used = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment())
    assert used.returncode == 0, used.stderr
    file, info, norms, refused = json.loads(used.stdout)
    assert Path(file).is_relative_to(tmp_path / "env")
    assert info["cuda"] is False
    assert info["cuda_reason"] == "VOID_EXT_CUDA=0"
    assert info["torch_built"] == torch.__version__
    assert norms == [[pytest.approx(32**0.5)]] * 2
    assert "stream: is on cpu, but void_ext was built without CUDA (VOID_EXT_CUDA=0)" in refused
    assert "VOID_EXT_CUDA=1 pip install" in refused


def test_without_torch_says_what_to_do_and_downloads_nothing(sdist: Path, tmp_path: Path) -> None:
    result = pip_install(fresh_environment(tmp_path / "env"), sdist)
    output = result.stdout + result.stderr
    assert result.returncode != 0
    assert "error: void-ext is built against the torch (>= 2.11) that is installed, and found none" in output
    assert "--no-build-isolation" in output
    assert "uv pip install" in output
    assert "Collecting torch" not in output
