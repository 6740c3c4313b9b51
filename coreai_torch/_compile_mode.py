"""What torch.compile and AOTInductor make of the ops: a call of the kernels, or their own code."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

CompileMode = Literal["kernel", "decompose", "auto"]

# torch.compile guards on this: a function that was compiled under one mode is compiled anew under
# another, and under the first again it has both.
_mode: CompileMode = "auto"


def set_compile_mode(mode: CompileMode) -> None:
    """Say what torch.compile and AOTInductor do with the ops of this package, in this process.

    Without them it changes nothing. A function that torch.compile compiled under another mode is
    compiled anew at its next call.

    Args:
        mode: ``"kernel"`` calls the fused kernels, which give the same bits as without
            torch.compile. ``"decompose"`` hands the formula in plain PyTorch operations
            (:mod:`coreai_torch.reference`) to the compiler, which can fuse it with what comes
            before and after; results then differ by rounding. ``"auto"``, the default, takes the
            one that is faster by measurement.

    Raises:
        ValueError: there is no such mode.
    """
    if mode not in get_args(CompileMode):
        modes = ", ".join(map(repr, get_args(CompileMode)))
        raise ValueError(f"set_compile_mode: expected mode to be one of {modes}, got {mode!r}")
    global _mode
    _mode = mode


def get_compile_mode() -> CompileMode:
    """The mode that :func:`set_compile_mode` set last."""
    return _mode


def decomposes(input: Tensor) -> bool:
    """Whether torch.compile is to see plain PyTorch operations for this input."""
    if _mode == "auto":
        return _decomposes_by_measurement(input)
    return _mode == "decompose"


def _decomposes_by_measurement(input: Tensor) -> bool:
    """Where the compiler's code is faster than the kernels; benchmarks/compile_modes.py measures.

    Nowhere as yet. On a CPU (benchmarks/results/compile.txt) the kernels take 0.90 to 1.00 times as
    long in forward and backward, by geometric mean over the shapes, for each dtype and alone, after
    an add or before a gate. The exception are float32 rows of 128, where they take 1.2 to 1.7 times
    as long; that is a matter for the kernels, which in turn give the same bits as without
    torch.compile.

    What is read of the input here becomes a guard: its device, its dtype and the size of its last
    dimension do not change from call to call, the number of its rows does.
    """
    return False
