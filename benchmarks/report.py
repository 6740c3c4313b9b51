"""From the committed JSON to RESULTS.md, the plots and the README's table.

python -m benchmarks.report                                   # all of them, of results/cpu.json,
                                                              # cuda.json and elsewhere/
python -m benchmarks.report other.json --output other.md       # another file's report alone
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from . import plot, sections
from .cases import PER_HEAD
from .tables import TIMES, Record, markdown, providers_of, ratio, time_of
from .targets import COLUMNS, Check, checks, level_checks, slower, slower_elsewhere

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"
ELSEWHERE = RESULTS / "elsewhere"  # of other machines, and earlier commits
CARD = RESULTS / "cuda.json"
README = FOLDER.parent / "README.md"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
BOTH = "forward+backward"

# The README's cases: small, large and per head, in the mode that users have.
HEADLINE = (
    ("float32", (2048, 1024), "plain"),
    ("float32", (8192, 4096), "plain"),
    ("bfloat16", (2048, 1024), "plain"),
    ("bfloat16", (8192, 4096), "plain"),
    ("bfloat16", PER_HEAD, "per-head transposed"),
    ("float32", (1, 4096), "module"),
)
HEADLINE_OTHERS = {"torch": "`torch.nn.RMSNorm`", "compile": "`torch.compile` of the formula"}
CARD_OTHERS = HEADLINE_OTHERS | {"liger": "Liger"}


def load(path: Path) -> Record:
    """A result, with the instruction counts of the file beside it where there is one."""
    result: Record = json.loads(path.read_text())
    counts = path.with_name("instructions.json")
    if counts.exists() and result["runs"] and result["runs"][0]["device"] == "cpu":
        result["instructions"] = json.loads(counts.read_text())
    return result


def every_check(result: Record) -> list[Check]:
    found = [check for run in result["runs"] for check in checks(run)]
    if "levels" in result:
        found += level_checks(result["levels"])
    return found


def losing_figures(result: Record) -> list[str]:
    return [*(line for run in result["runs"] for line in slower(run)), *slower_elsewhere(result)]


def other_machines(folder: Path) -> list[str]:
    """For each result in `folder`, where it is from, and what was lost and missed there."""
    lines = []
    for path in sorted(folder.glob("*.json")):
        result = load(path)
        env, all_checks = result["environment"], every_check(result)
        missed = sum(not check.met for check in all_checks)
        lines.append(
            f"- {env['processor']}, {env['cores']} cores, {env['kernel_level']} kernels, commit "
            f"{env['commit']}: slower, or takes more, in {len(losing_figures(result))} places, and "
            f"{missed} of {len(all_checks)} targets missed; see `{folder.name}/{path.stem}.md`"
        )
    return ["## On other machines", "", *lines, ""] if lines else []


def misses(result: Record, all_checks: list[Check]) -> list[str]:
    missed = [check for check in all_checks if not check.met]
    losing = losing_figures(result)
    lines = ["## Where ours is slower, or takes more, than another", ""]
    lines += [*(f"- {line}" for line in losing or ["nowhere"]), ""]
    lines += ["## Targets missed", ""]
    if missed:
        lines += [
            f"{len(missed)} of {len(all_checks)}. Where the target is a multiple of a copy's time, "
            "a column has the bandwidth that was reached, counting the bytes that must move, as a "
            "share of the copy's: from about 100 % on, memory is the limit.",
            "",
        ]
        lines += [*markdown(COLUMNS, [check.cells() for check in missed], "lllrrrrl"), ""]
    else:
        lines += [f"None, of {len(all_checks)} that apply to these figures.", ""]
    return lines


def speed_up(cases: Sequence[Record], other: str) -> float | None:
    """Over another provider, forward and backward: the geometric mean of the cases that it has."""
    found = [r for case in cases if (r := ratio(case, BOTH, other, "ours"))]
    return math.exp(sum(map(math.log, found)) / len(found)) if found else None


def geometric_means(run: Record) -> list[str]:
    """Of the speed-ups over each provider, forward and backward, over all cases."""
    cells = []
    for name in providers_of(run):
        mean = speed_up(run["cases"], name)
        if name != "ours" and mean is not None:
            cells.append(f"{mean:.2f} over {name}")
    if not cells:
        return []
    listed = ", ".join(cells)
    return [f"Geometric mean of the speed-ups in forward and backward: {listed}.", ""]


def report(result: Record, picture: str | None = None, others: Sequence[str] = ()) -> str:
    all_checks = every_check(result)
    env = result["environment"]
    lines = [f"# RMSNorm on {env.get('card', 'the CPU')}: results", ""]
    lines += ["Generated by `python -m benchmarks.report`; do not edit.", ""]
    lines += [*misses(result, all_checks), *others]
    lines += [*sections.provenance(result), *sections.notes(result)]
    if picture is not None:
        lines += [f"![GB/s over dim, beside a copy]({picture})", ""]
    for run in result["runs"]:
        table = sections.figures(run)
        lines += [*table[:2], *geometric_means(run), *table[2:]]
    for name, section in sections.EXTRA.items():
        if name in result:
            lines += section(result[name])
    lines += ["## All targets", ""]
    lines += markdown(COLUMNS, [check.cells() for check in all_checks], "lllrrrrl")
    return "\n".join(lines) + "\n"


def label(case: Record) -> str:
    shape = case["shape"]
    if case["kind"] == "module":
        return f"one row of {shape[-1]}, {case['dtype']}, module"
    if case["kind"] == "per-head transposed":
        return f"{case['dtype']} with a weight per head, {tuple(shape)} transposed"
    return f"{case['dtype']}, {f' {TIMES} '.join(map(str, shape))}"


def headline(result: Record) -> tuple[Record, list[tuple[str, Record]]]:
    """The run that the README shows, and its cases with their labels."""
    run = next((run for run in result["runs"] if run["mode"] == "default"), result["runs"][0])
    cases = {
        (case["dtype"], tuple(case["shape"]), case["kind"]): case
        for case in run["cases"]
        if case["op"] == "rms_norm" and "times" in case
    }
    return run, [(label(cases[key]), cases[key]) for key in HEADLINE if key in cases]


def with_memory_kept(result: Record, run: Record, case: Record) -> float | None:
    """How many times as fast ours is where the allocator keeps its memory, forward and backward."""
    same = ("op", "dtype", "shape", "kind")
    for kept in result["runs"]:
        if (kept["mode"], kept["threads"]) != ("warm", run["threads"]):
            continue
        for other in kept["cases"]:
            if all(other[key] == case[key] for key in same):
                fresh, warm = (time_of(c, BOTH, "ours") for c in (case, other))
                return fresh / warm if fresh and warm else None
    return None


def on_a_card(result: Record) -> str:
    """What the README says of a run on a CUDA card: forward and backward, over all cases."""
    cases = [case for run in result["runs"] for case in run["cases"]]
    means = [
        f"{mean:.1f} ({name})"
        for other, name in CARD_OTHERS.items()
        if (mean := speed_up(cases, other)) is not None
    ]
    env = result["environment"]
    return (
        f"On an {env['card']} (PyTorch {env['torch']}, {env['date'][:10]}) the others take, "
        f"forward and backward, in the geometric mean of {len(cases)} cases, {', '.join(means)} "
        "times as long as ours. [Its results](benchmarks/results/cuda.md) begin with where ours is "
        "not the fastest, which there is mostly forward alone."
    )


def readme_block(result: Record, picture: str | None, card: Record | None = None) -> str:
    """What stands between the README's markers: where, the table, the limit of the memory."""
    run, cases = headline(result)
    env = result["environment"]
    rows = []
    for name, case in cases:
        speed_ups = (ratio(case, BOTH, other, "ours") for other in HEADLINE_OTHERS)
        rows.append([name, *(f"{s:.1f}" if s is not None else "" for s in speed_ups)])
    lines = [
        wrapped(
            "How many times as long the others take as ours, forward and backward, with "
            f"{run['threads']} threads on {env['processor']} ({env['kernel_level']} kernels, "
            f"PyTorch {env['torch']}, {env['date'][:10]}):"
        ),
        "",
        *markdown(("input", *HEADLINE_OTHERS.values()), rows, "lrr"),
        "",
    ]
    if picture is not None:
        lines += [f"![Speed-ups, forward and backward]({picture})", ""]
    large = [(n, c) for n, c in cases if c["output_bytes"] >= 32 * 2**20]
    limits = [
        f"{r:.1f} ({name})" for name, case in large if (r := ratio(case, BOTH, "ours", "clone"))
    ]
    if limits:
        lines += [
            wrapped(
                "Large tensors are at the limit of the memory: with PyTorch's default allocation, "
                "forward and backward take, as multiples of `clone()` alone, "
                f"{' and '.join(limits)}."
            ),
            "",
        ]
    gains = [
        f"{gain:.1f} ({name})"
        for name, case in large
        if run["mode"] == "default" and (gain := with_memory_kept(result, run, case))
    ]
    if gains:
        lines += [
            wrapped(
                "Most of that is the system handing out memory. Where the allocator "
                "[keeps it](docs/performance.md), for which one environment variable is enough, "
                f"they are {' and '.join(gains)} times as fast."
            ),
            "",
        ]
    if card is not None:
        lines += [wrapped(on_a_card(card)), ""]
    lost, cases = len(losses(run)), sum("times" in case for case in run["cases"])
    lines += [
        wrapped(
            "`make bench` measures on yours. All shapes and directions are in "
            "[the results](benchmarks/results/RESULTS.md), which begin with where ours is *not* "
            f"the fastest, in time (here, in {run['mode']} mode, in {lost or 'none'} of the "
            f"{cases} cases) or memory, and count the same on other machines."
        )
    ]
    return "\n".join(lines)


