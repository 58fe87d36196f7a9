"""PEP 517 backend: setuptools', plus the build tools the machine lacks. torch is never among them: it is the one that
is installed, found by find_torch.py, so that no second torch is downloaded into the build environment."""

from __future__ import annotations

import re
import shutil
import subprocess
from typing import Any

import setuptools
from setuptools import build_meta
from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

# Without build isolation nobody else compares, and what an older one says of pyproject.toml leads nowhere.
if int(setuptools.__version__.split(".")[0]) < 77:
    raise SystemExit(
        f"\nerror: void-ext needs setuptools>=77 to build, got {setuptools.__version__}: pip install -U setuptools\n"
    )


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    return build_meta.get_requires_for_build_wheel(config_settings) + _missing_tools()


def get_requires_for_build_editable(config_settings: dict[str, Any] | None = None) -> list[str]:
    return build_meta.get_requires_for_build_editable(config_settings) + _missing_tools()


def _missing_tools() -> list[str]:
    tools = []
    if _version("cmake") < (3, 24):
        tools.append("cmake>=3.24")
    if _version("ninja") == (0, 0):
        tools.append("ninja")
    return tools


def _version(tool: str) -> tuple[int, int]:
    """(0, 0) where the tool is missing or does not run, as a script does whose package is gone."""
    path = shutil.which(tool)
    if path is None:
        return 0, 0
    try:
        output = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return 0, 0
    match = re.search(r"(\d+)\.(\d+)", output)
    return (int(match[1]), int(match[2])) if match else (0, 0)
