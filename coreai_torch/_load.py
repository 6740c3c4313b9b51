"""Loads the compiled module `_C`, which registers the ops with PyTorch, or says why it cannot."""

from __future__ import annotations

import pathlib

import torch

REBUILD = "pip install --force-reinstall --no-deps --no-build-isolation ."


def built_with_torch() -> str | None:
    """The version of torch that the module was built against, if it was built."""
    record = pathlib.Path(__file__).with_name("_build_torch_version")
    return record.read_text() if record.exists() else None


try:
    from . import _C as _C
except ImportError as error:
    built = built_with_torch()
    if built is None:
        reason = "the compiled module is not there"
    elif built != torch.__version__:
        reason = f"it was built against torch {built}, but torch {torch.__version__} is installed"
    else:
        reason = str(error)
    raise ImportError(
        f"coreai_torch cannot load its kernels: {reason}. Build it for this environment, in a "
        f"checkout of its repository: {REBUILD}"
    ) from error
