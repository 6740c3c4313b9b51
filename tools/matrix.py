"""Builds against other versions of PyTorch, runs tests with each, and prints a table.

    python tools/matrix.py 2.10.0 2.15.0

On Linux, PyPI has PyTorch's CUDA build only, with several gigabytes of libraries that the CPU part
does not call. So PyTorch is installed without them, and libraries of the same names whose functions
return errors are put in their place: `torch.cuda.is_available()` is False then, and the rest works.
Each version gets an environment in build/matrix, with this interpreter; a wheel takes up to 1 GB.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = (
    "test_rms_norm_forward.py",
    "test_rms_norm_backward.py",
    "test_rms_norm_errors.py",
    "test_rms_norm_module.py",
    "test_rms_norm_opcheck.py",
    "test_properties.py",
    "test_func.py",
    "test_autocast.py",
    "test_export.py",
    "test_compile.py",
)
REQUIREMENTS = (
    *("filelock", "sympy", "networkx", "jinja2", "fsspec", "typing_extensions", "numpy"),
    *("setuptools>=77", "wheel", "cmake", "ninja", "pybind11"),
    *("pytest", "hypothesis"),
)


def run(*command: object, **options: object) -> str:
    """What a command prints; its failure is an error that shows all of it."""
    done = subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, check=False, **options
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def stand_ins(site: Path, folder: Path) -> None:
    """Libraries in place of those that PyTorch's are linked to and that are not here."""
    torch = [*site.glob("torch/lib/*.so*"), *site.glob("torch/_C*.so")]
    installed = run("/sbin/ldconfig", "-p")
    needed = {
        n for lib in torch for n in re.findall(r"NEEDED.*\[(.*)\]", run("readelf", "-d", lib))
    }
    missing = {n for n in needed if f"\t{n} " not in installed} - {lib.name for lib in torch}
    defined: set[str] = set()
    undefined: dict[str, str] = {}  # symbols and their versions
    versions: dict[str, set[str]] = {name: set() for name in missing}
    for lib in torch:
        for symbol in re.findall(r" [A-Z] (\w+)$", run("nm", "-D", "--defined-only", lib), re.M):
            defined.add(symbol)
        listed = run("nm", "-D", "--undefined-only", "--with-symbol-versions", lib)
        for symbol, version in re.findall(r" U (\w+)@*(\S*)$", listed, re.M):
            undefined[symbol] = version or undefined.get(symbol, "")
        for name, entries in re.findall(
            r"File: (\S+) .*\n((?:.* Name: .*\n)*)", run("readelf", "-V", "-W", lib)
        ):
            if name in missing:
                versions[name].update(re.findall(r"Name: (\S+) ", entries))
    of_cuda = re.compile(r"(__)?(cu|nccl|nv)\w+")
    plain = [s for s, v in undefined.items() if not v and s not in defined and of_cuda.match(s)]
    folder.mkdir(parents=True, exist_ok=True)
    source, script = folder / "stand_in.c", folder / "versions.map"
    for name, of_name in versions.items():
        groups = {v: [s for s in undefined if undefined[s] == v] for v in of_name}
        symbols = [s for group in groups.values() for s in group]
        flags = []
        if of_name:
            script.write_text(
                "".join(
                    f"{v} {{ global: {' '.join(f'{s};' for s in g)} }};\n"
                    for v, g in groups.items()
                )
            )
            flags = [f"-Wl,--version-script={script}"]
        else:  # a symbol without a version may be in any library
            symbols, plain = plain, []
        # 100 is cudaErrorNoDevice; what does not begin with cu registers, and returns a handle.
        source.write_text(
            "".join(f"long {s}(void) {{ return {100 * s.startswith('cu')}; }}\n" for s in symbols)
        )
        command = ["gcc", "-w", "-fno-builtin", "-shared", "-fPIC", f"-Wl,-soname,{name}"]
        run(*command, *flags, "-o", folder / name, source)


def environment(version: str, folder: Path) -> tuple[Path, dict[str, str]]:
    """The interpreter of an environment with that PyTorch, and the variables that it needs."""
    run(sys.executable, "-m", "venv", folder / "venv")
    python = folder / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", "--no-deps", f"torch=={version}")
    run(python, "-m", "pip", "install", "-q", *REQUIREMENTS)
    site = Path(run(python, "-c", "import sysconfig as s; print(s.get_path('purelib'))").strip())
    libraries = folder / "libraries"
    stand_ins(site, libraries)
    variables = {
        **os.environ,
        "LD_LIBRARY_PATH": str(libraries),
        "FORCE_CUDA": "0",
        "PATH": f"{python.parent}:{os.environ['PATH']}",
    }
    return python, variables


def build(python: Path, variables: dict[str, str], folder: Path) -> Path:
    """Installs the checkout, from a copy, into an environment. Returns the copy."""
    copy = folder / "checkout"
    ignored = shutil.ignore_patterns("build", ".git", ".venv*", "*.so", "*.egg-info", "runs")
    shutil.copytree(ROOT, copy, ignore=ignored, dirs_exist_ok=True)
    run(
        *(python, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps"),
        *("--force-reinstall", "."),
        cwd=copy,
        env=variables,
    )
    return copy


def row(version: str) -> str:
    """A line of the table."""
    folder = ROOT / "build" / "matrix" / version
    python_version = f"{sys.version_info.major}.{sys.version_info.minor}"
    try:
        python, variables = environment(version, folder)
        copy = build(python, variables, folder)
        run(python, "-c", "import coreai_torch", cwd=folder, env=variables)
    except RuntimeError as error:
        (folder / "log.txt").write_text(str(error))
        return f"| {version} | {python_version} | no: {str(error).strip().splitlines()[-1]} | |"
    done = subprocess.run(
        [python, "-P", "-m", "pytest", "-q", "-m", "not slow", *(f"tests/{t}" for t in TESTS)],
        cwd=copy,
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    (folder / "log.txt").write_text(done.stdout + done.stderr)
    return f"| {version} | {python_version} | yes | {done.stdout.strip().splitlines()[-1]} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("versions", nargs="+", help="of PyTorch, for example 2.10.0")
    rows = [row(version) for version in parser.parse_args().versions]
    print("| PyTorch | Python | builds and loads | tests |\n|---|---|---|---|", *rows, sep="\n")


if __name__ == "__main__":
    main()
