"""Properties of the compiled kernels, device by device."""

from . import cpu

__all__ = ["cpu"]
