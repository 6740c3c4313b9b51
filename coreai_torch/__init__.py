"""Fused RMSNorm for PyTorch that is also a Core AI composite op.

    from coreai_torch.composite_ops import RMSNorm       # the module, used like torch.nn.RMSNorm
    from coreai_torch.ops import rms_norm                # the function
    from coreai_torch.reference import rms_norm          # the same in plain PyTorch operations
    from coreai_torch import ExternalizeSpec             # tells a converter what to externalize

`python -m coreai_torch` reports what is installed, what was built, and what to do if something is
off.
"""

from . import _load as _load  # registers the ops; explains itself where it cannot
from . import backends, composite_ops, ops, reference
from ._compile_mode import get_compile_mode, set_compile_mode
from ._externalize_spec import ExternalizeSpec

__version__ = "0.1.0"

__all__ = [
    "ExternalizeSpec",
    "__version__",
    "backends",
    "composite_ops",
    "get_compile_mode",
    "ops",
    "reference",
    "set_compile_mode",
]
