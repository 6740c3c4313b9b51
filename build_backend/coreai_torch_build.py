"""Build backend: setuptools, and then wheels that share no file with Apple's `coreai-torch`.

README.md in this folder says why, and what is where.
"""

from __future__ import annotations

import gzip
import io
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)
from wheel.wheelfile import WheelFile

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

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "coreai_torch"
SHARED_PACKAGES = (PACKAGE, f"{PACKAGE}/composite_ops")  # Apple's wheel has them too

# Runs `_package_init.py` as the package's `__init__`; CMakeLists.txt builds it.
INITIALIZER = ROOT / "build/package_init/__init__.abi3.so"
PACKAGE_INIT = "_package_init.py"

# The `_package_init.py` of an editable install. Subpackages are found in the checkout from then on.
EDITABLE_INIT = '''\
"""Written by an editable install: runs the package in its checkout."""

__path__.insert(0, {folder!r})
__file__ = {init!r}
with open(__file__, "rb") as source:
    exec(compile(source.read(), __file__, "exec"))
del source
'''

Settings = dict[str, Any] | None


def build_wheel(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    """A wheel whose shared packages start from `__init__.abi3.so`."""
    for staged in ROOT.glob("build/lib*"):  # of an earlier wheel, maybe with files since removed
        shutil.rmtree(staged)
    name = build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)
    with rewritten(Path(wheel_directory, name)) as content:
        add_stubs(content)
        for package in SHARED_PACKAGES:
            folder = content / package
            (folder / "__init__.py").rename(folder / PACKAGE_INIT)
            shutil.copy(INITIALIZER, folder)
    return name


def build_sdist(sdist_directory: str, config_settings: Settings = None) -> str:
    """An sdist with the same bytes whenever and wherever it is made of the same sources.

    All files have the time SOURCE_DATE_EPOCH, in seconds, or 0; nobody's name; and the modes that
    git knows.
    """
    name = build_meta.build_sdist(sdist_directory, config_settings)
    path = Path(sdist_directory, name)
    time = int(os.environ.get("SOURCE_DATE_EPOCH", "0"))
    with tarfile.open(path) as archive:
        members = {m.name: m for m in archive.getmembers()}
        files = {n: archive.extractfile(m).read() for n, m in members.items() if m.isfile()}  # type: ignore[union-attr]
    with (
        open(path, "wb") as file,
        gzip.GzipFile("", "wb", mtime=time, fileobj=file) as compressed,
        tarfile.open(fileobj=compressed, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for member_name in sorted(files):
            member = tarfile.TarInfo(member_name)
            member.size, member.mtime = len(files[member_name]), time
            member.mode = 0o755 if members[member_name].mode & 0o100 else 0o644
            archive.addfile(member, io.BytesIO(files[member_name]))
    return name


def build_editable(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    """An editable wheel that is found before Apple's package in the same environment.

    What setuptools would install, an import hook or a `.pth` file, comes after it.
    """
    name = build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
    with rewritten(Path(wheel_directory, name)) as content:
        for hook in content.glob("__editable__*"):
            hook.unlink()
        folder = content / PACKAGE
        folder.mkdir()
        checkout = ROOT / PACKAGE
        text = EDITABLE_INIT.format(folder=str(checkout), init=str(checkout / "__init__.py"))
        (folder / PACKAGE_INIT).write_text(text, encoding="utf-8")
        shutil.copy(INITIALIZER, folder)
    return name


def add_stubs(content: Path) -> None:
    """Moves what type checkers read into a stub package (PEP 561), which takes precedence.

    Its files are the sources themselves; being "partial", it leaves Apple's modules to Apple's
    package. `py.typed` is a file that Apple's wheel has.
    """
    package, stubs = content / PACKAGE, content / f"{PACKAGE}-stubs"
    for file in [*package.rglob("*.py"), *package.rglob("*.pyi")]:
        stub = (stubs / file.relative_to(package)).with_suffix(".pyi")
        stub.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, stub)
    (package / "py.typed").unlink()
    (stubs / "py.typed").write_text("partial\n", encoding="utf-8")


@contextmanager
def rewritten(wheel: Path) -> Iterator[Path]:
    """Unpacks a wheel, and packs it again with whatever was done to its content."""
    with tempfile.TemporaryDirectory() as folder:
        with WheelFile(wheel) as archive:
            archive.extractall(folder)
        yield Path(folder)
        with WheelFile(wheel, "w") as archive:
            archive.write_files(folder)
