"""RMSNorm on a CUDA card: the fused op beside PyTorch's own, torch.compile and other libraries.

Device time is that of CUDA graphs that hold many calls, so that launches cost next to nothing; the
host's time for a call is measured apart. Calls go around a ring of inputs that the L2 cache cannot
hold. Everything of a case is measured in turns, because only figures taken side by side compare,
and is checked against float64 first.

    python benchmarks/bench_rms_norm_cuda.py                       # all shapes; some minutes
    python benchmarks/bench_rms_norm_cuda.py --quick
    python benchmarks/bench_rms_norm_cuda.py --shapes 32768x128 2048x65536 --dtypes bfloat16
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch._functorch.config
import torch.nn.functional as F
from bench_rms_norm import environment, error
from report import table
from torch import Tensor

import coreai_torch
from coreai_torch import _C

EPS = 1e-5
DTYPES = {
    "float32": (torch.float32, torch.float32),  # of the input, of the scale
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "mixed": (torch.bfloat16, torch.float32),
}
DIMS = (64, 128, 512, 1024, 2048, 4096, 4095, 5120, 8192, 16384, 65536)
ROWS = (1, 64, 2048, 32768)
HEADS = (4, 32, 2048, 128)  # batch, heads, length, dim: queries of a transformer, transposed
RING_BYTES = 512 * 2**20  # the ring of inputs: several times any card's L2 cache
MOST_BYTES = 8 * 2**30  # of one tensor
ROUNDS = 15

# Shares of the bandwidth that a large copy has, by the project's targets for at least 64 MB.
LARGE = 64e6
FORWARD_SHARE, NARROW_FORWARD_SHARE, BACKWARD_SHARE = 0.92, 0.85, 0.88

Norm = Callable[[Tensor, Tensor], Tensor]


def providers() -> dict[str, Norm]:
    """What computes the norm of (input, scale); other libraries where they are installed."""
    found: dict[str, Norm] = {
        "ours": lambda x, w: coreai_torch.ops.rms_norm(x, w, EPS),
        "torch": lambda x, w: F.rms_norm(x, (x.shape[-1],), w, EPS),
        "compile": torch.compile(
            lambda x, w: coreai_torch.reference.rms_norm(x, w, EPS), dynamic=False
        ),
    }
    try:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        found["liger"] = lambda x, w: LigerRMSNormFunction.apply(x, w, EPS, 0.0, "llama", False)
    except ImportError:
        print("liger: not installed, skipped")
    try:
        from quack import rmsnorm

        found["quack"] = lambda x, w: rmsnorm(x, w, eps=EPS)
    except ImportError:
        print("quack: not installed, skipped")
    return found


class Case:
    """A shape and a pair of dtypes, with a ring of inputs."""

    def __init__(self, shape: tuple[int, ...], dtype: str, device: str, ring_bytes: int) -> None:
        self.shape, self.dtype = shape, dtype
        self.name = f"{dtype} {'x'.join(map(str, shape))}"
        input_dtype, scale_dtype = DTYPES[dtype]
        self.tensor_bytes = math.prod(shape) * input_dtype.itemsize
        sets = max(1, min(16, math.ceil(ring_bytes / (3 * self.tensor_bytes))))
        self.scale = (torch.randn(shape[-1], device=device) * 0.2 + 1).to(scale_dtype)
        self.scale.requires_grad_()

        def tensor() -> Tensor:
            if len(shape) == 2:
                return torch.randn(shape, device=device).to(input_dtype)
            batch, heads, length, dim = shape
            return (
                torch.randn(batch, length, heads, dim, device=device).to(input_dtype)
            ).transpose(1, 2)

        self.inputs = [tensor().requires_grad_() for _ in range(sets)]
        self.grads = [tensor() for _ in range(sets)]

    def bytes(self, direction: str) -> int:
        """What an ideal kernel moves: tensors as large as the input, each once."""
        return {"forward": 2, "backward": 3, "both": 5, "copy": 2}[direction] * self.tensor_bytes

    def verify(self, norm: Norm) -> dict[str, float]:
        """Largest errors against float64, relative to the largest element."""
        x, dy, w = self.inputs[0], self.grads[0], self.scale
        y = norm(x, w)
        dx, dw = torch.autograd.grad(y, (x, w), dy)
        wide, scale = x.detach().double(), w.detach().double()
        rstd = (wide.square().mean(-1, keepdim=True) + EPS).rsqrt()
        normalized, g = wide * rstd, dy.double() * scale
        exact_dx = rstd * (g - normalized * (g * normalized).mean(-1, keepdim=True))
        exact_dw = (dy.double() * normalized).flatten(0, -2).sum(0)
        return {
            "y": error(y.detach(), normalized * scale),
            "dx": error(dx, exact_dx),
            "dw": error(dw, exact_dw),
        }

    def runs(self, norm: Norm, direction: str) -> list[Callable[[], object]]:
        """A call for each set of the ring."""
        if direction == "forward":
            scale = self.scale.detach()
            return [functools.partial(norm, x.detach(), scale) for x in self.inputs]
        pairs = list(zip(self.inputs, self.grads, strict=True))
        if direction == "both":
            return [
                lambda x=x, dy=dy: torch.autograd.grad(norm(x, self.scale), (x, self.scale), dy)
                for x, dy in pairs
            ]
        outputs = [norm(x, self.scale) for x, _ in pairs]
        return [
            lambda y=y, x=x, dy=dy: torch.autograd.grad(y, (x, self.scale), dy, retain_graph=True)
            for y, (x, dy) in zip(outputs, pairs, strict=True)
        ]

    def copies(self) -> list[Callable[[], object]]:
        """A copy of each input."""
        detached = [x.detach() for x in self.inputs]
        return [functools.partial(torch.empty_like(x).copy_, x) for x in detached]


def device_timer(runs: list[Callable[[], object]], device: str) -> Callable[[], float]:
    """What measures the seconds of one call, on a CUDA card by a graph of them all.

    On the CPU it takes the host's clock: there it serves to try this program out.
    """
    if device == "cpu":

        def on_host() -> float:
            start = time.perf_counter()
            for run in runs:
                run()
            return (time.perf_counter() - start) / len(runs)

        return on_host

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for run in runs[:2]:
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    repeats = max(1, 32 // len(runs))
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            for run in runs:
                run()
    graph.replay()

    def on_device() -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / (repeats * len(runs))

    return on_device


def host_seconds(run: Callable[[], object], device: str, calls: int = 200) -> float:
    """The host's time for a call: how fast they can be queued."""
    samples = []
    for _ in range(5):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        samples.append((time.perf_counter() - start) / calls)
    return median(samples)


