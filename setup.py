"""Drives CMake, where it is written how the sources compile; everything else is in pyproject.toml."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCE = Path(__file__).resolve().parent
sys.path.insert(0, str(SOURCE / "build_backend"))

from configure import Configuration, decide  # noqa: E402
from find_cuda import CudaError  # noqa: E402
from find_torch import TorchNotFoundError  # noqa: E402


class CMakeBuild(build_ext):
    """One CMake build for all extensions, kept in build/ so that the next one is quick."""

    def run(self) -> None:
        try:
            configuration = decide()
        except (CudaError, TorchNotFoundError) as error:
            raise SystemExit(f"\nerror: {error}\n") from None
        print(configuration.report(), file=sys.stderr, flush=True)
        outputs = self._cmake(configuration)
        in_place, self.inplace = self.inplace, False  # into the build directory first; setuptools copies from there
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(outputs / target.name, target)
        self.inplace = in_place
        if in_place:
            self.copy_extensions_to_source()

    def _cmake(self, configuration: Configuration) -> Path:
        cmake = self._tool("cmake")
        kind = "cuda" if configuration.toolkit else "cpu"
        folder = SOURCE / "build" / f"{sys.implementation.cache_tag}-torch{configuration.torch.version}-{kind}"
        cache = folder / "CMakeCache.txt"
        if cache.is_file() and f"CMAKE_HOME_DIRECTORY:INTERNAL={SOURCE}\n" not in cache.read_text():
            shutil.rmtree(folder)  # the tree was moved or copied, and CMake refuses a cache of another place
        variables = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": self._tool("ninja"),
            "Python_EXECUTABLE": sys.executable,
            "VOID_EXT_VERSION": self.distribution.get_version(),
            **configuration.cmake(),
        }
        defines = [f"-D{name}={value}" for name, value in variables.items()]
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        for command in (
            [cmake, "-S", str(SOURCE), "-B", str(folder), "-G", "Ninja", *defines],
            [cmake, "--build", str(folder), "--parallel", jobs],
        ):
            if subprocess.run(command, stdout=sys.stderr.fileno()).returncode != 0:
                raise SystemExit(f"\nerror: {' '.join(command[:4])} … failed; what it said is above\n")
        return folder / "lib"

    def _tool(self, name: str) -> str:
        path = shutil.which(name)
        if path is None:
            raise SystemExit(f"\nerror: {name} is needed to build void-ext and not on PATH: pip install {name}\n")
        return path


setup(
    ext_modules=[
        Extension("void_ext._ops", sources=[], py_limited_api=True),
        Extension("void_ext._host", sources=[]),
    ],
    cmdclass={"build_ext": CMakeBuild},
)
