"""RMSNorm on the CPU: the fused op beside PyTorch's own, torch.compile and plain copies.

Everything of a case is measured in one process and in turns, because only figures that were taken
side by side compare. README.md in this folder says how to run it and how to read the result.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no worker processes beside the timing

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import coreai_torch
from coreai_torch.backends import cpu

EPS = 1e-5
DIRECTIONS = ("forward", "forward+backward")
PROVIDERS = ("copy_", "clone", "ours", "reference", "torch", "compile")
ROOFS = ("copy_", "clone")  # they move memory only; every table divides by one of them

# With these, glibc keeps freed memory in the process. Without, each large output is mapped afresh
# and the page faults cost as much as the kernel.
WARM_TUNABLES = "glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=8589934592"

MIN_TIMING_S = 0.003  # a timing lasts at least this,
MIN_ROUND_S = 0.2  # and a round this, or clock ticks of 10 ms could not show 5 % of the machine
CONTENDED = 0.05  # share of the machine that others may use during a round
MIN_ROUNDS = 3  # also where the time budget of a case is spent
REPEATS = 2  # repeats of contended rounds, per round asked for

SHAPES = ((64, 4096), (2048, 1024), (4096, 4096), (8192, 4096), (32768, 128), (2048, 16384))
PER_HEAD = (2, 8, 512, 64)
ODD = (4096, 4095)
ONE_ROW = (1, 4096)
DTYPES = {
    "float32": (torch.float32, torch.float32),  # of the input, of the scale
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
    "mixed": (torch.bfloat16, torch.float32),
}


@dataclass(frozen=True)
class Case:
    """A shape and a key of DTYPES; the shape decides what is measured.

    Four dimensions (batch, heads, length, dim) are a transposed view, as attention has it, with a
    scale per head. A single row measures the modules, as that is where the host's time shows.
    """

    shape: tuple[int, ...]
    dtype: str

    @property
    def kind(self) -> str:
        if len(self.shape) == 4:
            return "per-head transposed"
        return "module" if self.shape[0] == 1 else "plain"

    @property
    def name(self) -> str:
        kind = "" if self.kind == "plain" else f" {self.kind}"
        return f"{self.dtype} {'x'.join(map(str, self.shape))}{kind}"


class Inputs(NamedTuple):
    input: Tensor
    scale: Tensor
    grad_output: Tensor


class Subject(NamedTuple):
    """One implementation: what maps the input to the output, and the scale it has gradients for."""

    call: Callable[[Tensor], Tensor]
    scale: Tensor


def default_cases() -> list[Case]:
    names = ("float32", "bfloat16", "float16")
    cases = [Case(shape, name) for name in names for shape in (*SHAPES, ODD, PER_HEAD, ONE_ROW)]
    return [*cases, Case((4096, 4096), "mixed")]


def quick_cases() -> list[Case]:
    return [
        Case((64, 4096), "float32"),
        Case((2048, 1024), "bfloat16"),
        Case((4096, 4096), "float32"),
        Case(PER_HEAD, "float32"),
        Case(ONE_ROW, "float32"),
    ]


def make_inputs(case: Case) -> Inputs:
    dtype, scale_dtype = DTYPES[case.dtype]
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    if case.kind == "per-head transposed":
        batch, heads, length, dim = case.shape
        x = normal(batch, length, heads, dim).to(dtype).transpose(1, 2)
        scale = normal(heads, 1, dim)
        dy = normal(batch, length, heads, dim).to(dtype).transpose(1, 2)
    else:
        x = normal(*case.shape).to(dtype)
        scale = normal(case.shape[-1])
        dy = normal(*case.shape).to(dtype)
    scale = scale.mul_(0.2).add_(1).to(scale_dtype)
    return Inputs(x.requires_grad_(), scale.requires_grad_(), dy)


def make_subjects(case: Case, inputs: Inputs, names: list[str]) -> dict[str, Subject]:
    """The implementations that compute; each as its user would call it."""
    scale = inputs.scale
    dim = case.shape[-1]
    reference, ours = coreai_torch.reference.rms_norm, coreai_torch.ops.rms_norm
    compiled = torch.compile(reference, dynamic=False)
    subjects = {
        "ours": Subject(lambda x: ours(x, scale, EPS), scale),
        "reference": Subject(lambda x: reference(x, scale, EPS), scale),
        "torch": Subject(lambda x: F.rms_norm(x, (dim,), scale, EPS), scale),
        "compile": Subject(lambda x: compiled(x, scale, EPS), scale),
    }
    if case.kind == "per-head transposed":  # F.rms_norm has no scale per head
        subjects["torch"] = Subject(lambda x: F.rms_norm(x, (dim,), None, EPS) * scale, scale)
    elif case.kind == "module":
        for name, module in (
            ("ours", coreai_torch.composite_ops.RMSNorm(dim, EPS, dtype=scale.dtype)),
            ("torch", nn.RMSNorm(dim, EPS, dtype=scale.dtype)),
        ):
            weight = module.weight
            weight.data.copy_(scale.detach())
            subjects[name] = Subject(module, weight)
    return {name: subject for name, subject in subjects.items() if name in names}


def forward_backward(subject: Subject, inputs: Inputs) -> tuple[Tensor, Tensor]:
    y = subject.call(inputs.input)
    dx, dscale = torch.autograd.grad(y, (inputs.input, subject.scale), inputs.grad_output)
    return dx, dscale


def make_timed(
    case: Case, inputs: Inputs, subjects: dict[str, Subject], names: list[str]
) -> dict[tuple[str, str], Callable[[], object]]:
    """What a round runs, by direction and provider."""
    x = inputs.input.detach()  # as in inference: forward must not be slowed by requires_grad
    target = torch.empty_like(x)
    timed: dict[tuple[str, str], Callable[[], object]] = {
        ("forward", "copy_"): lambda: target.copy_(x),
        ("forward", "clone"): lambda: x.clone(),
    }
    timed = {key: run for key, run in timed.items() if key[1] in names}
    for name, subject in subjects.items():
        timed["forward", name] = lambda call=subject.call: call(x)  # type: ignore[misc]
    for name, subject in subjects.items():
        timed["forward+backward", name] = lambda s=subject: forward_backward(s, inputs)  # type: ignore[misc]
    return timed


def bytes_moved(inputs: Inputs, direction: str) -> int:
    """What an ideal kernel moves; every tensor as large as the input is read or written once.

    The scale counts once: its second read and its gradient are less than a row of the input.
    """
    x = inputs.input
    tensor = x.numel() * x.element_size()
    forward = tensor + tensor + inputs.scale.numel() * inputs.scale.element_size()  # x, y, scale
    return forward if direction == "forward" else forward + 3 * tensor  # x, dy, dx


# Correctness


def exact(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Output and gradients in float64, by the closed formula, in blocks that stay in the cache."""
    x, scale, dy = (tensor.detach() for tensor in inputs)
    scale = scale.double()
    y, dx = (torch.empty(x.shape, dtype=torch.float64) for _ in range(2))
    dscale = torch.zeros(scale.shape, dtype=torch.float64)
    for part in blocks(x):
        wide, grad = x[part].double(), dy[part].double()
        inverse = wide.square().mean(-1, keepdim=True).add(EPS).rsqrt()
        normalized = wide * inverse
        y[part] = normalized * scale
        dscale += (grad * normalized).sum_to_size(scale.shape)
        grad *= scale
        dx[part] = inverse * (grad - normalized * (grad * normalized).mean(-1, keepdim=True))
    return y, dx, dscale


