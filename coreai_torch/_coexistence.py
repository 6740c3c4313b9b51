"""One import name, two distributions: what happens where Apple's `coreai-torch` is installed too.

Both have the packages `coreai_torch` and `coreai_torch.composite_ops`, and ours are the ones that
Python runs: in a checkout their `__init__.py`, in a wheel `__init__.abi3.so`, which precedes the
`__init__.py` of Apple's in the same folder (build_backend/README.md). They begin with
:func:`run_apple_init`, which runs Apple's `__init__.py` in the same namespace. So every name of
Apple's is there, as Apple made it, before ours join and `RMSNorm` and `RMSNormImpl` are replaced.
"""

from __future__ import annotations

import sys
import warnings
from importlib.machinery import SourceFileLoader
from pathlib import Path
from pkgutil import extend_path
from types import ModuleType
from typing import Any

TESTED_VERSIONS = ("0.4.2", "0.4.3")
INSTALL = f"pip install coreai-torch=={TESTED_VERSIONS[-1]}"

# What Apple's packages export in these versions; asked for in vain, it is explained.
APPLE_NAMES = {
    "coreai_torch": (
        "MetalParameter",
        "TorchConverter",
        "TorchMetalKernel",
        "generate_composite_decl",
        "get_decomp_table",
    ),
    "coreai_torch.composite_ops": ("GatedDeltaUpdate", "GatherMM", "RoPE", "SDPA"),
}


def run_apple_init(package: str) -> bool:
    """Run Apple's `__init__.py` of a package in the namespace of ours, which is being imported.

    Returns:
        Whether Apple's package is there. Where it is not, or does not load, which is a warning,
        its names raise an ImportError that says what to do.
    """
    module = sys.modules[package]
    folder = _apple_folder(package)
    if folder is None:
        _explain_apple_names(module, "is not installed")
        return False
    if str(folder) not in module.__path__:
        module.__path__.append(str(folder))
    doc = module.__doc__
    try:
        code = SourceFileLoader(package, str(folder / "__init__.py")).get_code(package)
        assert code is not None  # None is for modules without Python code
        exec(code, vars(module))
    except Exception as error:  # whatever it is, training does not depend on it
        problem = f"is installed but cannot be imported ({type(error).__name__}: {error})"
        warnings.warn(f"coreai_torch: Apple's coreai-torch {problem}", stacklevel=2)
        _explain_apple_names(module, problem)
        return False
    finally:
        module.__doc__ = doc
    version = vars(module).get("__version__")
    if package == "coreai_torch" and version not in TESTED_VERSIONS:
        warnings.warn(
            f"coreai_torch: expected a converter that this package was tested with, coreai-torch "
            f"{' or '.join(TESTED_VERSIONS)}, got {version}; conversion may fail or differ",
            stacklevel=2,
        )
    return True


def _apple_folder(package: str) -> Path | None:
    """The folder of Apple's package, on `sys.path`; maybe the folder of ours."""
    top, *rest = package.split(".")
    for entry in extend_path(sys.modules[top].__path__, top):
        folder = Path(entry)
        # A checkout of ours has an `__init__.py`, too, but no converter.
        if (folder / "converter.py").is_file() and (folder / "__init__.py").is_file():
            return folder.joinpath(*rest)
    return None


def _explain_apple_names(module: ModuleType, problem: str) -> None:
    package = module.__name__

    def __getattr__(name: str) -> Any:
        if name in APPLE_NAMES[package]:
            raise ImportError(
                f"{package}.{name} is part of Apple's converter, coreai-torch, which {problem}; "
                f"install it with: {INSTALL}",
                name=package,
            )
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    vars(module)["__getattr__"] = __getattr__
