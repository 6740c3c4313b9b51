"""The report's sections: tables of the runs and of what else was measured."""

from __future__ import annotations

from typing import Any

from .cases import DIRECTIONS, SHORT
from .tables import Record, columns_of, header, markdown, ratio, roof_of, row, time_of

MIB = 2**20


def provenance(result: Record) -> list[str]:
    env = result["environment"]
    changed = ", with uncommitted changes" if env["dirty"] else ""
    memory = f"; {env['memory_gib']} GiB of memory" if env.get("memory_gib") else ""
    lines = ["## Where the figures come from", ""]
    if "card" in env:
        lines += [
            f"- {env['card']}, {env['multiprocessors']} multiprocessors, L2 {env['l2_mib']:.0f} "
            f"MiB; driver {env['driver']}, CUDA {env['cuda']}"
        ]
    lines += [
        f"- {env['processor']}, {env['cores']} cores; {', '.join(env['caches'])}{memory}",
        f"- {env['kernel_level']} kernels, PyTorch {env['torch']}, Python {env['python']}, "
        f"{env['system']}",
    ]
    if env.get("huge_pages"):
        lines += [f"- transparent huge pages: {env['huge_pages']}"]
    for title, key in (("versions", "libraries"), ("set in the environment", "variables")):
        if env.get(key):
            listed = ", ".join(f"{name} {value}" for name, value in env[key].items())
            lines += [f"- {title}: {listed}"]
    lines += [f"- {env['date']}, commit {env['commit'] or 'unknown'}{changed}", ""]
    for title, key in (("Providers", "providers"), ("Not measured here", "skipped")):
        if result.get(key):
            lines += [f"{title}:", "", *(f"- {n}: {about}" for n, about in result[key].items()), ""]
    return lines


def notes(result: Record) -> list[str]:
    """Who computes the same as eager, counted in the cases of all runs."""
    counts: dict[str, list[bool]] = {}
    for run in result["runs"]:
        for case in run["cases"]:
            for name, same in case.get("same_bits", {}).items():
                counts.setdefault(name, []).append(same)
    on_cuda = all(run["device"] == "cuda" for run in result["runs"])
    order = "an order of its own" if on_cuda else "its order: the outputs are equal bit for bit"
    lines = [
        "Not all providers compute the same. Ours does every rounding that the eager reference "
        f"does, and sums in {order}. The compiler fuses the "
        "formula, leaves out the rounding to 16 bits between normalization and scale, which is "
        "less work, and sums in another order.",
        "",
    ]
    if counts:
        cells = ", ".join(f"{name} {sum(s)} of {len(s)}" for name, s in counts.items())
        lines += [f"Cases whose output equals the eager reference's bit for bit: {cells}.", ""]
    return lines


def heading(run: Record) -> str:
    """What tells a run from the others of its report."""
    if run["device"] == "cuda":
        return f"On the card, {run['cases'][0]['dtype']}" if run["cases"] else "On the card"
    return where(run).capitalize()


def figures(run: Record) -> list[str]:
    """The run's table, and how much of it was measured beside a busy neighbour."""
    roof = roof_of(run["mode"])
    cases = [case for case in run["cases"] if "failed" not in case]
    lines = [f"## {heading(run)}", ""]
    text = (
        f"Allocator: {run['allocator']}. Columns but the first two are times those of "
        f"`{roof}`; lower is faster."
    )
    if run["method"] == "rounds":
        dropped, kept = (sum(case[key] for case in cases) for key in ("dropped", "rounds"))
        text += f" {kept} rounds kept, {dropped} contended ones dropped."
    if "copy_bandwidth" in run:
        text += f" Large copies reach {run['copy_bandwidth'] / 1e9:.0f} GB/s."
    lines += [text, ""]
    noisy = [case["name"] for case in cases if case.get("contended")]
    if noisy:
        lines += [f"**Not trustworthy**, no quiet rounds to be had: {', '.join(noisy)}.", ""]
    columns = columns_of(run)
    names = header(columns)
    rows = [row(case, columns, roof) for case in run["cases"]]
    lines += [*markdown(names, rows, "l" + "r" * (len(names) - 1)), ""]
    left_out = [
        f"{case['name']}: {name}, {reason}"
        for case in cases
        for name, reason in case.get("skipped", {}).items()
    ]
    if left_out:
        lines += ["Not timed:", "", *(f"- {line}" for line in left_out), ""]
    details = [
        [
            *(case["name"], SHORT[direction], name, f"{value['median_us']:.1f}"),
            f"{value['q1_us']:.1f} … {value['q3_us']:.1f}",
            f"{value['gb_per_s']:.1f}",
        ]
        for case in cases
        for direction in DIRECTIONS
        for name, value in case["times"].get(direction, {}).items()
    ]
    lines += ["<details><summary>Times, quartiles and bandwidth</summary>", ""]
    lines += markdown(
        ("case", "", "provider", "median µs", "quartiles µs", "GB/s"), details, "lllrrr"
    )
    return [*lines, "", "</details>", ""]


def where(section: Record) -> str:
    return f"{section['mode']} mode, {section['threads']} threads"


def host(section: Record) -> list[str]:
    lines = [
        "## Host time of a call",
        "",
        f"µs, {where(section)}; the tensors are so small that this is all there is. `x * scale` is "
        "what any elementwise op takes.",
        "",
    ]
    records = section["records"]
    labels = list(records[0]["times"]["forward"])
    rows = [
        [record["dtype"], "x".join(map(str, record["shape"])), SHORT[direction]]
        + [f"{times[label]['median_us']:.1f}" if label in times else "" for label in labels]
        for record in records
        for direction, times in record["times"].items()
    ]
    return [*lines, *markdown(["", "", "", *labels], rows, "lll" + "r" * len(labels)), ""]


