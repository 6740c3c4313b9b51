"""SIMD levels of the CPU kernels.

Every kernel is compiled once per level, and the best level that the processor runs is used. The
environment variable ``COREAI_TORCH_CPU_LEVEL`` forces one; PyTorch's own ``ATEN_CPU_CAPABILITY``
(``default``, ``avx2``, ``avx512``) caps it. Results have the same bits at every level.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .. import _C


def compiled_levels() -> list[str]:
    """The levels in this build, lowest first."""
    return [name for name, _ in _C.cpu_levels()]


def supported_levels() -> list[str]:
    """The levels in this build that this processor runs, lowest first."""
    return [name for name, supported in _C.cpu_levels() if supported]


def get_level() -> str:
    """The level in use."""
    return _C.cpu_level()


def set_level(name: str | None) -> None:
    """Force a level for the whole process; None goes back to the automatic choice.

    Raises:
        ValueError: there is no such level, or this processor does not run it.
    """
    if name is not None and name not in supported_levels():
        raise ValueError(
            f"set_level: expected name to be one of {', '.join(supported_levels())}, got {name}"
        )
    _C.set_cpu_level(name)


@contextmanager
def level(name: str) -> Iterator[None]:
    """Force a level for the whole process within a ``with`` block."""
    before = get_level()
    set_level(name)
    try:
        yield
    finally:
        set_level(before)
