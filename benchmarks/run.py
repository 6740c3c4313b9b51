"""The command line: what to measure, in which modes, and where the results go."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no worker processes beside the timing
os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the profiler, which memory is measured with

import torch

import coreai_torch
from coreai_torch.backends import cpu

from . import libraries as libraries  # joins PROVIDERS
from . import models, overheads, plot, ring, scaling, tables
from .cases import DIRECTIONS, DTYPES, OPS, default_cases, make_case, quick_cases
from .environment import allocator, enter_warm_mode, environment
from .measure import ROOFS, Plan, measure
from .providers import PROVIDERS, unavailable
from .timing import Effort

# What else is measured, and in which mode where both are run: what users feel as they have it, what
# depends on the kernels alone with memory that is there.
MEASURES = {
    "times": ("default", "warm"),
    "host": ("default",),
    "memory": ("default",),
    "models": ("default",),
    "cold": ("warm",),
    "rows": ("warm",),
    "threads": ("warm",),
    "levels": ("warm",),
}
OUTPUTS = ("json", "csv", "plot")
QUICK_MEASURES = "times,host,memory"


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        allow_abbrev=False,
        description="RMSNorm beside PyTorch's own, torch.compile, other libraries and copies.",
    )

    def names(known: Sequence[str]) -> Any:
        def parse(text: str) -> list[str]:
            given = text.split(",")
            if unknown := [name for name in given if name not in known]:
                raise argparse.ArgumentTypeError(
                    f"unknown: {', '.join(unknown)}; there are {', '.join(known)}"
                )
            return given

        return parse

    def shapes(text: str) -> list[tuple[int, ...]]:
        try:
            found = [tuple(map(int, shape.split("x"))) for shape in text.split(",")]
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"expected shapes such as 64x4096, got {text}"
            ) from None
        if not {len(shape) for shape in found} <= {2, 4} or min(map(min, found)) < 1:
            raise argparse.ArgumentTypeError(
                f"a shape has two or four positive numbers, got {text}"
            )
        return found

    def counts(text: str) -> list[int]:
        return [positive(each) for each in text.split(",")]

    def positive(text: str) -> int:
        if not text.isdecimal() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
        return int(text)

    add = parser.add_argument
    add("--op", type=names(OPS), help=f"of {','.join(OPS)}; default: all")
    add("--shapes", type=shapes, help="64x4096, 1x4096 (modules), 2x8x512x64 (per-head transposed)")
    add("--one-scale", action="store_true", help="shapes of four numbers: one scale for all heads")
    add("--dtypes", type=names(list(DTYPES)), help=f"of {','.join(DTYPES)}")
    add("--providers", type=names([*ROOFS, *PROVIDERS]), help=f"of {','.join(PROVIDERS)}")
    add("--directions", type=names(DIRECTIONS), help=f"of {','.join(DIRECTIONS)}")
    add("--measures", type=names(list(MEASURES)), help=f"of {','.join(MEASURES)}; default: all")
    add("--threads", type=counts, help="such as 1,2; default: PyTorch's choice")
    add("--mode", choices=("default", "warm", "both"), help="the allocator's; on the CPU: both")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--method", choices=("rounds", "ring"), help="ring: as on CUDA, to try it out on the CPU")
    add("--rounds", type=positive, help="per case; fewer where it is large")
    add("--budget", type=float, help="seconds of timing per case")
    add("--quick", action="store_true", help="a few cases")
    add("--json", type=Path, help="write everything to this file")
    add("--csv", type=Path, help="write the times to this file")
    add("--plot", type=Path, help="draw GB/s over dim into this file (.svg, .png)")
    options = parser.parse_args(arguments)
    on_cuda = options.device == "cuda"
    if on_cuda and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no CUDA card here")
    if on_cuda and options.mode is not None:
        parser.error("--mode is about the CPU's allocator")
    options.mode = "cuda" if on_cuda else options.mode or "both"
    options.method = options.method or ("ring" if on_cuda else "rounds")
    rounds = options.rounds or (ring.ROUNDS if on_cuda else Effort().rounds)
    budget = Effort().budget if options.budget is None else options.budget
    # Without a budget nothing is measured, only tried out: short rounds will do.
    round_s = Effort().round_s if budget > 0 else 0.0
    options.effort = Effort(rounds, budget, round_s)
    selected = options.shapes or options.dtypes or options.op
    default = "times" if selected else QUICK_MEASURES if options.quick else ",".join(MEASURES)
    options.measures = options.measures or default.split(",")
    if "times" not in options.measures and (options.csv or options.plot):
        parser.error("--csv and --plot are of the times, which --measures leaves out")
    options.cases = cases_of(options)
    options.directions = options.directions or list(DIRECTIONS)
    options.providers = options.providers or list(PROVIDERS)
    return options


def cases_of(options: argparse.Namespace) -> list[Any]:
    if options.shapes:
        dtypes = options.dtypes or ["float32", "bfloat16", "float16"]
        ops = options.op or ["rms_norm"]
        return [
            make_case(shape, dtype, op, options.one_scale)
            for op in ops
            for dtype in dtypes
            for shape in options.shapes
        ]
    cases = quick_cases(options.device) if options.quick else default_cases(options.device)
    return [
        case
        for case in cases
        if case.op in (options.op or OPS) and case.dtype in (options.dtypes or DTYPES)
    ]


def available(options: argparse.Namespace) -> tuple[list[str], dict[str, str]]:
    """The providers that can be measured here, and why the others cannot."""
    reasons = {
        name: unavailable(PROVIDERS[name], options.device)
        for name in options.providers
        if name not in ROOFS
    }
    skipped = {name: reason for name, reason in reasons.items() if reason}
    for name, reason in skipped.items():
        print(f"skipped: {name}, {reason}")
    return [name for name in reasons if name not in skipped], skipped


def run_times(
    options: argparse.Namespace, plan: Plan, threads: int, runs: list[dict[str, Any]]
) -> None:
    """Measure all cases in this process, and print them as they come; a run joins `runs`."""
    mode = options.mode
    run: dict[str, Any] = {
        **{"device": options.device, "mode": mode, "method": options.method},
        **{"threads": threads, "allocator": allocator(mode), "cases": []},
    }
    if options.device == "cuda" or options.method == "ring":
        run["copy_bandwidth"] = ring.copy_bandwidth(options.device)
    runs.append(run)
    roof = tables.roof_of(mode)
    print(
        f"\n{mode} mode: {threads} threads, {cpu.get_level()} kernels, allocator: "
        f"{run['allocator']}\nall but the first two columns: times those of {roof}; lower is faster"
    )
    columns: list[tuple[str, str]] = []
    for case in options.cases:
        if not hasattr(coreai_torch.ops, case.op):
            print(f"skipped: {case.name}, coreai_torch.ops has no {case.op}")
            continue
        record = measure(case, plan)
        run["cases"].append(record)
        if not columns:
            columns = tables.columns_of(run)
            tables.print_row(tables.header(columns))
        tables.print_row(tables.row(record, columns, roof))
        for name, reason in record.get("skipped", {}).items():
            print(f"    not timed: {name}, {reason}")


def run_here(options: argparse.Namespace) -> dict[str, Any]:
    """Everything asked for, in this process and its mode, or what there was until Ctrl-C."""
    names, skipped = available(options)
    plan = Plan(names, tuple(options.directions), options.device, options.method, options.effort)
    result: dict[str, Any] = {
        "environment": environment(options.device),
        "providers": {name: PROVIDERS[name].about for name in names},
        "skipped": skipped,
        "runs": [],
    }
    try:
        measure_into(result, options, plan)
    except KeyboardInterrupt:
        print("interrupted: what was measured before is kept")
    return result


def measure_into(result: dict[str, Any], options: argparse.Namespace, plan: Plan) -> None:
    if "times" in options.measures:
        for threads in options.threads or [torch.get_num_threads()]:
            torch.set_num_threads(threads)
            run_times(options, plan, threads, result["runs"])
    others = {
        "host": lambda: overheads.host_times(plan),
        "memory": lambda: overheads.memory_use(plan),
        "models": lambda: models.model_times(plan),
        "cold": lambda: scaling.cold(plan),
        "rows": lambda: scaling.by_rows(plan),
        "threads": lambda: scaling.by_threads(plan, scaling.thread_counts()),
        "levels": lambda: scaling.by_levels(plan, cpu.supported_levels()),
    }
    if options.device == "cuda":
        del others["cold"], others["threads"], others["levels"]
    for name, measured in others.items():
        if name in options.measures:
            print(f"measuring: {name}", flush=True)
            where = {"mode": options.mode, "threads": torch.get_num_threads()}
            result[name] = where | {"records": measured()}


def run_both_modes(options: argparse.Namespace, arguments: Sequence[str]) -> dict[str, Any]:
    """Each mode in a process of its own, as the allocator is set up once for a process."""
    mine = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for output in OUTPUTS:
        mine.add_argument(f"--{output}")
    _, theirs = mine.parse_known_args(arguments)
    merged: dict[str, Any] = {}
    for mode in ("default", "warm"):
        measures = [name for name in options.measures if mode in MEASURES[name]]
        if not measures:
            continue
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "result.json"
            own = ["--mode", mode, "--measures", ",".join(measures), "--json", str(path)]
            # They come last, so that they replace those given here.
            command = [sys.executable, "-m", __package__, *theirs, *own]
            returned = subprocess.run(command, cwd=Path(__file__).parents[1]).returncode
            if not path.exists():
                sys.exit(returned or 1)
            one = json.loads(path.read_text())
        runs = merged.get("runs", []) + one["runs"]
        merged = one | merged | {"runs": runs}
    return merged


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse_arguments(arguments)
    for path in (options.json, options.csv, options.plot):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    if options.mode == "both":
        result = run_both_modes(options, arguments)
    else:
        if options.mode == "warm":
            enter_warm_mode()
        warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")
        result = run_here(options)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
        print(f"wrote {options.json}")
    if options.csv:
        tables.write_csv(result, options.csv)
        print(f"wrote {options.csv}")
    if options.plot:
        plot.write_bandwidth(result["runs"][-1], options.plot)
        print(f"wrote {options.plot}")
    failed = [
        f"{case['name']}: {case['failed']}"
        for run in result["runs"]
        for case in run["cases"]
        if "failed" in case
    ]
    for line in failed:
        print(f"wrong result, not timed: {line}", file=sys.stderr)
    return 1 if failed else 0