def blocks(x: Tensor) -> Iterator[slice]:
    """Slices of the first dimension, of about 64 Ki elements each."""
    step = max(1, 2**16 * x.shape[0] // x.numel())
    return (slice(start, start + step) for start in range(0, x.shape[0], step))


def error(got: Tensor, want: Tensor) -> float:
    """The largest deviation, relative to the largest element; NaN if there is one in `got`."""
    worst = torch.stack([(got[part] - want[part]).abs().max() for part in blocks(want)]).max()
    return float(worst / want.abs().max())


def verify(inputs: Inputs, subjects: dict[str, Subject]) -> tuple[dict[str, dict[str, float]], str]:
    """Errors of every implementation, and what is wrong with ours ("" if nothing).

    Ours may deviate from float64 by twice what the reference does, plus one rounding.
    """
    wanted = exact(inputs)
    reference = coreai_torch.reference.rms_norm
    with_reference = subjects | {
        "reference": Subject(lambda x: reference(x, inputs.scale, EPS), inputs.scale)
    }
    errors: dict[str, dict[str, float]] = {}
    for name, subject in with_reference.items():
        with torch.no_grad():
            y = subject.call(inputs.input.detach())
        got = (y, *forward_backward(subject, inputs))
        errors[name] = {
            key: error(ours, want)
            for key, ours, want in zip(("y", "dx", "dscale"), got, wanted, strict=True)
        }
    wrong = []
    for key, value in errors.get("ours", {}).items():
        dtype = inputs.scale.dtype if key == "dscale" else inputs.input.dtype
        limit = 2 * errors["reference"][key] + torch.finfo(dtype).eps
        if not value <= limit:  # also for NaN
            wrong.append(f"{key} is off by {value:.2e}, more than {limit:.2e}")
    return errors, "; ".join(wrong)


# Timing


def busy_seconds() -> float | None:
    """Processor time used on the whole machine since it started; None where the OS has no such."""
    try:
        with open("/proc/stat") as stat:
            user, nice, system, _, _, irq, softirq, steal = map(int, stat.readline().split()[1:9])
    except (OSError, ValueError):
        return None
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


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


def seconds(run: Callable[[], object], times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        run()
    return time.perf_counter() - start


def iterations(run: Callable[[], object], target: float) -> int:
    """How often to run for a timing of `target` seconds; warms up on the way."""
    seconds(run, 2)
    times = 1
    while (taken := seconds(run, times)) < target / 4:
        times *= 2
    return max(1, math.ceil(target / taken * times))


class Timings(NamedTuple):
    seconds: dict[tuple[str, str], list[float]]  # per call, one for each round
    rounds: int
    dropped: int  # contended rounds that were repeated
    contended: int  # contended rounds among those kept, when the repeats had run out


def time_case(
    timed: dict[tuple[str, str], Callable[[], object]], rounds: int, budget: float
) -> Timings:
    """Rounds that run everything in turn, each starting one place later than the one before.

    After the repeats are used up, the least contended rounds are taken.
    """
    keys = list(timed)
    target = max(MIN_TIMING_S, MIN_ROUND_S / len(keys))
    times = {key: iterations(timed[key], target) for key in keys}
    taken: list[tuple[float, dict[tuple[str, str], float]]] = []
    clean = 0
    start = time.perf_counter()
    for index in range(rounds * (1 + REPEATS)):
        shift = index % len(keys)
        result = {}
        with Contention() as contention:
            for key in keys[shift:] + keys[:shift]:
                if times[key] > 2:
                    timed[key]()  # bring in the data that the one before has displaced
                result[key] = seconds(timed[key], times[key]) / times[key]
        taken.append((contention.share, result))
        clean += contention.share <= CONTENDED
        spent = time.perf_counter() - start
        if clean >= rounds or (clean >= min(rounds, MIN_ROUNDS) and spent > budget):
            break
        if spent > budget * REPEATS and index + 1 >= MIN_ROUNDS:
            break
    if clean >= min(rounds, MIN_ROUNDS):
        kept = [each for each in taken if each[0] <= CONTENDED]
    else:
        kept = sorted(taken, key=lambda each: each[0])[: min(rounds, MIN_ROUNDS)]
    per_key = {key: [result[key] for _, result in kept] for key in keys}
    contended = sum(share > CONTENDED for share, _ in kept)
    return Timings(per_key, len(kept), len(taken) - len(kept), contended)


def summary(samples: list[float], moved: int) -> dict[str, float]:
    middle = median(samples)
    low, _, high = quantiles(samples, method="inclusive") if len(samples) > 1 else samples * 3
    return {
        "median_us": round(middle * 1e6, 3),
        "q1_us": round(low * 1e6, 3),
        "q3_us": round(high * 1e6, 3),
        "gb_per_s": round(moved / middle / 1e9, 3),
    }


def measure(case: Case, names: list[str], rounds: int, budget: float) -> dict[str, Any]:
    """The record of a case: verified first, then timed."""
    torch.compiler.reset()  # or the shapes of earlier cases use up the limit of recompilations
    inputs = make_inputs(case)
    subjects = make_subjects(case, inputs, names)
    x = inputs.input
    record: dict[str, Any] = {
        "name": case.name,
        "kind": case.kind,
        "shape": list(case.shape),
        "dtype": case.dtype,
        "scale_shape": list(inputs.scale.shape),
        "output_bytes": x.numel() * x.element_size(),
        "bytes": {direction: bytes_moved(inputs, direction) for direction in DIRECTIONS},
    }
    record["errors"], wrong = verify(inputs, subjects)
    if wrong:  # a wrong result has no speed
        return record | {"failed": wrong}
    timings = time_case(make_timed(case, inputs, subjects, names), rounds, budget)
    record |= timings._asdict()
    del record["seconds"]
    times: dict[str, dict[str, dict[str, float]]] = {direction: {} for direction in DIRECTIONS}
    for (direction, name), samples in timings.seconds.items():
        moved = 2 * record["output_bytes"] if name in ROOFS else record["bytes"][direction]
        times[direction][name] = summary(samples, moved)
    return record | {"times": times, "ratios": ratios(times)}


def ratios(times: dict[str, dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Times of all by the times of the roofs (the forward's, for both directions) and of ours."""
    result: dict[str, dict[str, float]] = {}
    for direction, by_name in times.items():
        bases = {name: times["forward"].get(name) for name in ROOFS} | {"ours": by_name.get("ours")}
        result[direction] = {
            f"{name}/{base_name}": round(value["median_us"] / base["median_us"], 4)
            for base_name, base in bases.items()
            if base is not None
            for name, value in by_name.items()
            if name != base_name
        }
    return result


# The run


def read_or(path: str | Path, default: str = "") -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return default


def environment() -> dict[str, Any]:
    """Where and with what the figures were taken."""
    models = [
        line.split(":", 1)[1].strip()
        for line in read_or("/proc/cpuinfo").splitlines()
        if line.startswith("model name")
    ]
    caches = [
        f"L{read_or(index / 'level')} {read_or(index / 'type')} {read_or(index / 'size')}"
        for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"))
    ]

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError):
            return None

    commit = git("rev-parse", "HEAD")
    return {
        "processor": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "caches": caches,
        "system": platform.platform(),
        "kernel_level": cpu.get_level(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit.strip() if commit else None,
        "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


HEADER = (
    "case",
    *("copy_ µs", "clone/copy_"),
    *("ours fwd", "torch", "compile"),
    *("ours F+B", "torch", "compile"),
)


def table_row(record: dict[str, Any], roof: str) -> list[str]:
    """A row under HEADER: all but the second column are times divided by the roof's."""
    if "failed" in record:
        return [record["name"], "WRONG RESULT", *[""] * 7]
    forward = record["times"]["forward"]
    ratio = record["ratios"]

    def cell(direction: str, key: str) -> str:
        value = ratio[direction].get(key)
        return "" if value is None else f"{value:.2f}"

    copy = f"{forward['copy_']['median_us']:.1f}" if "copy_" in forward else ""
    return [record["name"], copy, cell("forward", "clone/copy_")] + [
        cell(direction, f"{name}/{roof}")
        for direction in DIRECTIONS
        for name in ("ours", "torch", "compile")
    ]


def roof_of(mode: str) -> str:
    """What to divide by: `clone` pays for fresh memory as every op does in the default mode."""
    return "copy_" if mode == "warm" else "clone"


def print_row(cells: list[str] | tuple[str, ...]) -> None:
    print(f"{cells[0]:40}" + "".join(f"{cell:>13}" for cell in cells[1:]), flush=True)


def run_mode(options: argparse.Namespace) -> dict[str, Any]:
    """Measure all cases in this process and print them as they come."""
    if options.threads:
        torch.set_num_threads(options.threads)
    mode, threads = options.mode, torch.get_num_threads()
    keeps = f"kept by GLIBC_TUNABLES={WARM_TUNABLES}"
    allocator = f"freed memory is {keeps}" if mode == "warm" else "as the user has it"
    print(
        f"\n{mode} mode: {threads} threads, {cpu.get_level()} kernels, allocator: {allocator}\n"
        f"fwd and F+B: times those of {roof_of(mode)}; lower is faster"
    )
    print_row(HEADER)
    records = []
    for case in options.cases:
        record = measure(case, options.providers, options.rounds, options.budget)
        records.append(record)
        print_row(table_row(record, roof_of(mode)))
    return {"mode": mode, "allocator": allocator, "threads": threads, "cases": records}


def enter_warm_mode() -> None:
    """Start this program anew with the tunables, which glibc reads once, unless they are set."""
    if platform.libc_ver()[0] != "glibc":
        sys.exit("The warm mode needs glibc; use --mode default.")
    present = os.environ.get("GLIBC_TUNABLES", "")
    if WARM_TUNABLES in present:
        return
    tunables = f"{present}:{WARM_TUNABLES}" if present else WARM_TUNABLES
    environ = os.environ | {"GLIBC_TUNABLES": tunables}
    os.execve(sys.executable, [sys.executable, *sys.argv], environ)


def run_both_modes(arguments: list[str]) -> dict[str, Any]:
    """Each mode in a process of its own, as the allocator is set up once for a process."""
    merged: dict[str, Any] = {}
    for mode in ("default", "warm"):
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder) / "result.json"
            command = [sys.executable, __file__, *arguments, "--mode", mode, "--json", str(result)]
            returned = subprocess.run(command).returncode
            if not result.exists():
                sys.exit(returned or 1)
            one = json.loads(result.read_text())
        merged = merged or {"environment": one["environment"], "runs": []}
        merged["runs"] += one["runs"]
    return merged


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--shapes", help="such as 64x4096,2x8x512x64; four numbers: transposed; one row: modules"
    )
    parser.add_argument("--dtypes", help=f"of {','.join(DTYPES)}")
    parser.add_argument(
        "--providers", help=f"of {','.join(PROVIDERS)}", default=",".join(PROVIDERS)
    )
    parser.add_argument("--threads", type=int, help="default: PyTorch's choice")
    parser.add_argument("--mode", choices=("default", "warm"), help="default: one after the other")
    parser.add_argument("--rounds", type=int, default=9, help="per case; fewer where it is large")
    parser.add_argument("--budget", type=float, default=2.5, help="seconds of timing per case")
    parser.add_argument("--quick", action="store_true", help="a few cases")
    parser.add_argument("--json", type=Path, help="write everything to this file")
    options = parser.parse_args()
    cases = quick_cases() if options.quick else default_cases()
    dtypes = options.dtypes.split(",") if options.dtypes else ["float32", "bfloat16", "float16"]
    if options.shapes:
        shapes = [tuple(map(int, shape.split("x"))) for shape in options.shapes.split(",")]
        cases = [Case(shape, dtype) for dtype in dtypes for shape in shapes]
    elif options.dtypes:
        cases = [case for case in cases if case.dtype in dtypes]
    options.cases = cases
    options.providers = options.providers.split(",")
    for given, known in ((dtypes, list(DTYPES)), (options.providers, list(PROVIDERS))):
        if unknown := set(given) - set(known):
            parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    if options.shapes and not {len(case.shape) for case in cases} <= {2, 4}:
        parser.error("a shape has two or four numbers")
    if options.rounds < 1:
        parser.error("--rounds is at least 1")
    return options


def main() -> int:
    options = parse_arguments()
    if options.mode is None:
        # --json comes last for the children, so that theirs replaces the one given here.
        result = run_both_modes(sys.argv[1:])
    else:
        if options.mode == "warm":
            enter_warm_mode()
        warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")
        result = {"environment": environment(), "runs": [run_mode(options)]}
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    failed = [
        f"{case['name']}: {case['failed']}"
        for run in result["runs"]
        for case in run["cases"]
        if "failed" in case
    ]
    for line in failed:
        print(f"wrong result, not timed: {line}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
