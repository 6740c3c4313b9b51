"""The ops in plain PyTorch operations: the parity oracle, and what an exported model contains."""

from .rms_norm import rms_norm

__all__ = ["rms_norm"]
