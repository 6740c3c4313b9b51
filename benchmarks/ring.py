"""Device times on a CUDA card: graphs of many calls that go around a ring of inputs.

A graph's launches cost next to nothing, and the L2 cache cannot hold the ring. On the CPU the same
program takes the host's clock, only to be tried out.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
from torch import Tensor

from .cases import Case, Inputs, make_inputs
from .providers import Subject, outputs_of

RING_BYTES = {"cuda": 512 * 2**20, "cpu": 2**20}  # several times any card's L2 cache
ROUNDS = 15
Timer = Callable[[], float]


@functools.cache
def capture_stream() -> torch.cuda.Stream:
    """Backward runs on its forward's stream, so that all is run, and captured, on this one."""
    return torch.cuda.Stream()


@contextlib.contextmanager
def aside(device: str) -> Iterator[None]:
    """Work is put on the stream that graphs are captured on, after what was queued before."""
    if device == "cpu":
        yield
        return
    stream = capture_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def ring_of(case: Case, device: str) -> list[Inputs]:
    """As many sets of inputs as fill the ring, with one scale."""
    tensors = 3 if case.op == "rms_norm" else 6
    sets = max(1, min(16, math.ceil(RING_BYTES[device] / (tensors * case.tensor_bytes))))
    ring = [make_inputs(case, device, seed) for seed in range(sets)]
    return [inputs._replace(scale=ring[0].scale) for inputs in ring]


def runs(ring: list[Inputs], subject: Subject, direction: str) -> list[Callable[[], object]]:
    """A call for each set of the ring; forward takes a subject for inference."""
    call, scale = subject.call, subject.scale
    if direction == "forward":
        return [functools.partial(call, *inputs.detached().tensors) for inputs in ring]

    def backward(inputs: Inputs, outputs: tuple[Tensor, ...] | None = None) -> object:
        retain = outputs is not None
        return torch.autograd.grad(
            outputs if retain else outputs_of(call(*inputs.tensors)),
            (*inputs.tensors, scale),
            inputs.grads,
            retain_graph=retain,
        )

    if direction == "forward+backward":
        return [functools.partial(backward, inputs) for inputs in ring]
    with aside(scale.device.type):
        return [functools.partial(backward, i, outputs_of(call(*i.tensors))) for i in ring]


def copies(ring: list[Inputs], name: str) -> list[Callable[[], object]]:
    detached = [inputs.input.detach() for inputs in ring]
    if name == "clone":
        return [x.clone for x in detached]
    return [functools.partial(torch.empty_like(x).copy_, x) for x in detached]


def timer(calls: list[Callable[[], object]], device: str) -> Timer:
    """What measures the seconds of one call, on a CUDA card by a graph of them all."""
    if device == "cpu":

        def on_host() -> float:
            start = time.perf_counter()
            for call in calls:
                call()
            return (time.perf_counter() - start) / len(calls)

        return on_host

    with aside(device):
        for call in calls[:2]:
            call()
    graph = torch.cuda.CUDAGraph()
    repeats = max(1, 32 // len(calls))
    with torch.cuda.graph(graph, stream=capture_stream()):
        for _ in range(repeats):
            for call in calls:
                call()
    graph.replay()

    def on_device() -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / (repeats * len(calls))

    return on_device


def take_turns(timers: dict[Any, Timer], rounds: int) -> dict[Any, list[float]]:
    samples: dict[Any, list[float]] = {key: [] for key in timers}
    keys = list(timers)
    for turn in range(rounds):
        shift = turn % len(keys)
        for key in keys[shift:] + keys[:shift]:
            samples[key].append(timers[key]())
    return samples


COPIES = {"cuda": (2**28, 2**31), "cpu": (2**24,)}  # bytes


def copy_bandwidth(device: str) -> float:
    """Bytes per second, read and written, of copies that no cache helps; of several sizes the best.

    The largest is not the fastest: on an H200, PyTorch 2.11 takes half as long again for a byte of
    2 GiB as for one of 256 MiB.
    """
    best = 0.0
    for size in COPIES[device]:
        source = torch.ones(size, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        time_copy = timer([functools.partial(target.copy_, source)], device)
        best = max(best, 2 * size / median(time_copy() for _ in range(9)))
    return best