def memory(section: Record) -> list[str]:
    lines = [
        "## Memory",
        "",
        "In multiples of the input: the most that is allocated at a time in inference (output "
        "included) and in forward and backward (gradients included), and what is kept for "
        "backward (inputs included).",
        "",
    ]
    kinds = ("forward", "forward+backward", "saved")
    rows = [
        [record["name"], name]
        + [f"{sizes[k] / record['tensor_bytes']:.2f}" if k in sizes else "" for k in kinds]
        for record in section["records"]
        for name, sizes in record["bytes"].items()
    ]
    return [*lines, *markdown(("", "", *kinds), rows, "llrrr"), ""]


def models(section: Record) -> list[str]:
    records = section["records"]
    lines = [
        "## A decoder block and a training step",
        "",
        f"Of the model in examples/lm_model.py ({records[0]['size']}), {where(section)}, ms. Only "
        "the norms differ. bfloat16 is that of the block's parameters, or of autocast in the step.",
        "",
    ]
    rows: list[list[str]] = []
    for record in records:
        name, times = f"{record['name']}, {record['dtype']}", record.get("times")
        if times is None:
            rows.append([name, f"**wrong result**: {record['failed']}", "", "", ""])
            continue
        ours, torch, reference = (
            times[each]["median_us"] / 1e3 if each in times else None
            for each in ("ours", "torch", "reference")
        )
        cells = [f"{t:.1f}" if t is not None else "" for t in (ours, torch, reference)]
        rows.append([name, *cells, f"{torch / ours:.2f}" if ours and torch else ""])
    names = ("", "ours", "nn.RMSNorm", "reference", "nn.RMSNorm / ours")
    return [*lines, *markdown(names, rows, "lrrrr"), ""]


def scaling_row(case: Record) -> list[str]:
    def cell(value: float | None, digits: int) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    ours = [time_of(case, d, "ours") for d in ("forward", "forward+backward")]
    return [
        cell(time_of(case, "forward", "copy_"), 1),
        cell(ratio(case, "forward", "clone", "copy_"), 2),
        *(cell(value, 1) for value in ours),
        *(cell(value and value * 1e3 / case["shape"][0], 2) for value in ours),
    ]


def cold(section: Record) -> list[str]:
    run = {"cases": section["records"]}
    columns = columns_of(run)
    names = header(columns)
    lines = [
        "## Cold caches",
        "",
        f"{where(section)}. Before each call the caches are emptied, so that its operands come "
        "from memory; what it writes finds its pages. Columns but the first two are times those "
        "of `copy_`.",
        "",
    ]
    rows = [row(case, columns, "copy_") for case in section["records"]]
    return [*lines, *markdown(names, rows, "l" + "r" * (len(names) - 1)), ""]


SCALING = ("copy_ µs", "clone/copy_", "ours fwd µs", "F+B µs", "fwd, ns a row", "F+B, ns a row")


def by_rows(section: Record) -> list[str]:
    records = [case for case in section["records"] if "times" in case]
    dim = records[0]["shape"][-1]
    lines = [f"## Cost by rows, {records[0]['dtype']}, dim {dim}", "", f"{where(section)}.", ""]
    rows = [[str(case["shape"][0]), *scaling_row(case)] for case in records]
    return [*lines, *markdown(("rows", *SCALING), rows, "r" * 7), ""]


def by_threads(section: Record) -> list[str]:
    lines = ["## Cost by threads", "", f"{section['mode'].capitalize()} mode.", ""]
    rows = [
        [case["name"], str(record["threads"]), *scaling_row(case)]
        for record in section["records"]
        for case in record["cases"]
        if "times" in case
    ]
    rows.sort(key=lambda cells: cells[0])
    return [*lines, *markdown(("case", "threads", *SCALING), rows, "l" + "r" * 7), ""]


def by_levels(section: Record) -> list[str]:
    records = section["records"]
    levels = list(records[0]["times"]["forward"])
    lines = ["## Cost by SIMD level", "", f"{where(section)}, µs. The results are equal.", ""]
    rows = [
        [record["name"], SHORT[direction]]
        + [f"{times[level]['median_us']:.1f}" for level in levels]
        for record in records
        for direction, times in record["times"].items()
    ]
    return [*lines, *markdown(("case", "", *levels), rows, "ll" + "r" * len(levels)), ""]


def instructions(section: Record) -> list[str]:
    changed = ", with uncommitted changes" if section["dirty"] else ""
    lines = [
        "## Instructions per element",
        "",
        f"Of the kernels alone, counted by {section['tool']}, at the level {section['level']}: it "
        "emulates no AVX-512, with which there are about half as many. They do not depend on the "
        f"machine's load. {section['rows']} rows on one thread, commit "
        f"{section['commit'] or 'unknown'}{changed}.",
        "",
    ]
    dims = sorted({record["dim"] for record in section["records"]})
    found: dict[tuple[str, str], dict[int, Any]] = {}
    for record in section["records"]:
        key = (record["kernel"], record["dtype"])
        found.setdefault(key, {})[record["dim"]] = record["per_element"]
    rows = [
        [*key, *(f"{values[dim]:.2f}" if dim in values else "" for dim in dims)]
        for key, values in found.items()
    ]
    names = ["kernel", "dtype", *(f"dim {dim}" for dim in dims)]
    return [*lines, *markdown(names, rows, "ll" + "r" * len(dims)), ""]


EXTRA = {
    "host": host,
    "memory": memory,
    "models": models,
    "cold": cold,
    "rows": by_rows,
    "threads": by_threads,
    "levels": by_levels,
    "instructions": instructions,
}