def measure(case: Case, norms: dict[str, Norm], device: str, rounds: int) -> dict[str, Any]:
    """Verified, then timed in turns."""
    record: dict[str, Any] = {
        "name": case.name,
        "shape": list(case.shape),
        "dtype": case.dtype,
        "tensor_bytes": case.tensor_bytes,
        "errors": {},
        "skipped": {},
    }
    timers = {("copy", "copy_"): device_timer(case.copies(), device)}
    for name, norm in norms.items():
        try:
            record["errors"][name] = case.verify(norm)
            for direction in ("forward", "backward", "both"):
                runs = case.runs(norm, direction)
                timers[direction, name] = device_timer(runs, device)
        except Exception as problem:  # of another library: this shape is not for it
            if name == "ours":
                raise
            record["skipped"][name] = str(problem).splitlines()[0][:200]
            timers = {key: timer for key, timer in timers.items() if key[1] != name}
    reference = case.verify(lambda x, w: coreai_torch.reference.rms_norm(x, w, EPS))
    for key, value in record["errors"]["ours"].items():
        limit = 2 * reference[key] + torch.finfo(DTYPES[case.dtype][0]).eps
        if not value <= limit:  # also for NaN; a wrong result has no speed
            raise AssertionError(f"{case.name}: {key} is off by {value:.2e}, limit {limit:.2e}")
    samples: dict[tuple[str, str], list[float]] = {key: [] for key in timers}
    for turn in range(rounds):
        keys = list(timers)
        for key in keys[turn % len(keys) :] + keys[: turn % len(keys)]:
            samples[key].append(timers[key]())
    record["times"] = {}
    for (direction, name), taken in samples.items():
        seconds = median(taken)
        record["times"].setdefault(direction, {})[name] = {
            "us": round(seconds * 1e6, 3),
            "least_us": round(min(taken) * 1e6, 3),
            "most_us": round(max(taken) * 1e6, 3),
            "gb_per_s": round(case.bytes(direction) / seconds / 1e9, 2),
        }
    return record


def card(device: str) -> dict[str, Any]:
    """Where the figures were taken."""
    record = environment()
    record["cuda_build"] = dict(_C.build_info())
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True)
        record["card"] = torch.cuda.get_device_name()
        record["driver"] = found.stdout.strip()
        record["cuda"] = torch.version.cuda
        record["multiprocessors"] = torch.cuda.get_device_properties(0).multi_processor_count
    return record


def copy_bandwidth(device: str) -> float:
    """Bytes per second, read and written, of a copy that no cache helps."""
    size = 2**31 if device == "cuda" else 2**24
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timer = device_timer([lambda: target.copy_(source)], device)
    return 2 * size / median(timer() for _ in range(9))


