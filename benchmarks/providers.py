"""What computes the norm, one small adapter for each; other libraries' are in libraries.py."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import coreai_torch

from .cases import EPS, Case, Inputs


class Subject(NamedTuple):
    """An implementation, made for a case: from the inputs to the output or outputs."""

    call: Callable[..., Tensor | tuple[Tensor, ...]]
    scale: Tensor  # whose gradient backward computes
    backward: bool = True


class Provider(NamedTuple):
    name: str
    make: Callable[[Case, Tensor], Subject | None]  # None: has no such op
    package: str | None = None  # has to be installed
    cuda_only: bool = False
    about: str = ""


def outputs_of(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def forward_backward(subject: Subject, inputs: Inputs) -> tuple[Tensor, ...]:
    outputs = outputs_of(subject.call(*inputs.tensors))
    return torch.autograd.grad(outputs, (*inputs.tensors, subject.scale), inputs.grads)


def composed(
    norm: Callable[[Tensor], Tensor], case: Case, scale: Tensor, compiled: bool = False
) -> Subject:
    """The subject of a norm; with the addition in front of it where the op has one."""
    call: Callable[..., Tensor | tuple[Tensor, ...]] = norm
    if case.op == "add_rms_norm":

        def call(x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
            total = x + residual
            return norm(total), total

    return Subject(torch.compile(call, dynamic=False) if compiled else call, scale)


def loaded(module: nn.Module, scale: Tensor) -> nn.Module:
    """The module with a copy of the scale as its weight, a constant where the scale is one."""
    with torch.no_grad():
        module.weight.copy_(scale)
    return module.requires_grad_(scale.requires_grad)


def ours(case: Case, scale: Tensor) -> Subject | None:
    op = getattr(coreai_torch.ops, case.op, None)
    if op is None:  # a version without it
        return None
    if case.kind == "module":
        module = coreai_torch.composite_ops.RMSNorm(
            case.shape[-1], EPS, device=scale.device, dtype=scale.dtype
        )
        return Subject(loaded(module, scale), module.weight)
    return Subject(lambda *tensors: op(*tensors, scale, EPS), scale)


def reference(case: Case, scale: Tensor) -> Subject:
    return composed(lambda x: coreai_torch.reference.rms_norm(x, scale, EPS), case, scale)


def functional(case: Case, scale: Tensor) -> Callable[[Tensor], Tensor]:
    """`F.rms_norm`, which has no scale per head."""
    shape = (case.shape[-1],)
    if scale.ndim > 1:
        return lambda x: F.rms_norm(x, shape, None, EPS) * scale
    return lambda x: F.rms_norm(x, shape, scale, EPS)


def torch_(case: Case, scale: Tensor) -> Subject:
    if case.kind == "module":
        module = nn.RMSNorm(case.shape[-1], EPS, device=scale.device, dtype=scale.dtype)
        return Subject(loaded(module, scale), module.weight)
    return composed(functional(case, scale), case, scale)


def compiled(case: Case, scale: Tensor) -> Subject:
    norm = coreai_torch.reference.rms_norm
    return composed(lambda x: norm(x, scale, EPS), case, scale, compiled=True)


def compiled_torch(case: Case, scale: Tensor) -> Subject:
    return composed(functional(case, scale), case, scale, compiled=True)


def apple(case: Case, scale: Tensor) -> Subject:
    """Apple's class, from the file it is in: `composite_ops.RMSNorm` is ours beside it."""
    theirs = importlib.import_module("coreai_torch.composite_ops._rms_norm")
    heads = case.shape[1] if scale.ndim > 1 else None
    module = theirs.RMSNorm(case.shape[-1], eps=EPS, n_heads=heads)
    module = loaded(module.to(device=scale.device, dtype=scale.dtype), scale)
    return composed(module, case, module.weight)


PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider("ours", ours, about="this project's op, or its module"),
        Provider("reference", reference, about="the formula in eager PyTorch operations"),
        Provider("torch", torch_, about="`F.rms_norm`, or `nn.RMSNorm` for one row"),
        Provider("compile", compiled, about="`torch.compile` of the formula"),
        Provider("compile-torch", compiled_torch, about="`torch.compile` of `F.rms_norm`"),
        Provider(
            "apple",
            apple,
            package="coreai_torch.composite_ops._rms_norm",
            about="the module of Apple's `coreai-torch`",
        ),
    )
}


def make_subjects(case: Case, inputs: Inputs, names: list[str]) -> dict[str, Subject]:
    """The providers that have the case's op; each as its user would call it."""
    made = {name: PROVIDERS[name].make(case, inputs.scale) for name in names}
    return {name: subject for name, subject in made.items() if subject is not None}


def unavailable(provider: Provider, device: str) -> str | None:
    """Why a provider cannot be measured here, in words, or None."""
    if provider.cuda_only and device != "cuda":
        return "runs on CUDA cards only"
    if provider.package is not None:
        try:
            importlib.import_module(provider.package)
        except ImportError:
            return f"{provider.package} is not installed"
        except Exception as problem:  # a library that does not load here, whatever the reason
            return f"{provider.package} cannot be imported: {str(problem).splitlines()[0][:200]}"
    return None
