"""Thin driver: environment -> CMake options -> Ninja. Sources and flags are in CMakeLists.txt.

Environment variables: MAX_JOBS (parallel compilations), DEBUG=1 (debug build), FORCE_CUDA=1
(CUDA kernels; this version has none and says so), CMAKE_ARGS (passed on to CMake).
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
TORCH_RECORD = "_build_torch_version"  # read by coreai_torch/_load.py where loading fails


def require_build_tools() -> None:
    """Stop with the exact cure where something that the build needs is missing."""
    modules = [m for m in ("torch", "pybind11") if importlib.util.find_spec(m) is None]
    programs = [p for p in ("cmake", "ninja") if shutil.which(p) is None]
    cures = []
    if "torch" in modules:
        cures.append(
            "torch is not importable here. Install the torch that you will run with, then build "
            "against it:\n    pip install torch\n    pip install --no-build-isolation ."
        )
    others = [m for m in modules if m != "torch"] + programs
    if others:
        cures.append(f"{', '.join(others)} not found:\n    pip install {' '.join(others)}")
    if not any(shutil.which(c) for c in (os.environ.get("CXX", "c++"), "g++", "clang++")):
        cures.append("no C++ compiler found:\n    apt-get install g++    (or your system's way)")
    if cures:
        sys.exit("\ncoreai_torch cannot be built:\n\n" + "\n\n".join(cures) + "\n")


def parallel_jobs() -> str:
    """MAX_JOBS, or one per processor."""
    return os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)


class CMakeBuild(build_ext):
    """Builds the Python module with CMake and Ninja in a build folder that stays."""

    def build_extension(self, ext: Extension) -> None:
        require_build_tools()
        import pybind11
        import torch
        from torch.utils import cpp_extension

        folder = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        options = {
            "CMAKE_BUILD_TYPE": "Debug" if os.environ.get("DEBUG") == "1" else "Release",
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": str(target),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "COREAI_TORCH_PYTHON": "ON",
            "COREAI_TORCH_TESTS": "OFF",
            "COREAI_TORCH_CUDA": "ON" if os.environ.get("FORCE_CUDA") == "1" else "OFF",
            "TORCH_INCLUDE_DIRS": ";".join(cpp_extension.include_paths()),
            "TORCH_LIBRARY_DIRS": ";".join(cpp_extension.library_paths()),
            "TORCH_CXX11_ABI": str(int(torch.compiled_with_cxx11_abi())),
        }
        arguments = [f"-D{name}={value}" for name, value in options.items()]
        arguments += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        kind = options["CMAKE_BUILD_TYPE"]
        print(f"coreai_torch: torch {torch.__version__}, {kind} build, CPU only")
        print("coreai_torch: cmake", *arguments, flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.check_call(
            ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(folder), *arguments]
        )
        targets = ["_C", "package_init"]  # the latter for build_backend/
        subprocess.check_call(["ninja", "-C", str(folder), "-j", parallel_jobs(), *targets])
        target.joinpath(TORCH_RECORD).write_text(torch.__version__)

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        built = Path(self.get_ext_fullpath("coreai_torch._C")).resolve().parent / TORCH_RECORD
        shutil.copy(Path(self.build_lib, "coreai_torch", TORCH_RECORD), built)


setup(
    ext_modules=[Extension("coreai_torch._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
