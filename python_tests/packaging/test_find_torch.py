"""The build finds the installed torch from inside pip's and uv's isolation, or says what to do."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SITE = Path("lib") / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"


@pytest.fixture
def find_torch(monkeypatch: pytest.MonkeyPatch):
    """The module, in a process that sees no torch and whose environment variables name none."""
    monkeypatch.syspath_prepend(str(ROOT / "build_backend"))
    import find_torch as module

    for variable in ("VOID_EXT_TORCH_DIR", "VIRTUAL_ENV", "UV_PROJECT_ENVIRONMENT", "CONDA_PREFIX"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", "/usr/bin")
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(module.sysconfig, "get_path", lambda scheme, vars=None: f"/nowhere/{scheme}")
    return module


def fake_torch(site: Path, version: str = "2.13.0+cpu", cuda: str = "None", missing: str = "") -> Path:
    torch = site / "torch"
    for name in ("include/torch/csrc/stable/library.h", "lib/libtorch.so", "lib/libtorch_cpu.so"):
        if name != missing:
            (torch / name).parent.mkdir(parents=True, exist_ok=True)
            (torch / name).touch()
    lines = ["from typing import Optional", f"__version__ = '{version}'", f"cuda: Optional[str] = {cuda}", ""]
    (torch / "version.py").write_text("\n".join(lines))
    return torch


@pytest.mark.parametrize("variable", ["VIRTUAL_ENV", "UV_PROJECT_ENVIRONMENT", "CONDA_PREFIX"])
def test_in_the_environment_a_variable_names(find_torch, tmp_path, monkeypatch, variable) -> None:
    directory = fake_torch(tmp_path / "env" / SITE)
    monkeypatch.setenv(variable, str(tmp_path / "env"))
    torch = find_torch.find_torch(tmp_path)
    assert (torch.directory, torch.version, torch.cuda, torch.found_by) == (directory, "2.13.0+cpu", None, variable)


def test_in_the_interpreter_whose_packages_isolation_hides(find_torch, tmp_path, monkeypatch) -> None:
    directory = fake_torch(tmp_path / SITE, cuda="'13.0'")
    monkeypatch.setattr(find_torch.sysconfig, "get_path", lambda scheme, vars=None: str(tmp_path / SITE))
    torch = find_torch.find_torch(tmp_path)
    assert (torch.directory, torch.cuda) == (directory, "13.0")


def test_in_the_projects_venv_and_one_on_path(find_torch, tmp_path, monkeypatch) -> None:
    environment = tmp_path / "elsewhere"
    on_path = fake_torch(environment / SITE)
    (environment / "pyvenv.cfg").touch()
    (environment / "bin").mkdir()
    monkeypatch.setenv("PATH", f"/usr/bin:{environment / 'bin'}")
    assert find_torch.find_torch(tmp_path).directory == on_path
    in_project = fake_torch(tmp_path / ".venv" / SITE)
    assert find_torch.find_torch(tmp_path).directory == in_project


def test_an_explicit_directory_wins_and_has_no_fallback(find_torch, tmp_path, monkeypatch) -> None:
    fake_torch(tmp_path / ".venv" / SITE)
    chosen = fake_torch(tmp_path / "chosen")
    monkeypatch.setenv("VOID_EXT_TORCH_DIR", str(chosen))
    assert find_torch.find_torch(tmp_path).directory == chosen
    monkeypatch.setenv("VOID_EXT_TORCH_DIR", str(tmp_path / "typo"))
    with pytest.raises(find_torch.TorchNotFoundError, match=r"typo \(VOID_EXT_TORCH_DIR\): no torch"):
        find_torch.find_torch(tmp_path)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"version": "2.10.1"}, r"torch 2\.10\.1 is older than 2\.11"),
        ({"version": "1.13.0"}, r"torch 1\.13\.0 is older than 2\.11"),
        ({"missing": "lib/libtorch_cpu.so"}, r"torch 2\.13\.0\+cpu without lib/libtorch_cpu\.so"),
        ({"missing": "include/torch/csrc/stable/library.h"}, r"without include/torch/csrc/stable/library\.h"),
    ],
)
def test_what_will_not_do_is_passed_over_and_named(find_torch, tmp_path, monkeypatch, changes, reason) -> None:
    fake_torch(tmp_path / "bad" / SITE, **changes)
    monkeypatch.setenv("VIRTUAL_ENV", str(tmp_path / "bad"))
    with pytest.raises(find_torch.TorchNotFoundError, match=reason):
        find_torch.find_torch(tmp_path)
    good = fake_torch(tmp_path / ".venv" / SITE, version="2.11.0")
    assert find_torch.find_torch(tmp_path).directory == good


def test_nothing_found_says_what_to_do(find_torch, tmp_path) -> None:
    with pytest.raises(find_torch.TorchNotFoundError) as caught:
        find_torch.find_torch(tmp_path)
    for part in ("torch (>= 2.11)", "pip install .", "--no-build-isolation", "uv pip install", "VOID_EXT_TORCH_DIR="):
        assert part in str(caught.value)


def test_the_real_one_is_found_without_importing_it(monkeypatch) -> None:
    import subprocess

    import torch

    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'build_backend')!r})\n"
        "from pathlib import Path; from find_torch import find_torch\n"
        f"print(find_torch(Path({str(ROOT)!r})).version, 'torch' in sys.modules)"
    )
    monkeypatch.delenv("VOID_EXT_TORCH_DIR", raising=False)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == [torch.__version__, "False"]
