"""What a norm costs besides the kernel's time: the host's time for a call, and memory."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from . import timing
from .cases import Case, Inputs, make_inputs
from .measure import Plan
from .providers import Subject, forward_backward, make_subjects, outputs_of
from .verification import verify

HOST_SHAPES = ((1, 64), (1, 4096))
HOST_DTYPES = ("float32", "bfloat16")
MEMORY_CASES = tuple(
    Case((4096, 4096), dtype, op)
    for op in ("rms_norm", "add_rms_norm")
    for dtype in ("float32", "bfloat16")
)
# What is called for a single row, and what PyTorch needs for any elementwise op: a call of the norm
# cannot be much below it.
FLOOR = "x * scale"
LABELS = {"ours": "ours, module", "torch": "nn.RMSNorm"}
FUNCTION_LABELS = {"ours": "ours, function", "torch": "F.rms_norm"}


def callables(case: Case, inputs: Inputs, names: list[str]) -> dict[str, Subject]:
    """Functions and modules by what they are called in the report."""
    plain = make_subjects(case, inputs, names)
    modules = make_subjects(replace(case, kind="module"), inputs, [n for n in LABELS if n in names])
    return {
        **{FUNCTION_LABELS.get(name, name): subject for name, subject in plain.items()},
        **{LABELS[name]: subject for name, subject in modules.items()},
    }


def product(inputs: Inputs) -> Subject:
    return Subject(lambda x: x * inputs.scale, inputs.scale)


def drop_wrong(
    case: Case, inputs: Inputs, inference: dict[str, Subject], training: dict[str, Subject]
) -> None:
    for name in verify(case, inputs, inference, training).wrong:
        del inference[name], training[name]


def host_time(case: Case, plan: Plan) -> dict[str, Any]:
    """Times of calls so small that they consist of the host's work."""
    torch.compiler.reset()
    inputs = make_inputs(case, plan.device)
    constant = inputs.detached()
    names = [n for n in plan.providers if n != "compile-torch"]
    inference = callables(case, constant, names)
    training = callables(case, inputs, names)
    drop_wrong(case, inputs, inference, training)
    inference = {FLOOR: product(constant)} | inference
    training = {FLOOR: product(inputs)} | training
    x = constant.input
    timed: dict[tuple[str, str], Callable[[], object]] = {
        ("forward", "copy_"): functools.partial(torch.empty_like(x).copy_, x),
        ("forward", "clone"): x.clone,
    }
    for label, subject in inference.items():
        timed["forward", label] = functools.partial(subject.call, x)
    for label, subject in training.items():
        if subject.backward:
            run = functools.partial(forward_backward, subject, inputs)
            timed["forward+backward", label] = run
    settle = torch.cuda.synchronize if plan.device == "cuda" else lambda: None
    timings = timing.take_turns(timed, plan.effort, settle)
    times: dict[str, dict[str, Any]] = {}
    for (direction, label), samples in timings.seconds.items():
        times.setdefault(direction, {})[label] = timing.summary(samples)
    return {"shape": list(case.shape), "dtype": case.dtype, **timings.counts(), "times": times}


def host_times(plan: Plan) -> list[dict[str, Any]]:
    return [host_time(Case(s, dtype), plan) for dtype in HOST_DTYPES for s in HOST_SHAPES]


def peak_bytes(run: Callable[[], object], device: str) -> int:
    """The most that PyTorch's allocator handed out at a time during a call, its result included.

    On a CPU the allocations are those that the profiler reports, in their order.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    most = held = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def saved_bytes(subject: Subject, inputs: Inputs) -> int:
    """What is kept for backward, every block of memory once, inputs included."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = outputs_of(subject.call(*inputs.tensors))
    del outputs
    return sum(kept.values())


def memory(case: Case, plan: Plan) -> dict[str, Any]:
    """Bytes by provider: saved for backward, and peaks in inference and in training."""
    torch.compiler.reset()
    inputs = make_inputs(case, plan.device)
    constant = inputs.detached()
    inference = make_subjects(case, constant, plan.providers)
    training = make_subjects(case, inputs, plan.providers)
    drop_wrong(case, inputs, inference, training)  # compiles and warms up as well
    result: dict[str, dict[str, int]] = {}
    for name, subject in training.items():
        infer = functools.partial(inference[name].call, *constant.tensors)
        result[name] = {"forward": peak_bytes(infer, plan.device)}
        if subject.backward:
            train = functools.partial(forward_backward, subject, inputs)
            result[name]["forward+backward"] = peak_bytes(train, plan.device)
            result[name]["saved"] = saved_bytes(subject, inputs)
    return {
        "name": case.name,
        "op": case.op,
        "dtype": case.dtype,
        "tensor_bytes": case.tensor_bytes,
        "bytes": result,
    }


def memory_use(plan: Plan, cases: tuple[Case, ...] = MEMORY_CASES) -> list[dict[str, Any]]:
    return [record for case in cases if (record := memory(case, plan))["bytes"].get("ours")]
