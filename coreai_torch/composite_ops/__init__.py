"""Modules that a converter can keep as composite ops.

Where Apple's converter is installed, its other composite ops are here as well.
"""

from typing import TYPE_CHECKING

from .. import _coexistence

__all__ = ["RMSNorm", "RMSNormImpl"]  # Apple's __init__ replaces it with a longer list

_coexistence.run_apple_init(__name__)

from .rms_norm import RMSNorm, RMSNormImpl  # noqa: E402  in place of Apple's

if TYPE_CHECKING:  # for a type checker these are Apple's, or Any where Apple's are not installed
    from ._gated_delta_update import GatedDeltaUpdate as GatedDeltaUpdate
    from ._gather_mm import GatherMM as GatherMM
    from ._rope import RoPE as RoPE
    from ._sdpa import SDPA as SDPA
