"""Results are compared with float64 before anything is timed: a wrong result has no speed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .cases import EPS, Case, Inputs
from .providers import Subject, forward_backward, outputs_of, reference

# Ours promises accuracy: at most twice the reference's largest error and one rounding. Of others it
# is only to be seen that they compute an RMSNorm: they may deviate by this many times as much.
LENIENCY = 8


class Verification(NamedTuple):
    errors: dict[str, dict[str, float]]  # by provider and result, relative to the largest element
    same_bits: dict[str, bool]  # is the output equal to the eager reference's, bit for bit?
    wrong: dict[str, str]  # what is wrong, by provider


def exact(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """Outputs and gradients in float64, by the closed formula, in blocks that stay in the cache."""
    tensors = [t.detach() for t in inputs.tensors]
    adds = case.op == "add_rms_norm"
    x = tensors[0] + tensors[1] if adds else tensors[0]  # a sum is rounded before it is normalized
    scale = inputs.scale.detach().double()
    y, dx = (torch.empty(x.shape, dtype=torch.float64, device=x.device) for _ in range(2))
    dscale = torch.zeros_like(scale)
    for part in blocks(x):
        wide, grad = x[part].double(), inputs.grads[0][part].double()
        inverse = wide.square().mean(-1, keepdim=True).add(EPS).rsqrt()
        normalized = wide * inverse
        y[part] = normalized * scale
        dscale += (grad * normalized).sum_to_size(scale.shape)
        grad *= scale
        dx[part] = inverse * (grad - normalized * (grad * normalized).mean(-1, keepdim=True))
    if not adds:
        return {"y": y, "dx": dx, "dscale": dscale}
    dx += inputs.grads[1]
    return {"y": y, "sum": x.double(), "dx": dx, "dresidual": dx, "dscale": dscale}


def blocks(x: Tensor) -> Iterator[slice]:
    """Slices of the first dimension, of about 64 Ki elements each, or of 16 Mi on a GPU."""
    size = 2**16 if x.device.type == "cpu" else 2**24
    step = max(1, size * x.shape[0] // max(1, x.numel()))
    return (slice(start, start + step) for start in range(0, x.shape[0], step))


def error(got: Tensor, want: Tensor) -> float:
    """The largest deviation, relative to the largest element; NaN if there is one in `got`."""
    worst = torch.stack([(got[part] - want[part]).abs().max() for part in blocks(want)]).max()
    return float(worst / want.abs().max())


def verify(
    case: Case,
    inputs: Inputs,
    inference: Mapping[str, Subject],
    training: Mapping[str, Subject],
) -> Verification:
    """Errors of every implementation, forward as in inference, and backward where it has one.

    An implementation that raises an error is wrong as well, with the error's words.
    """
    wanted = exact(case, inputs)
    constant = inputs.detached()
    names = list(wanted)
    outputs = len(inputs.grads)

    def results(infer: Subject, train: Subject) -> dict[str, Tensor]:
        got = outputs_of(infer.call(*constant.tensors))
        grads = forward_backward(train, inputs) if train.backward else ()
        return dict(zip(names, (*got, *grads), strict=False))

    def errors_of(got: dict[str, Tensor]) -> dict[str, float]:
        return {name: error(tensor.detach(), wanted[name]) for name, tensor in got.items()}

    eager = results(reference(case, constant.scale), reference(case, inputs.scale))
    limits = errors_of(eager)
    coarsest = max(torch.finfo(tensor.dtype).eps for tensor in (inputs.input, inputs.scale))
    found = Verification({"reference": limits}, {"reference": True}, {})
    for name, subject in training.items():
        if name == "reference":
            continue
        try:
            got = results(inference[name], subject)
        except Exception as problem:  # of whatever kind, another library's
            if name == "ours":
                raise
            found.wrong[name] = first_line(problem)
            continue
        shapes = {key: tuple(t.shape) for key, t in got.items() if t.shape != wanted[key].shape}
        if shapes:
            found.wrong[name] = f"wrong shapes: {shapes}"
            continue
        found.errors[name] = errors_of(got)
        found.same_bits[name] = all(torch.equal(got[key], eager[key]) for key in names[:outputs])
        problems = []
        for key, value in found.errors[name].items():
            if name == "ours":
                limit = 2 * limits[key] + torch.finfo(eager[key].dtype).eps
            else:
                limit = LENIENCY * (2 * limits[key] + coarsest)
            if not value <= limit:  # also for NaN
                problems.append(f"{key} is off by {value:.2e}, more than {limit:.2e}")
        if problems:
            found.wrong[name] = "; ".join(problems)
    return found


def first_line(problem: Exception) -> str:
    text = f"{type(problem).__name__}: {problem}"
    return text.splitlines()[0][:200]
