"""Is the cost linear in rows, and what do more threads bring?"""

from __future__ import annotations

import os
from typing import Any

import torch

from .cases import Case
from .measure import Plan, measure

ROWS_DIM = 64
ROWS = tuple(10**exponent for exponent in range(7))
THREAD_SHAPES = ((2048, 1024), (4096, 4096))
DTYPES = ("float32", "bfloat16")


def by_rows(plan: Plan, rows: tuple[int, ...] = ROWS) -> list[dict[str, Any]]:
    """Ours and the copies at a fixed dim."""
    plan = plan._replace(providers=["ours"], directions=("forward", "forward+backward"))
    return [measure(Case((n, ROWS_DIM), "float32"), plan) for n in rows]


def thread_counts() -> list[int]:
    """1, 2, 4, ... and the number of cores."""
    most = os.cpu_count() or 1
    return sorted({2**n for n in range(most.bit_length()) if 2**n <= most} | {most})


def by_threads(
    plan: Plan, counts: list[int], shapes: tuple[tuple[int, int], ...] = THREAD_SHAPES
) -> list[dict[str, Any]]:
    plan = plan._replace(providers=["ours"], directions=("forward", "forward+backward"))
    before = torch.get_num_threads()
    result = []
    try:
        for count in counts:
            torch.set_num_threads(count)
            cases = [measure(Case(shape, dtype), plan) for dtype in DTYPES for shape in shapes]
            result.append({"threads": count, "cases": cases})
    finally:
        torch.set_num_threads(before)
    return result
