"""Pictures: GB/s over dim below the copy's bandwidth, and the speed-ups for the README."""

from __future__ import annotations

from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from .cases import DTYPES, ODD
from .tables import TIMES, Record, providers_of, time_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DIRECTIONS = ("forward", "backward", "forward+backward")
COLORS = {"ours": "#0a7d5a", "torch": "#c2410c", "compile": "#1d4ed8", "reference": "#8a8a8a"}
# The same bytes for the same figures: fixed ids, no date.
SETTINGS = {"svg.hashsalt": "coreai_torch", "svg.fonttype": "none", "font.size": 9}


def figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("plots need matplotlib: pip install matplotlib") from None
    return Figure(figsize=(width, height), layout="constrained")


def save(drawn: Figure, path: Path) -> None:
    from matplotlib import rc_context

    with rc_context(SETTINGS):
        metadata: dict[str, Any] = {"Date": None} if path.suffix == ".svg" else {}
        drawn.savefig(path, metadata=metadata, dpi=150)


def series(run: Record, dtype: str) -> list[Record]:
    """For each dim the plain case with most rows, by dim."""
    largest: dict[int, Record] = {}
    for case in run["cases"]:
        rows, dim = case["shape"][0], case["shape"][-1]
        plain = case["op"] == "rms_norm" and not case["kind"].endswith("transposed")
        if not plain or case["dtype"] != dtype or "times" not in case or dim == ODD[1]:
            continue
        if dim not in largest or rows > largest[dim]["shape"][0]:
            largest[dim] = case
    return [largest[dim] for dim in sorted(largest)]


def write_bandwidth(run: Record, path: Path) -> None:
    """GB/s over dim, by direction and dtype; the grey area is what a copy reached beside it."""
    dtypes = [dtype for dtype in DTYPES if len(series(run, dtype)) > 1]
    dtypes = dtypes or [dtype for dtype in DTYPES if series(run, dtype)]
    directions = [d for d in DIRECTIONS if any(d in c.get("times", {}) for c in run["cases"])]
    if not dtypes or not directions:
        raise ValueError("there is nothing to plot: no plain case of rms_norm was timed")
    drawn = figure(1 + 3.6 * len(dtypes), 0.6 + 2.4 * len(directions))
    axes = drawn.subplots(len(directions), len(dtypes), squeeze=False)
    for line, direction in zip(axes, directions, strict=True):
        for ax, dtype in zip(line, dtypes, strict=True):
            draw_bandwidth(ax, series(run, dtype), direction, providers_of(run))
            ax.set_title(f"{direction}, {dtype}")
    for ax in axes[:, 0]:
        ax.set_ylabel("GB/s")
    for ax in axes[-1]:
        ax.set_xlabel(f"dim {TIMES} rows")
    axes[0, 0].legend(fontsize=7)
    where = f"{run['mode']} mode, {run['threads']} threads"
    drawn.suptitle(f"An ideal kernel's bytes per second\n{where}")
    save(drawn, path)


def draw_bandwidth(ax: Any, cases: list[Record], direction: str, names: list[str]) -> None:
    places = range(len(cases))
    labels = [f"{case['shape'][-1]}\n{TIMES}{case['shape'][0]}" for case in cases]
    roof = [case["times"]["forward"].get("copy_", {}).get("gb_per_s") for case in cases]
    if None not in roof:
        ax.fill_between(places, 0, roof, color="#e5e7eb", label="copy_")
    for name in names:
        values = [c["times"].get(direction, {}).get(name, {}).get("gb_per_s") for c in cases]
        points = [(place, v) for place, v in zip(places, values, strict=True) if v is not None]
        if points:
            width = 2.2 if name == "ours" else 1.2
            ax.plot(
                *zip(*points, strict=True),
                marker="o",
                markersize=3,
                linewidth=width,
                color=COLORS.get(name),
                label=name,
            )
    ax.set_xticks(list(places), labels, fontsize=6)
    ax.set_ylim(bottom=0)
    ax.grid(axis="y", linewidth=0.4)


def write_speedups(cases: list[tuple[str, Record]], names: list[str], path: Path) -> None:
    """Bars: how many times as long as ours the others take, forward and backward."""
    drawn = figure(7.6, 0.9 + 0.55 * len(cases))
    ax = drawn.subplots()
    height = 0.8 / len(names)
    for index, name in enumerate(names):
        for place, (_, case) in enumerate(cases):
            ours = time_of(case, "forward+backward", "ours")
            other = time_of(case, "forward+backward", name)
            if ours is None or other is None:
                continue
            y = place + (index - (len(names) - 1) / 2) * height
            label = name if place == 0 else None
            ax.barh(y, other / ours, height * 0.9, color=COLORS.get(name), label=label)
            ax.text(other / ours, y, f" {other / ours:.1f}", va="center", fontsize=8)
    ax.axvline(1, color=COLORS["ours"], linewidth=2, label="ours")
    ax.set_yticks(range(len(cases)), [fill(label, 26) for label, _ in cases])
    ax.invert_yaxis()
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_xlabel("time of forward and backward; ours takes 1")
    ax.legend(loc="lower right", fontsize=8, frameon=False)
    save(drawn, path)
