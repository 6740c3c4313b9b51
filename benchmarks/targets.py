"""The project's targets, and which of them a run misses."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from .cases import DIRECTIONS, PER_HEAD, SHORT
from .measure import ROOFS
from .tables import Record, providers_of, ratio, time_of

MIB = 2**20
LARGE = 4096 * 4096  # elements
CUDA_LARGE = 64e6  # bytes
FORWARD, BACKWARD, BOTH = DIRECTIONS
COLUMNS = ("mode", "case", "direction", "target", "measured", "of its bandwidth", "µs, both", "")


class Target(NamedTuple):
    """A bound on ours / other: either a multiple of a roof, or (`faster`) a speed-up over it.

    `other` None is the bandwidth of large copies, of which ours is to reach a share.
    """

    direction: str
    other: str | None
    bound: float
    faster: bool = False


class Check(NamedTuple):
    """A target applied to a case of a run."""

    mode: str
    case: str
    target: Target
    measured: float
    times: str
    bandwidth: float | None = None  # ours over that of a copy, counting the bytes that must move

    @property
    def met(self) -> bool:
        at_least = self.target.faster or self.target.other is None
        bound = self.target.bound
        return self.measured >= bound if at_least else self.measured <= bound

    def cells(self) -> list[str]:
        bound, other = self.target.bound, self.target.other
        if other is None:
            text, measured = f"≥ {bound:.0%} of the copy bandwidth", f"{self.measured:.0%}"
        elif self.target.faster:
            text, measured = f"≥ {bound:g} faster than {other}", f"{self.measured:.2f}"
        else:
            text, measured = f"≤ {bound:g} times {other}", f"{self.measured:.2f}"
        verdict = "met" if self.met else "**missed**"
        direction = SHORT[self.target.direction]
        share = "" if self.bandwidth is None else f"{self.bandwidth:.0%}"
        return [self.mode, self.case, direction, text, measured, share, self.times, verdict]


def cpu_targets(mode: str, case: Record) -> Iterator[Target]:
    """The targets that apply to a case; the pairs of bounds are (float32, 16-bit)."""
    wide = int(case["dtype"] != "float32")
    shape = tuple(case["shape"])
    if case["op"] != "rms_norm":
        yield from (Target(d, name, 1.0, faster=True) for d in DIRECTIONS for name in RIVALS)
        return
    if case["kind"] == "module":
        yield Target(FORWARD, "torch", 0.45)
        yield Target(BOTH, "torch", 0.45)
    if mode == "default" and case["output_bytes"] >= 32 * MIB:
        yield Target(FORWARD, "clone", (1.10, 1.15)[wide])
        yield Target(BOTH, "clone", (2.3, 2.6)[wide])
    if mode == "warm" and case["output_bytes"] >= 64 * MIB:
        yield Target(FORWARD, "copy_", (0.75, 1.0)[wide])
        yield Target(BOTH, "copy_", (2.2, 2.7)[wide])
    if mode == "warm" and shape == (2048, 1024):
        yield Target(FORWARD, "copy_", (1.0, 1.5)[wide])
        yield Target(BOTH, "copy_", (4.0, 5.0)[wide])
    if shape == PER_HEAD:
        yield Target(FORWARD, "compile", (2.0, 1.3)[wide], faster=True)
        yield Target(BOTH, "compile", 2.0, faster=True)
    else:
        yield Target(FORWARD, "compile", 1.0, faster=True)
        if mode == "warm":
            yield Target(BOTH, "compile", 1.9, faster=True)
    if math.prod(shape) >= LARGE:
        yield Target(FORWARD, "torch", (3.0, 8.0)[wide], faster=True)
        yield Target(BOTH, "torch", (5.0, 12.0)[wide], faster=True)


RIVALS = ("torch", "compile", "liger")


def cuda_targets(case: Record) -> Iterator[Target]:
    if case["output_bytes"] >= CUDA_LARGE:
        narrow = case["shape"][-1] <= 512
        yield Target(FORWARD, None, 0.85 if narrow else 0.92)
        yield Target(BACKWARD, None, 0.88)
    yield from (Target(d, name, 1.0, faster=True) for d in DIRECTIONS for name in RIVALS)


def checks(run: Record) -> Iterator[Check]:
    """All targets for which the run has both times."""
    for case in run["cases"]:
        cuda = run["device"] == "cuda"
        for target in cuda_targets(case) if cuda else cpu_targets(run["mode"], case):
            found = check(run, case, target)
            if found is not None:
                yield found


AVX2, AVX512 = "x86-64-v3", "x86-64-v4"
LEVEL_BOUNDS = {"float32": 1.15, "float16": 1.2, "bfloat16": 2.0}


def level_checks(section: Record) -> Iterator[Check]:
    """How much longer AVX2 may take than the best level with AVX-512, on large tensors."""
    for record in section["records"]:
        for direction, times in record["times"].items():
            best = list(times)[-1]  # they are in ascending order
            if AVX2 not in times or not best.startswith(AVX512):
                continue
            target = Target(direction, f"the {best} level", LEVEL_BOUNDS[record["dtype"]])
            ours, other = (times[level]["median_us"] for level in (AVX2, best))
            name = f"{record['name']}, {AVX2} level"
            yield Check(section["mode"], name, target, ours / other, f"{ours:.1f}, {other:.1f}")


def check(run: Record, case: Record, target: Target) -> Check | None:
    ours = time_of(case, target.direction, "ours")
    if target.other is None:
        bandwidth = run.get("copy_bandwidth")
        if ours is None or bandwidth is None:
            return None
        share = case["bytes"][target.direction] / (ours * 1e-6) / bandwidth
        return Check(run["mode"], case["name"], target, share, f"{ours:.1f}")
    other = time_of(case, target.direction, target.other)
    if ours is None or other is None:
        return None
    measured = other / ours if target.faster else ours / other
    bandwidth = None
    if target.other in ROOFS:
        bandwidth = case["bytes"][target.direction] / (2 * case["output_bytes"]) / measured
    times = f"{ours:.1f}, {other:.1f}"
    return Check(run["mode"], case["name"], target, measured, times, bandwidth)


def slower(run: Record) -> Iterator[str]:
    """Where ours loses to another implementation, whether or not a target speaks of it."""
    many = run["mode"]
    if many != "cuda":
        many += f", {run['threads']} threads"
    for case in run["cases"]:
        if "failed" in case:
            yield f"{many}, {case['name']}: **wrong result**, not timed ({case['failed']})"
            continue
        for direction in DIRECTIONS:
            for name in providers_of(run):
                loss = ratio(case, direction, "ours", name)
                if loss is not None and loss > 1:
                    times = [case["times"][direction][each] for each in ("ours", name)]
                    ours, other = (each["median_us"] for each in times)
                    pages = ""
                    if all("page_faults" in each for each in times):
                        mine, theirs = (each["page_faults"] for each in times)
                        pages = f"; page faults: {mine} against {theirs}"
                    yield (
                        f"{many}, {case['name']}, {SHORT[direction]}: {loss:.2f} times {name} "
                        f"({ours:.1f} against {other:.1f} µs{pages})"
                    )


def slower_elsewhere(result: Record) -> Iterator[str]:
    """The same of cold caches, calls, memory and models."""
    if cold := result.get("cold"):
        mode = f"{cold['mode']}, cold caches"
        yield from slower({"mode": mode, "threads": cold["threads"], "cases": cold["records"]})
    for record in result.get("host", {}).get("records", ()):
        for direction, times in record["times"].items():
            pairs = (("ours, function", "F.rms_norm"), ("ours, module", "nn.RMSNorm"))
            others = [(mine, o) for mine in ("ours, function",) for o in ("reference", "compile")]
            for mine, other in (*pairs, *others):
                if mine in times and other in times:
                    loss = times[mine]["median_us"] / times[other]["median_us"]
                    if loss > 1:
                        yield (
                            f"host time of a call, {record['dtype']}, {SHORT[direction]}: {mine} "
                            f"takes {loss:.2f} times as long as {other}"
                        )
    for record in result.get("memory", {}).get("records", ()):
        ours = record["bytes"]["ours"]
        for name, theirs in record["bytes"].items():
            for kind in sorted(ours.keys() & theirs.keys()):
                if ours[kind] > theirs[kind] + record["tensor_bytes"] // 100:
                    yield (
                        f"memory, {record['name']}, {SHORT.get(kind, kind)}: "
                        f"{ours[kind] / theirs[kind]:.2f} times that of {name}"
                    )
    for record in result.get("models", {}).get("records", ()):
        times = record.get("times", {})
        for name, value in times.items():
            loss = times["ours"]["median_us"] / value["median_us"]
            if loss > 1:
                yield f"{record['name']}, {record['dtype']}: {loss:.2f} times {name}"
