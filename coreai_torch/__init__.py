"""Fused RMSNorm for PyTorch that is also a Core AI composite op.

    from coreai_torch.composite_ops import RMSNorm       # the module, used like torch.nn.RMSNorm
    from coreai_torch.ops import rms_norm                # the function
    from coreai_torch.ops import add_rms_norm            # after a residual add, in one op
    from coreai_torch.reference import rms_norm          # the same in plain PyTorch operations
    from coreai_torch import replace_rms_norm            # in models that exist
    from coreai_torch import ExternalizeSpec             # tells a converter what to externalize
    from coreai_torch.conversion import convert, load    # to Core AI and its runtime, with Apple's

Apple's converter has the same import name. Where it is installed, its names are here as well, and
`ExternalizeSpec` and `__version__` are its own; `_coexistence` says how.

`python -m coreai_torch` reports what is installed, what was built, and what to do if something is
off.
"""

from typing import TYPE_CHECKING

from . import _coexistence

__all__ = ["ExternalizeSpec", "__version__"]
__version__ = "0.1.0"

_has_converter = _coexistence.run_apple_init(__name__)

from . import _load as _load  # noqa: E402  registers the ops; explains itself where it cannot
from . import backends, composite_ops, ops, reference  # noqa: E402
from ._compile_mode import get_compile_mode, set_compile_mode  # noqa: E402
from .replace import replace_rms_norm, restore_rms_norm  # noqa: E402

if TYPE_CHECKING:  # for a type checker these are Apple's, or Any where Apple's are not installed
    from ._composite_declaration import generate_composite_decl as generate_composite_decl
    from ._decomp import get_decomp_table as get_decomp_table
    from ._torch_metal_kernel import TorchMetalKernel as TorchMetalKernel
    from .converter import TorchConverter as TorchConverter
    from .externalize import ExternalizeSpec
elif not _has_converter:
    from ._externalize_spec import ExternalizeSpec

__all__ += [
    "backends",
    "composite_ops",
    "get_compile_mode",
    "ops",
    "reference",
    "replace_rms_norm",
    "restore_rms_norm",
    "set_compile_mode",
]
