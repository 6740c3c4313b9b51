"""Thin driver: environment -> CMake options -> Ninja. Sources and flags are in CMakeLists.txt.

CUDA kernels are built where torch is a CUDA build and nvcc is found.

Environment variables: MAX_JOBS (parallel compilations), DEBUG=1 (debug build), FORCE_CUDA=1 (CUDA
kernels whatever torch is) or 0 (none), CUDA_HOME, TORCH_CUDA_ARCH_LIST (for example "8.0;9.0+PTX"),
CMAKE_ARGS (passed on to CMake).
"""

from __future__ import annotations

import importlib.util
import os
import re
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


def find_nvcc() -> str | None:
    """CUDACXX, or nvcc of CUDA_HOME, or the one on PATH."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [os.environ.get("CUDACXX"), home and f"{home}/bin/nvcc", "nvcc"]
    candidates.append("/usr/local/cuda/bin/nvcc")
    return next((path for c in candidates if c and (path := shutil.which(c))), None)


def check_cuda_version(nvcc: str, torch_cuda: str | None) -> None:
    """nvcc and torch must be of one major version of CUDA."""
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"release (\d+)\.(\d+)", text)
    if match is None or torch_cuda is None:
        return
    major, minor = torch_cuda.split(".")[:2]
    if match[1] != major:
        sys.exit(
            f"\ncoreai_torch cannot be built: torch is built for CUDA {torch_cuda}, but {nvcc} is "
            f"of CUDA {match[1]}.{match[2]}. Install the CUDA {major} toolkit and point CUDA_HOME "
            "at it, or build without CUDA kernels: FORCE_CUDA=0\n"
        )
    if match[2] != minor:
        print(f"coreai_torch: warning: nvcc is of CUDA {match[1]}.{match[2]}, torch {torch_cuda}")


def cuda_architectures(nvcc: str) -> str:
    """TORCH_CUDA_ARCH_LIST, or all that this nvcc knows of the cards we tune for, for CMake."""
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if wanted:
        names = []
        for item in re.split(r"[;\s]+", wanted.strip()):
            match = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", item)
            if match is None:
                sys.exit(
                    "\ncoreai_torch: expected TORCH_CUDA_ARCH_LIST like '8.0;9.0+PTX', got "
                    f"{wanted!r}\n"
                )
            number = match[1] + match[2] + match[3]
            if int(match[1]) < 8:
                sys.exit(
                    "\ncoreai_torch: expected TORCH_CUDA_ARCH_LIST of 8.0 or above, got "
                    f"{item}: the kernels need cards of the Ampere generation or later\n"
                )
            names.append(number if match[4] else f"{number}-real")
        return ";".join(names)
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True)
    known = [a for a in ("80", "86", "89", "90", "100", "120") if f"sm_{a}" in listed.stdout]
    return ";".join([f"{a}-real" for a in known[:-1]] + known[-1:])  # PTX of the last


def cuda_options(torch_cuda: str | None) -> dict[str, str]:
    """CMake options for the CUDA part, or none with the reason."""
    force = os.environ.get("FORCE_CUDA")
    if force == "0" or (force != "1" and torch_cuda is None):
        print("coreai_torch: CPU kernels only" + (", as FORCE_CUDA=0 asks" if force else ""))
        return {"COREAI_TORCH_CUDA": "OFF"}
    nvcc = find_nvcc()
    if nvcc is None:
        cure = (
            f"Install the CUDA toolkit{f' {torch_cuda}' if torch_cuda else ''} and put its nvcc on "
            "PATH, or set CUDA_HOME"
        )
        if force == "1":
            sys.exit(f"\ncoreai_torch cannot be built: FORCE_CUDA=1, but nvcc not found. {cure}\n")
        print(f"coreai_torch: WARNING: CPU kernels only, because nvcc was not found. {cure}.")
        return {"COREAI_TORCH_CUDA": "OFF"}
    check_cuda_version(nvcc, torch_cuda)
    architectures = cuda_architectures(nvcc)
    print(f"coreai_torch: CPU and CUDA kernels, {nvcc}, architectures {architectures}")
    return {
        "COREAI_TORCH_CUDA": "ON",
        "CMAKE_CUDA_COMPILER": nvcc,
        "CMAKE_CUDA_ARCHITECTURES": architectures,
    }


class CMakeBuild(build_ext):
    """Builds the Python module with CMake and Ninja in a build folder that stays."""

    def build_extension(self, ext: Extension) -> None:
        require_build_tools()
        import pybind11
        import torch
        from torch.utils import cpp_extension

        cuda = cuda_options(torch.version.cuda)
        folder = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        if cuda["COREAI_TORCH_CUDA"] == "ON":
            folder = folder.with_name(f"{folder.name}-cuda")
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        options = cuda | {
            "CMAKE_BUILD_TYPE": "Debug" if os.environ.get("DEBUG") == "1" else "Release",
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": str(target),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "COREAI_TORCH_PYTHON": "ON",
            "COREAI_TORCH_TESTS": "OFF",
            "TORCH_INCLUDE_DIRS": ";".join(cpp_extension.include_paths()),
            "TORCH_LIBRARY_DIRS": ";".join(cpp_extension.library_paths()),
            "TORCH_CXX11_ABI": str(int(torch.compiled_with_cxx11_abi())),
        }
        arguments = [f"-D{name}={value}" for name, value in options.items()]
        arguments += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        kind = options["CMAKE_BUILD_TYPE"]
        print(f"coreai_torch: torch {torch.__version__}, {kind} build")
        print("coreai_torch: cmake", *arguments, flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.check_call(
            ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(folder), *arguments]
        )
        targets = ["_C", "package_init"]  # the latter for build_backend/
        subprocess.check_call(["ninja", "-C", str(folder), "-j", parallel_jobs(), *targets])
        shutil.copy(folder / "compile_commands.json", ROOT / "build")  # where editors look for it
        target.joinpath(TORCH_RECORD).write_text(torch.__version__)

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        built = Path(self.get_ext_fullpath("coreai_torch._C")).resolve().parent / TORCH_RECORD
        shutil.copy(Path(self.build_lib, "coreai_torch", TORCH_RECORD), built)


setup(
    ext_modules=[Extension("coreai_torch._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
