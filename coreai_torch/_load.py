"""Loads the compiled module `_C`, which registers the ops with PyTorch, or says why it cannot."""

from __future__ import annotations

import pathlib

import torch

REBUILD = "pip install --force-reinstall --no-deps --no-build-isolation ."


def built_with_torch() -> str | None:
    """The version of torch that the module was built against, if it was built."""
    record = pathlib.Path(__file__).with_name("_build_torch_version")
    return record.read_text() if record.exists() else None


def _cannot_load(reason: str) -> ImportError:
    return ImportError(
        f"coreai_torch cannot load its kernels: {reason}. Build it for this environment, in a "
        f"checkout of its repository: {REBUILD}"
    )


_built = built_with_torch()
_another = f"it was built against torch {_built}, but torch {torch.__version__} is installed"

# PyTorch's C++ interface changes with its minor versions. The module may load then, and crash.
if _built is not None and _built.split(".")[:2] != torch.__version__.split(".")[:2]:
    raise _cannot_load(_another)
try:
    from . import _C as _C
except ImportError as error:
    if _built is None:
        raise _cannot_load(
            f"the compiled module is not in {pathlib.Path(__file__).parent}. If that is a checkout "
            "and the package is installed, run Python in another folder: here the checkout is found"
        ) from None  # the error itself speaks of a circular import
    raise _cannot_load(_another if _built != torch.__version__ else str(error)) from error
