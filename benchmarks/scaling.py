"""Is the cost linear in rows? What do cold caches cost, more threads bring, and SIMD levels?"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch

from coreai_torch.backends import cpu

from . import timing
from .cases import PER_HEAD, Case, make_case, make_inputs
from .measure import Plan, measure
from .providers import forward_backward, make_subjects

ROWS_DIM = 64
ROWS = tuple(10**exponent for exponent in range(7))
COLD_SHAPES = ((64, 4096), (2048, 1024), (32768, 128), PER_HEAD)
THREAD_SHAPES = ((2048, 1024), (4096, 4096))
DTYPES = ("float32", "bfloat16")
LEVEL_SHAPE = (4096, 4096)
LEVEL_DTYPES = ("float32", "bfloat16", "float16")


def by_rows(plan: Plan, rows: tuple[int, ...] = ROWS) -> list[dict[str, Any]]:
    """Ours and the copies at a fixed dim."""
    plan = plan._replace(providers=["ours"], directions=("forward", "forward+backward"))
    return [measure(Case((n, ROWS_DIM), "float32"), plan) for n in rows]


def cold(plan: Plan, shapes: tuple[tuple[int, ...], ...] = COLD_SHAPES) -> list[dict[str, Any]]:
    """Single calls whose operands are in no cache."""
    plan = plan._replace(method="apart")
    return [measure(make_case(shape, dtype), plan) for dtype in DTYPES for shape in shapes]


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


def by_levels(
    plan: Plan, levels: list[str], shape: tuple[int, int] = LEVEL_SHAPE
) -> list[dict[str, Any]]:
    """Ours at every level, side by side. That their results are equal is for the tests to see."""
    records = []
    for dtype in LEVEL_DTYPES:
        case = Case(shape, dtype)
        inputs = make_inputs(case)
        constant = inputs.detached()
        inference = make_subjects(case, constant, ["ours"])["ours"]
        training = make_subjects(case, inputs, ["ours"])["ours"]
        runs = {
            "forward": functools.partial(inference.call, *constant.tensors),
            "forward+backward": functools.partial(forward_backward, training, inputs),
        }
        timed = {
            (direction, level): cpu.level(level)(run)
            for direction, run in runs.items()
            for level in levels
        }
        timings = timing.take_turns(timed, plan.effort)
        times: dict[str, dict[str, dict[str, float]]] = {}
        for (direction, level), samples in timings.seconds.items():
            times.setdefault(direction, {})[level] = timing.summary(samples)
        records.append({"name": case.name, "dtype": dtype, "times": times} | timings.counts())
    return records
