"""The ops as functions."""

import importlib
import warnings

from .._when_imported import when_imported
from . import _add_rms_norm_vmap as _add_rms_norm_vmap
from . import _rms_norm_vmap as _rms_norm_vmap
from .add_rms_norm import add_rms_norm
from .rms_norm import rms_norm

__all__ = ["add_rms_norm", "rms_norm"]


def _register_sharding() -> None:
    try:
        importlib.import_module("._rms_norm_sharding", __package__)
        importlib.import_module("._add_rms_norm_sharding", __package__)
    except (ImportError, AttributeError) as error:  # PyTorch calls this interface experimental
        warnings.warn(
            f"coreai_torch cannot tell this version of PyTorch how DTensor shards its ops: {error}",
            stacklevel=2,
        )


# DTensor takes about as long to import as the rest of PyTorch, and only its users should pay.
when_imported("torch.distributed.tensor", _register_sharding)
