"""torch.compile of RMSNorm and its neighbours: the fused kernels beside the compiler's own code.

What `coreai_torch.set_compile_mode("auto")` does is decided on these figures, in
`_decomposes_by_measurement` of coreai_torch/_compile_mode.py. The kernel is made for the norm; the
compiler can fuse the norm with what stands before and after it, and then moves less memory.

Prints microseconds for each pattern, shape and dtype under either mode, and their quotients, which
are above 1 where the compiler's code is the faster one.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no worker processes beside the timing

import torch
import torch.nn.functional as F
from torch import Tensor

import coreai_torch

from .cases import DTYPES, EPS
from .environment import environment
from .timing import Effort, take_turns

DIRECTIONS = ("forward", "forward+backward")
SHAPES = ((1, 4096), (64, 4096), (2048, 1024), (4096, 4096), (32768, 128), (2048, 16384))
CALLS_PER_SYNC = 20  # on a GPU, where calls are put into a queue
MODES = {"kernel": coreai_torch.ops.rms_norm, "decompose": coreai_torch.reference.rms_norm}

Norm = Callable[[Tensor, Tensor, float], Tensor]


def alone(norm: Norm, x: Tensor, other: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    return (norm(x, scale, EPS),)


def add_before(norm: Norm, x: Tensor, other: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    """As between the layers of a transformer, where the sum is needed again."""
    total = x + other
    return norm(total, scale, EPS), total


def gate_after(norm: Norm, x: Tensor, other: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    return (norm(x, scale, EPS) * F.silu(other),)


def cast_after(norm: Norm, x: Tensor, other: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    """From float32 to bfloat16, or from 16 bits to float32."""
    return (norm(x, scale, EPS).to(torch.bfloat16 if x.dtype == torch.float32 else torch.float32),)


PATTERNS = (alone, add_before, gate_after, cast_after)


def forward_backward(call: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> None:
    outputs = call(*inputs)
    used = [t for t in inputs if t.requires_grad]
    grads = [torch.ones_like(y) for y in outputs]
    torch.autograd.grad(outputs, used, grads, allow_unused=True)


def deviation(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> float:
    """The largest difference, relative to the largest element."""
    pairs = list(zip(ours, theirs, strict=True))
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def measure(
    pattern: Any, shape: tuple[int, int], dtype: str, options: argparse.Namespace
) -> dict[str, Any]:
    """The record of a case, median microseconds by direction and mode."""
    torch.compiler.reset()
    input_dtype, scale_dtype = DTYPES[dtype]
    x, other = (torch.randn(shape, device=options.device).to(input_dtype) for _ in range(2))
    scale = torch.randn(shape[-1], device=options.device).to(scale_dtype)
    inference, training = (x, other, scale), [t.clone().requires_grad_() for t in (x, other, scale)]
    compiled = torch.compile(pattern, dynamic=False, fullgraph=True)
    calls = {
        mode: lambda *inputs, norm=norm: compiled(norm, *inputs) for mode, norm in MODES.items()
    }
    with torch.no_grad():
        results = {mode: call(*inference) for mode, call in calls.items()}
    difference = deviation(results["kernel"], results["decompose"])
    coarsest = max(torch.finfo(t.dtype).eps for t in (x, *results["kernel"]))
    if not difference <= 4 * coarsest:  # also for NaN
        raise SystemExit(f"{pattern.__name__} {shape} {dtype}: the modes differ by {difference}")

    on_gpu = options.device == "cuda"
    repeats = CALLS_PER_SYNC if on_gpu else 1

    def repeated(run: Callable[[], object]) -> Callable[[], object]:
        def runs() -> None:
            for _ in range(repeats):
                run()
            torch.cuda.synchronize()

        return runs if on_gpu else run

    timed = {}
    for mode, call in calls.items():
        timed["forward", mode] = repeated(lambda call=call: call(*inference))
        timed["forward+backward", mode] = repeated(
            lambda call=call: forward_backward(call, *training)
        )
    timings = take_turns(timed, options.effort)
    return {
        "pattern": pattern.__name__,
        "shape": list(shape),
        "dtype": dtype,
        "contended": timings.contended,
        "us": {
            direction: {
                mode: round(median(timings.seconds[direction, mode]) / repeats * 1e6, 3)
                for mode in MODES
            }
            for direction in DIRECTIONS
        },
    }


def quotient(record: dict[str, Any], direction: str) -> float:
    times = record["us"][direction]
    return float(times["kernel"] / times["decompose"])


def print_record(record: dict[str, Any]) -> None:
    name = f"{record['pattern']:12}{record['dtype']:10}{'x'.join(map(str, record['shape'])):12}"
    cells = [f"{record['us'][direction][mode]:11.1f}" for direction in DIRECTIONS for mode in MODES]
    quotients = [f"{quotient(record, direction):7.2f}" for direction in DIRECTIONS]
    note = "  contended" if record["contended"] else ""
    print(name, *cells[:2], quotients[0], *cells[2:], quotients[1] + note, flush=True)


def print_summary(records: list[dict[str, Any]]) -> None:
    """Geometric means of the quotients, over the shapes."""
    print("\ngeometric mean of kernel/decompose over the shapes: forward, forward+backward")
    for pattern in PATTERNS:
        for dtype in dict.fromkeys(record["dtype"] for record in records):
            chosen = [
                record
                for record in records
                if (record["pattern"], record["dtype"]) == (pattern.__name__, dtype)
            ]
            means = [
                math.exp(sum(math.log(quotient(r, direction)) for r in chosen) / len(chosen))
                for direction in DIRECTIONS
            ]
            print(f"{pattern.__name__:12}{dtype:10}" + "".join(f"{mean:7.2f}" for mean in means))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compile_modes", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shapes", help="such as 64x4096,2048x1024; default: a selection")
    parser.add_argument("--dtypes", default="float32,bfloat16,mixed", help=f"of {','.join(DTYPES)}")
    default = Effort()
    parser.add_argument("--rounds", type=int, default=default.rounds, help="per case, at most")
    parser.add_argument("--budget", type=float, default=default.budget, help="seconds per case")
    parser.add_argument("--json", type=Path, help="write everything to this file")
    options = parser.parse_args(arguments)
    round_s = default.round_s if options.budget > 0 else 0.0  # without a budget: only a trial
    options.effort = Effort(options.rounds, options.budget, round_s)
    shapes = SHAPES
    if options.shapes:
        shapes = tuple(tuple(map(int, shape.split("x"))) for shape in options.shapes.split(","))
    dtypes = options.dtypes.split(",")
    if unknown := set(dtypes) - set(DTYPES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(DTYPES)}")

    coreai_torch.set_compile_mode("kernel")
    print("µs: forward kernel, decompose, quotient; forward+backward kernel, decompose, quotient")
    records = []
    for pattern in PATTERNS:
        for dtype in dtypes:
            for shape in shapes:
                records.append(measure(pattern, shape, dtype, options))
                print_record(records[-1])
    print_summary(records)
    if options.json:
        result = {"environment": environment(), "device": options.device, "cases": records}
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
