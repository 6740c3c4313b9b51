"""The ops as functions."""

from . import rms_norm_vmap as rms_norm_vmap
from .rms_norm import rms_norm

__all__ = ["rms_norm"]