def report(result: dict[str, Any]) -> str:
    """Markdown: what is slower than others or misses a target comes first."""
    bandwidth = result["copy_bandwidth"]
    slower, missed, ratios, rows = [], [], [], []
    for record in result["cases"]:
        times = record["times"]
        cells = [record["name"]]
        for direction in ("forward", "backward", "both"):
            ours = times[direction]["ours"]
            share = ours["gb_per_s"] * 1e9 / bandwidth
            cells.append(f"{share:.0%}")
            for name, other in times[direction].items():
                if name == "ours":
                    continue
                speed_up = other["us"] / ours["us"]
                if speed_up < 1:
                    slower.append(f"{record['name']}, {direction}: {1 / speed_up:.2f} times {name}")
                if name == "torch" and direction == "both":
                    ratios.append(speed_up)
            others = (times[direction].get(n) for n in result["providers"] if n != "ours")
            cells += [f"{o['us'] / ours['us']:.2f}" if o else "" for o in others]
            narrow = record["shape"][-1] <= 512
            target = {
                "forward": NARROW_FORWARD_SHARE if narrow else FORWARD_SHARE,
                "backward": BACKWARD_SHARE,
            }.get(direction)
            if target and record["tensor_bytes"] >= LARGE and share < target:
                missed.append(f"{record['name']}, {direction}: {share:.0%}, target {target:.0%}")
        rows.append(cells)
    others = [name for name in result["providers"] if name != "ours"]
    header = ["case"]
    for direction in ("forward", "backward", "both"):
        header += [f"{direction}: share of copy", *(f"{name} / ours" for name in others)]
    where = result["environment"]
    lines = [f"# RMSNorm on {where.get('card', 'the CPU')}", ""]
    lines += ["Slower than another implementation:", "", *[f"- {s}" for s in slower or ["nowhere"]]]
    lines += ["", "Targets missed:", "", *[f"- {m}" for m in missed or ["none"]], ""]
    if ratios:
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        lines += [f"Forward and backward, geometric mean of speed-ups over torch: {mean:.2f}.", ""]
    host = result["host_us"]
    lines += ["Host time of a call, µs (1 row of 4096, bfloat16, forward and backward):", ""]
    lines += [", ".join(f"{name} {value:.1f}" for name, value in host.items()), ""]
    lines += [
        f"- copy bandwidth {bandwidth / 1e9:.0f} GB/s; driver {where.get('driver', '')}",
        f"- torch {where['torch']}, CUDA {where.get('cuda')}, Python {where['python']}",
        f"- {where['date']}, commit {where['commit']}{', changed' if where['dirty'] else ''}",
        "",
        "Shares count the bytes that an ideal kernel moves; other columns are times by ours.",
        "",
    ]
    return "\n".join([*lines, *table(tuple(header), rows, "l" + "r" * (len(header) - 1))]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try out")
    parser.add_argument("--shapes", nargs="+", help="for example 2048x4096")
    parser.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES), default=list(DTYPES))
    parser.add_argument("--quick", action="store_true", help="2048 rows, bfloat16, few rounds")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", type=Path, help="where to write the record; .md beside it")
    options = parser.parse_args()
    shapes = [(rows, dim) for dim in DIMS for rows in ROWS] + [HEADS]
    if options.quick:
        shapes, options.dtypes = [(2048, dim) for dim in DIMS], ["bfloat16"]
        options.rounds = min(options.rounds, 5)
    if options.shapes:
        shapes = [tuple(map(int, shape.split("x"))) for shape in options.shapes]

    # Backward is timed by running it again and again on one output.
    torch._functorch.config.donated_buffer = False
    norms = providers()
    ring_bytes = RING_BYTES if options.device == "cuda" else 2**20
    result: dict[str, Any] = {
        "environment": card(options.device),
        "providers": list(norms),
        "copy_bandwidth": copy_bandwidth(options.device),
        "host_us": {},
        "cases": [],
    }
    for dtype in options.dtypes:
        for shape in shapes:
            if math.prod(shape) * DTYPES[dtype][0].itemsize > MOST_BYTES:
                continue
            torch.compiler.reset()  # or the shapes of earlier cases use up the recompilations
            case = Case(shape, dtype, options.device, ring_bytes)
            record = measure(case, norms, options.device, options.rounds)
            result["cases"].append(record)
            shares = [
                f"{d} {record['times'][d]['ours']['gb_per_s'] * 1e9 / result['copy_bandwidth']:.0%}"
                for d in ("forward", "backward")
            ]
            print(case.name, *shares, flush=True)
    one_row = Case((1, 4096), "bfloat16", options.device, 1)
    for name, norm in norms.items():
        result["host_us"][name] = host_seconds(one_row.runs(norm, "both")[0], options.device) * 1e6
    text = report(result)
    print(text)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
        options.json.with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
