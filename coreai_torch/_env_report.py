"""What is installed, what was built, and what to do if something is off.

Every probe is guarded, so that the report still prints where half of it is missing.
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _torch() -> str:
    import torch

    from ._load import built_with_torch

    cuda = f", CUDA {torch.version.cuda}" if torch.version.cuda else ", no CUDA"
    return f"{torch.__version__}{cuda}; built against {built_with_torch()}"


def _kernels() -> str:
    from . import _C

    info = _C.build_info()
    return f"{info['compiler']}, {info['build_type']}; {_C.__file__}"


def _cuda() -> str:
    import torch

    from . import _C

    info = _C.build_info()
    if info["cuda_version"] is None:
        if torch.version.cuda is None:
            return "no CUDA kernels built; torch has no CUDA either"
        raise RuntimeError(
            "torch has CUDA, but coreai_torch was built without CUDA kernels. Install the CUDA "
            f"toolkit {torch.version.cuda}, put its nvcc on PATH, and build again"
        )
    built = f"CUDA {info['cuda_version']}, architectures {info['cuda_architectures']}"
    if torch.version.cuda is None:
        return f"{built}; torch has no CUDA"
    cards = [
        f"{torch.cuda.get_device_name(i)} (compute capability "
        f"{'.'.join(map(str, torch.cuda.get_device_capability(i)))})"
        for i in range(torch.cuda.device_count())
    ]
    return f"{built}; {', '.join(cards) or 'no card found'}"


def _cpu_levels() -> str:
    from .backends import cpu

    supported = cpu.supported_levels()
    names = [
        f"[{name}]" if name == cpu.get_level() else name if name in supported else f"({name})"
        for name in cpu.compiled_levels()
    ]
    return " ".join(names) + "    [in use], (this processor cannot)"


def _package() -> str:
    import coreai_torch

    return f"{_version('coreai-torch-rmsnorm')}; {coreai_torch.__file__}"


def _rms_norm_impl() -> str:
    import torch

    from .composite_ops import RMSNormImpl

    x = torch.ones(2, 8, requires_grad=True)
    y = RMSNormImpl()(x, torch.ones(8))
    function = y.grad_fn.name() if y.grad_fn is not None else "no gradient"
    if "RmsNormFunction" not in function:
        raise RuntimeError(
            f"{RMSNormImpl.__module__}.RMSNormImpl is in use, which does not run the fused kernels "
            f"({function}). If it is Apple's: reinstall coreai-torch-rmsnorm, and see that no "
            "folder with Apple's package comes before it on sys.path"
        )
    return f"{RMSNormImpl.__module__}, fused"


def _converter() -> str:
    from ._coexistence import INSTALL, TESTED_VERSIONS

    version, core = _version("coreai-torch"), _version("coreai-core")
    if version == "not installed":
        return f"not installed; {INSTALL}"
    from coreai_torch import TorchConverter

    pins = [r for r in importlib.metadata.requires("coreai-torch") or [] if "coreai-core" in r]
    if pins and pins != [f"coreai-core=={core}"]:
        raise RuntimeError(f"coreai-torch {version} requires {pins[0]}, but it is {core}")
    tested = "tested" if version in TESTED_VERSIONS else f"not tested; {INSTALL}"
    return f"{TorchConverter.__module__} of coreai-torch {version} ({tested})"


def _runtime() -> str:
    try:
        import coreai.runtime as runtime
    except ModuleNotFoundError as error:
        return f"not installed ({error})"
    return f"{runtime.__name__} of coreai-core {_version('coreai-core')}"


PROBES: dict[str, Callable[[], str]] = {
    "coreai-torch-rmsnorm": _package,
    "python": lambda: f"{platform.python_version()} on {platform.platform()}",
    "torch": _torch,
    "kernels": _kernels,
    "CUDA": _cuda,
    "CPU levels": _cpu_levels,
    "RMSNormImpl": _rms_norm_impl,
    "converter": _converter,
    "runtime": _runtime,
}


def main() -> int:
    """Print the report; return 1 if something is off."""
    problems = []
    for name, probe in PROBES.items():
        try:
            value = probe()
        except Exception as error:
            value = "PROBLEM, see below"
            problems.append(f"{name}: {error}")
        print(f"{name:22}{value}")
    for problem in problems:
        print(f"\nPROBLEM  {problem}")
    return 1 if problems else 0
