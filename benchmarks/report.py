"""Turn the JSON of bench_rms_norm.py into results/RESULTS.md: misses first, then all figures."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bench_rms_norm import DIRECTIONS, HEADER, PER_HEAD, roof_of, table_row

MIB = 2**20
LARGE = 4096 * 4096  # elements
SHORT = {"forward": "fwd", "forward+backward": "F+B"}
COLUMNS = ("mode", "case", "direction", "target", "measured", "µs, ours and the other", "")


class Target(NamedTuple):
    """A bound on ours / other: either a multiple of a roof, or (`faster`) a speed-up over it."""

    direction: str
    other: str
    bound: float
    faster: bool = False


class Check(NamedTuple):
    """A target applied to a case of a run."""

    mode: str
    case: str
    target: Target
    ours_us: float
    other_us: float

    @property
    def measured(self) -> float:
        ratio = self.ours_us / self.other_us
        return 1 / ratio if self.target.faster else ratio

    @property
    def met(self) -> bool:
        bound = self.target.bound
        return self.measured >= bound if self.target.faster else self.measured <= bound

    def cells(self) -> list[str]:
        sign, unit = ("≥", "faster than") if self.target.faster else ("≤", "times")
        return [
            self.mode,
            self.case,
            SHORT[self.target.direction],
            f"{sign} {self.target.bound:g} {unit} {self.target.other}",
            f"{self.measured:.2f}",
            f"{self.ours_us:.1f}, {self.other_us:.1f}",
            "met" if self.met else "**missed**",
        ]


def targets(mode: str, case: dict[str, Any]) -> Iterator[Target]:
    """The targets that apply to a case; the pairs of bounds are (float32, 16-bit)."""
    forward, both = DIRECTIONS
    wide = int(case["dtype"] != "float32")
    shape = tuple(case["shape"])
    if case["kind"] == "module":
        for direction in DIRECTIONS:
            yield Target(direction, "torch", 0.45)
    if mode == "default" and case["output_bytes"] >= 32 * MIB:
        yield Target(forward, "clone", (1.10, 1.15)[wide])
        yield Target(both, "clone", (2.3, 2.6)[wide])
    if mode == "warm" and case["output_bytes"] >= 64 * MIB:
        yield Target(forward, "copy_", (0.75, 1.0)[wide])
        yield Target(both, "copy_", (2.2, 2.7)[wide])
    if mode == "warm" and shape == (2048, 1024):
        yield Target(forward, "copy_", (1.0, 1.5)[wide])
        yield Target(both, "copy_", (4.0, 5.0)[wide])
    if shape == PER_HEAD:
        yield Target(forward, "compile", (2.0, 1.3)[wide], faster=True)
        yield Target(both, "compile", 2.0, faster=True)
    else:
        yield Target(forward, "compile", 1.0, faster=True)
        if mode == "warm":
            yield Target(both, "compile", 1.9, faster=True)
    if math.prod(shape) >= LARGE:
        yield Target(forward, "torch", (3.0, 8.0)[wide], faster=True)
        yield Target(both, "torch", (5.0, 12.0)[wide], faster=True)


def time_of(case: dict[str, Any], direction: str, name: str) -> float | None:
    """The median in µs; copies have no backward and count by their forward."""
    times = case["times"]
    value = times[direction].get(name) or (
        times["forward"].get(name) if name in ("copy_", "clone") else None
    )
    return None if value is None else value["median_us"]


def checks(run: dict[str, Any]) -> Iterator[Check]:
    """All targets for which the run has both times."""
    for case in run["cases"]:
        if "failed" in case:
            continue
        for target in targets(run["mode"], case):
            ours = time_of(case, target.direction, "ours")
            other = time_of(case, target.direction, target.other)
            if ours is not None and other is not None:
                yield Check(run["mode"], case["name"], target, ours, other)


def slower(run: dict[str, Any]) -> Iterator[str]:
    """Where ours loses to another implementation, whether or not a target speaks of it."""
    for case in run["cases"]:
        if "failed" in case:
            yield f"{run['mode']}, {case['name']}: **wrong result**, not timed ({case['failed']})"
            continue
        for direction in DIRECTIONS:
            ours = time_of(case, direction, "ours")
            for name in ("torch", "compile", "reference"):
                other = time_of(case, direction, name)
                if ours is not None and other is not None and ours > other:
                    yield (
                        f"{run['mode']}, {case['name']}, {SHORT[direction]}: "
                        f"{ours / other:.2f} times {name} ({ours:.1f} against {other:.1f} µs)"
                    )


def table(header: tuple[str, ...], rows: list[list[str]], aligned: str) -> list[str]:
    """A Markdown table; `aligned` has l or r for each column."""
    rule = ["---:" if side == "r" else "---" for side in aligned]
    return [f"| {' | '.join(row)} |" for row in (list(header), rule, *rows)]


def misses(result: dict[str, Any], all_checks: list[Check]) -> list[str]:
    missed = [check for check in all_checks if not check.met]
    losing = [line for run in result["runs"] for line in slower(run)]
    lines = ["## Where ours is slower or misses its target", ""]
    if not missed and not losing:
        lines += [f"Nowhere, in {len(all_checks)} targets that apply to these figures.", ""]
    if losing:
        lines += ["Slower than another implementation:", "", *(f"- {line}" for line in losing), ""]
    if missed:
        lines += [f"Targets missed, {len(missed)} of {len(all_checks)}:", ""]
        lines += [*table(COLUMNS, [check.cells() for check in missed], "lllrrrl"), ""]
    return lines


def provenance(result: dict[str, Any]) -> list[str]:
    env = result["environment"]
    changed = ", with uncommitted changes" if env["dirty"] else ""
    return [
        f"- {env['processor']}, {env['cores']} cores; {', '.join(env['caches'])}",
        f"- {env['kernel_level']} kernels, PyTorch {env['torch']}, Python {env['python']}, "
        f"{env['system']}",
        f"- {env['date']}, commit {env['commit'] or 'unknown'}{changed}",
        "",
    ]


def figures(run: dict[str, Any]) -> list[str]:
    """The run's table, and how much of it was measured beside a busy neighbour."""
    roof = roof_of(run["mode"])
    cases = [case for case in run["cases"] if "failed" not in case]
    dropped, kept = (sum(case[key] for case in cases) for key in ("dropped", "rounds"))
    noisy = [case["name"] for case in cases if case["contended"]]
    lines = [
        f"## {run['mode'].capitalize()} mode, {run['threads']} threads",
        "",
        f"Allocator: {run['allocator']}. fwd and F+B (forward and backward) are times those of "
        f"`{roof}`; lower is faster. {kept} rounds kept, {dropped} contended ones dropped.",
        "",
    ]
    if noisy:
        lines += [f"**Not trustworthy**, no quiet rounds to be had: {', '.join(noisy)}.", ""]
    rows = [table_row(case, roof) for case in run["cases"]]
    lines += [*table(HEADER, rows, "l" + "r" * (len(HEADER) - 1)), ""]
    header = ("case", "", "provider", "median µs", "quartiles µs", "GB/s")
    details = [
        [
            *(case["name"], SHORT[direction], name, f"{value['median_us']:.1f}"),
            f"{value['q1_us']:.1f} … {value['q3_us']:.1f}",
            f"{value['gb_per_s']:.1f}",
        ]
        for case in cases
        for direction in DIRECTIONS
        for name, value in case["times"][direction].items()
    ]
    lines += ["<details><summary>Times, quartiles and bandwidth</summary>", ""]
    return [*lines, *table(header, details, "lllrrr"), "", "</details>", ""]


def report(result: dict[str, Any]) -> str:
    all_checks = [check for run in result["runs"] for check in checks(run)]
    lines = ["# RMSNorm on the CPU: results", "", *misses(result, all_checks), *provenance(result)]
    for run in result["runs"]:
        lines += figures(run)
    lines += ["## All targets", ""]
    lines += table(COLUMNS, [check.cells() for check in all_checks], "lllrrrl")
    return "\n".join(lines) + "\n"


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("json", type=Path, nargs="?", default=here / "results" / "cpu.json")
    parser.add_argument("--output", type=Path, default=here / "results" / "RESULTS.md")
    options = parser.parse_args()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    text = report(json.loads(options.json.read_text()))
    options.output.write_text(text, encoding="utf-8")
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
