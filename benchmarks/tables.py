"""Records as rows: of the terminal, of Markdown tables and of CSV files."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .cases import DIRECTIONS, SHORT
from .measure import ROOFS

# In this order, and where a run has them, the columns beside ours. The reference and the compiled
# F.rms_norm are in the details: eager PyTorch and the compiler are there already.
SHOWN = ("torch", "compile", "apple", "liger", "quack", "apex", "te", "flashinfer")

Record = dict[str, Any]
TIMES = "\N{MULTIPLICATION SIGN}"


def roof_of(mode: str) -> str:
    """What to divide by: `clone` pays for fresh memory as every op does in the default mode."""
    return "clone" if mode == "default" else "copy_"


def time_of(case: Record, direction: str, name: str) -> float | None:
    """The median in µs; copies have no backward and count by their forward."""
    times = case.get("times", {})
    value = times.get("forward" if name in ROOFS else direction, {}).get(name)
    return None if value is None else float(value["median_us"])


def ratio(case: Record, direction: str, name: str, base: str) -> float | None:
    """How many times as long as `base` a provider takes."""
    mine, other = time_of(case, direction, name), time_of(case, direction, base)
    return None if mine is None or other is None else mine / other


def providers_of(run: Record) -> list[str]:
    """All that were timed in some case, in the order of the first."""
    found = {
        name: None
        for case in run["cases"]
        for direction in DIRECTIONS
        for name in case.get("times", {}).get(direction, {})
    }
    return [name for name in found if name not in ROOFS]


def columns_of(run: Record) -> list[tuple[str, str]]:
    """Direction and provider of the columns that are times those of the roof."""
    names = providers_of(run)
    directions = [d for d in DIRECTIONS if any(d in c.get("times", {}) for c in run["cases"])]
    shown = [name for name in ("ours", *SHOWN) if name in names]
    return [(direction, name) for direction in directions for name in shown]


def header(columns: Iterable[tuple[str, str]]) -> list[str]:
    names = [f"ours {SHORT[d]}" if name == "ours" else name for d, name in columns]
    return ["case", "copy_ µs", "clone/copy_", *names]


def row(case: Record, columns: Sequence[tuple[str, str]], roof: str) -> list[str]:
    """A row under `header`: all but the first columns are times divided by the roof's."""
    if "failed" in case:
        return [case["name"], "WRONG RESULT", *[""] * (1 + len(columns))]

    def cell(value: float | None, digits: int = 2) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    return [
        case["name"],
        cell(time_of(case, "forward", "copy_"), 1),
        cell(ratio(case, "forward", "clone", "copy_")),
        *(cell(ratio(case, direction, name, roof)) for direction, name in columns),
    ]


def print_row(cells: Sequence[str]) -> None:
    print(f"{cells[0]:41}" + "".join(f"{cell:>12}" for cell in cells[1:]), flush=True)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], aligned: str) -> list[str]:
    """A Markdown table; `aligned` has l or r for each column."""
    rule = ["---:" if side == "r" else "---" for side in aligned]
    return [f"| {' | '.join(row)} |" for row in (header, rule, *rows)]


CSV_COLUMNS = (
    *("device", "mode", "threads", "op", "kind", "dtype", "scale_dtype_differs", "shape"),
    *("direction", "provider", "median_us", "q1_us", "q3_us", "gb_per_s", "bytes"),
    *("copy_us", "clone_us", "contended_rounds"),
)


def csv_rows(result: Record) -> Iterator[list[Any]]:
    for run in result["runs"]:
        for case in run["cases"]:
            copies = [time_of(case, "forward", roof) for roof in ROOFS]
            for direction, by_name in case.get("times", {}).items():
                for name, value in by_name.items():
                    yield [
                        *(run["device"], run["mode"], run["threads"], case["op"], case["kind"]),
                        *(case["dtype"], case["dtype"] == "mixed"),
                        *("x".join(map(str, case["shape"])), direction, name),
                        *(value[key] for key in ("median_us", "q1_us", "q3_us", "gb_per_s")),
                        2 * case["output_bytes"] if name in ROOFS else case["bytes"][direction],
                        *(*copies, case.get("contended", 0)),
                    ]


def write_csv(result: Record, path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(CSV_COLUMNS)
        writer.writerows(csv_rows(result))
