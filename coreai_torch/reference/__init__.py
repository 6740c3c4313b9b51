"""The ops in plain PyTorch operations: the parity oracle, and what an exported model contains."""

from .add_rms_norm import add_rms_norm
from .rms_norm import rms_norm

__all__ = ["add_rms_norm", "rms_norm"]
