"""The record of a case: verified first, then timed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import torch
import torch._functorch.config

from . import ring, timing
from .cases import DIRECTIONS, Case, Inputs, make_inputs
from .environment import largest_cache
from .providers import Subject, forward_backward, make_subjects, outputs_of
from .verification import verify

ROOFS = ("copy_", "clone")  # they move memory only; every table divides by one of them
Key = tuple[str, str]  # direction, provider
EVICTED = 4  # times the largest cache is read to empty it

# Backward alone is timed by running it again and again on one output, so that what a compiled
# function saved for it must not be overwritten.
torch._functorch.config.donated_buffer = False


class Plan(NamedTuple):
    """How cases are measured."""

    providers: list[str]  # installed ones
    directions: tuple[str, ...] = DIRECTIONS
    device: str = "cpu"
    method: str = "rounds"  # "apart", rounds of single calls with cold caches, or "ring"
    effort: timing.Effort = timing.Effort()


def measure(case: Case, plan: Plan) -> dict[str, Any]:
    """Errors, times and ratios of all providers that have the op and compute it right.

    Where ours computes it wrong there are no times, and `failed` says what is wrong.
    """
    torch.compiler.reset()  # or the shapes of earlier cases use up the limit of recompilations
    inputs = make_inputs(case, plan.device)
    inference = make_subjects(case, inputs.detached(), plan.providers)
    training = make_subjects(case, inputs, plan.providers)
    record: dict[str, Any] = {
        "name": case.name,
        "op": case.op,
        "kind": case.kind,
        "shape": list(case.shape),
        "dtype": case.dtype,
        "scale_shape": list(case.scale_shape),
        "output_bytes": case.tensor_bytes,
        "bytes": {direction: case.bytes_moved(direction) for direction in DIRECTIONS},
    }
    found = verify(case, inputs, inference, training)
    wrong = dict(found.wrong)
    record |= {"errors": found.errors, "same_bits": found.same_bits}
    if "ours" in wrong:  # a wrong result has no speed
        return record | {"failed": wrong["ours"]}
    for name in wrong:
        del inference[name], training[name]
    faults: dict[Key, list[float]] = {}
    if plan.method == "ring":
        samples = time_on_ring(case, inference, training, plan, wrong)
    else:
        timed = host_calls(inputs, inference, training, plan.directions)
        if plan.method == "apart":
            timings = timing.take_turns(timed, plan.effort, evictor(), apart=True)
        else:
            timings = timing.take_turns(timed, plan.effort)
        samples, faults = timings.seconds, timings.page_faults
        record |= timings.counts()
    times: dict[str, dict[str, dict[str, float]]] = {}
    for (direction, name), taken in samples.items():
        moved = 2 * case.tensor_bytes if name in ROOFS else record["bytes"][direction]
        times.setdefault(direction, {})[name] = timing.summary(taken, moved)
        if (direction, name) in faults:
            times[direction][name]["page_faults"] = round(median(faults[direction, name]))
    return record | {"skipped": wrong, "times": times}


def evictor() -> Callable[[], object]:
    """Empties the caches: every thread reads more than they hold."""
    return torch.ones(EVICTED * largest_cache() // 4).sum


def host_calls(
    inputs: Inputs,
    inference: dict[str, Subject],
    training: dict[str, Subject],
    directions: tuple[str, ...],
) -> dict[Key, Callable[[], object]]:
    """What a round runs, by direction and provider; the copies always."""
    constant = inputs.detached()
    x = constant.input
    target = torch.empty_like(x)
    timed: dict[Key, Callable[[], object]] = {
        ("forward", "copy_"): lambda: target.copy_(x),
        ("forward", "clone"): x.clone,
    }
    if "forward" in directions:
        for name, subject in inference.items():
            timed["forward", name] = functools.partial(subject.call, *constant.tensors)
    for name, subject in training.items():
        if not subject.backward:
            continue
        if "backward" in directions:
            timed["backward", name] = functools.partial(
                torch.autograd.grad,
                outputs_of(subject.call(*inputs.tensors)),
                (*inputs.tensors, subject.scale),
                inputs.grads,
                retain_graph=True,
            )
        if "forward+backward" in directions:
            timed["forward+backward", name] = functools.partial(forward_backward, subject, inputs)
    return timed


def time_on_ring(
    case: Case,
    inference: dict[str, Subject],
    training: dict[str, Subject],
    plan: Plan,
    skipped: dict[str, str],
) -> dict[Key, list[float]]:
    """Samples by direction and provider; what cannot be captured in a graph joins `skipped`."""
    inputs = ring.ring_of(case, plan.device)
    timers = {
        ("forward", name): ring.timer(ring.copies(inputs, name), plan.device) for name in ROOFS
    }
    for name in training:
        mine: dict[Key, ring.Timer] = {}
        try:
            for direction in plan.directions:
                subject = (inference if direction == "forward" else training)[name]
                if direction == "forward" or subject.backward:
                    calls = ring.runs(inputs, subject, direction)
                    mine[direction, name] = ring.timer(calls, plan.device)
        except Exception as problem:  # of another library: this shape is not for it
            if name == "ours":
                raise
            skipped[name] = str(problem).splitlines()[0][:200]
        else:
            timers |= mine
    return ring.take_turns(timers, plan.effort.rounds)
