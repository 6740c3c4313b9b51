"""Modules that a converter can keep as composite ops."""

from .rms_norm import RMSNorm, RMSNormImpl

__all__ = ["RMSNorm", "RMSNormImpl"]
