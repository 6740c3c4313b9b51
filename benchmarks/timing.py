"""Timing in turns, with rounds repeated that others disturbed.

Only figures that were taken side by side compare: a round runs everything once, in one process, and
each round starts one place later than the one before.
"""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Callable, Hashable, Mapping
from statistics import median, quantiles
from typing import Generic, NamedTuple, TypeVar

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

MIN_TIMING_S = 0.003  # a timing lasts at least this,
MIN_ROUND_S = 0.2  # and a round this, or clock ticks of 10 ms could not show 5 % of the machine
LONG = 10  # times a timing's target: of such a call one is enough to warm up
CONTENDED = 0.05  # share of the machine that others may use during a round
MIN_ROUNDS = 3  # also where the time budget of a case is spent
REPEATS = 2  # repeats of contended rounds, per round asked for

Key = TypeVar("Key", bound=Hashable)
Run = Callable[[], object]


class Effort(NamedTuple):
    """How long to measure: rounds of a case, fewer where `budget` seconds are spent before."""

    rounds: int = 9
    budget: float = 1.2
    round_s: float = MIN_ROUND_S


TRIAL = Effort(rounds=1, budget=0.0, round_s=0.0)  # every call once, to try the programs out


class Timings(NamedTuple, Generic[Key]):
    seconds: dict[Key, list[float]]  # per call, one for each round
    page_faults: dict[Key, list[float]]  # the same
    rounds: int
    dropped: int  # contended rounds that were repeated
    contended: int  # contended rounds among those kept, when the repeats had run out

    def counts(self) -> dict[str, int]:
        return {"rounds": self.rounds, "dropped": self.dropped, "contended": self.contended}


def busy_seconds() -> float | None:
    """Processor time used on the whole machine since it started; None where the OS has no such."""
    try:
        with open("/proc/stat") as stat:
            user, nice, system, _, _, irq, softirq, steal = map(int, stat.readline().split()[1:9])
    except (OSError, ValueError):
        return None
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def page_faults() -> int:
    """Pages that the system has handed out to this process so far; 0 where it does not count."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt if resource else 0


class Contention:
    """Measures the share of the machine that other processes use inside a ``with`` block."""

    share = 0.0

    def __enter__(self) -> Contention:
        self.busy, self.own, self.wall = busy_seconds(), time.process_time(), time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        own, wall = time.process_time() - self.own, time.perf_counter() - self.wall
        busy = busy_seconds()
        if busy is not None and self.busy is not None:
            self.share = max(0.0, (busy - self.busy - own) / (wall * (os.cpu_count() or 1)))


def seconds(run: Run, times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        run()
    return time.perf_counter() - start


def iterations(run: Run, target: float) -> int:
    """How often to run for a timing of `target` seconds; warms up on the way."""
    if seconds(run, 1) > LONG * target:
        return 1
    seconds(run, 1)
    times = 1
    while (taken := seconds(run, times)) < target / 4:
        times *= 2
    return max(1, math.ceil(target / taken * times))


def take_turns(
    timed: Mapping[Key, Run], effort: Effort, settle: Run = lambda: None, apart: bool = False
) -> Timings[Key]:
    """Rounds that run everything in turn; `settle` is called before each timing, untimed.

    A timing is a loop of calls, or, where they are `apart`, calls that are each settled and timed
    on their own. After the repeats are used up, the least contended rounds are taken.
    """
    keys = list(timed)
    target = max(MIN_TIMING_S, effort.round_s / len(keys)) if effort.round_s else 0.0

    def settled(run: Run) -> float:
        settle()
        return seconds(run, 1)

    def timing(key: Key) -> tuple[float, float]:
        run, count = timed[key], times[key]
        if not apart:
            if count > 2:
                run()  # bring in the data that the one before has displaced
            settle()
        before = page_faults()
        spent = sum(settled(run) for _ in range(count)) if apart else seconds(run, count)
        return spent / count, (page_faults() - before) / count

    loops = {key: functools.partial(settled, run) if apart else run for key, run in timed.items()}
    times = {key: iterations(loop, target) for key, loop in loops.items()}
    needed = min(effort.rounds, MIN_ROUNDS)
    taken: list[tuple[float, dict[Key, tuple[float, float]]]] = []
    clean = 0
    start = time.perf_counter()
    for index in range(effort.rounds * (1 + REPEATS)):
        shift = index % len(keys)
        with Contention() as contention:
            result = {key: timing(key) for key in keys[shift:] + keys[:shift]}
        taken.append((contention.share, result))
        clean += contention.share <= CONTENDED
        spent = time.perf_counter() - start
        if clean >= effort.rounds or (clean >= needed and spent > effort.budget):
            break
        if spent > effort.budget * REPEATS and index + 1 >= needed:
            break
    if clean >= needed:
        kept = [each for each in taken if each[0] <= CONTENDED]
    else:
        kept = sorted(taken, key=lambda each: each[0])[:needed]
    per_call, faults = (
        {key: [result[key][i] for _, result in kept] for key in keys} for i in (0, 1)
    )
    contended = sum(share > CONTENDED for share, _ in kept)
    return Timings(per_call, faults, len(kept), len(taken) - len(kept), contended)


def summary(samples: list[float], moved: int | None = None) -> dict[str, float]:
    """Median and quartiles of seconds in µs; GB/s where the bytes moved in a call are given."""
    middle = median(samples)
    low, _, high = quantiles(samples, method="inclusive") if len(samples) > 1 else samples * 3
    result = {
        "median_us": round(middle * 1e6, 3),
        "q1_us": round(low * 1e6, 3),
        "q3_us": round(high * 1e6, 3),
    }
    if moved is not None:
        result["gb_per_s"] = float(f"{moved / middle / 1e9:.4g}")
    return result