def wrapped(text: str) -> str:
    return textwrap.fill(text, 104, break_long_words=False, break_on_hyphens=False)


def losses(run: Record) -> list[str]:
    """The cases in which another provider is faster in some direction."""
    return [
        case["name"]
        for case in run["cases"]
        if any(
            (ours := time_of(case, direction, "ours")) is not None
            and (other := time_of(case, direction, name)) is not None
            and other < ours
            for direction in case.get("times", {})
            for name in providers_of(run)
        )
    ]


def with_block(text: str, block: str) -> str:
    """The README with another block between its markers."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"README.md: expected one {BEGIN} and one {END}")
    pattern = f"{re.escape(BEGIN)}.*{re.escape(END)}"
    replacement = f"{BEGIN}\n{block}\n{END}"
    return re.sub(pattern, lambda _: replacement, text, flags=re.DOTALL)


def draw(result: Record, folder: Path) -> None:
    """The pictures of the last run (the warm one, which shows the kernels) and of the README."""
    plot.write_bandwidth(result["runs"][-1], folder / "bandwidth.svg")
    _, cases = headline(result)
    plot.write_speedups(cases, list(HEADLINE_OTHERS), folder / "speedup.svg")


def reported_alone() -> list[Path]:
    """Results that have a report of their own: of other machines, and of a card."""
    return [*ELSEWHERE.glob("*.json"), *RESULTS.glob(CARD.name)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("json", type=Path, nargs="?", default=RESULTS / "cpu.json")
    parser.add_argument("--output", type=Path, help="only the report, into this file")
    options = parser.parse_args(arguments)
    result = load(options.json)
    if options.output is not None:
        options.output.write_text(report(result), encoding="utf-8")
        print(f"wrote {options.output}")
        return 0
    try:
        draw(result, RESULTS)
    except ImportError as problem:
        print(f"the pictures stay as they are: {problem}")
    for path in reported_alone():
        path.with_suffix(".md").write_text(report(load(path)), encoding="utf-8")
    text = report(result, "bandwidth.svg", other_machines(ELSEWHERE))
    (RESULTS / "RESULTS.md").write_text(text, encoding="utf-8")
    card = load(CARD) if CARD.exists() else None
    block = readme_block(result, "benchmarks/results/speedup.svg", card)
    README.write_text(with_block(README.read_text("utf-8"), block), encoding="utf-8")
    print(
        f"wrote {RESULTS}/RESULTS.md, others' reports, the pictures and the block in {README.name}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
