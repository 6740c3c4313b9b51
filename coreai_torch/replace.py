"""The fused norm in models that exist: each RMSNorm keeps its module and gets another forward.

    print(replace_rms_norm(model))
    ...
    restore_rms_norm(model)

A norm is found by what it computes. It stays the object that it is, with its parameter, hooks,
attributes and place in the model; its class becomes a subclass of the class it had, of the same
name, whose forward calls an `RMSNormImpl`. So `isinstance` and what looks at the class's name go on
working, there is nothing to copy or to tie again, and a converter finds the `RMSNormImpl`, which
has neither parameters nor buffers and so does not show in the state_dict.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .composite_ops import RMSNorm, RMSNormImpl
from .reference.rms_norm import DTYPES

_IMPL = "rmsnorm_impl"


@dataclass(frozen=True)
class Norm:
    """An RMSNorm in a model, and how the fused op reproduces it.

    Attributes:
        type: its class, as it was.
        shape: of its weight; None where it has none.
        eps: added to the mean of squares.
        offset: the scale is ``offset + weight``.
        rounds: ``"once"`` where 16-bit weights are multiplied in float32, ``"twice"`` where the
            normalized input is rounded to its dtype before.
        output: the dtype of the result is that of the input, that of the weight, or the one that
            they promote to.
    """

    type: type[nn.Module]
    shape: tuple[int, ...] | None
    eps: float
    offset: int
    rounds: Literal["once", "twice"]
    output: Literal["input", "weight", "promoted"]

    def __str__(self) -> str:
        weight = "no weight" if self.shape is None else f"weight {self.shape}"
        scale = f", scale {self.offset} + weight" if self.offset else ""
        return f"{self.type.__name__}, {weight}, eps {self.eps:g}{scale}"


@dataclass(frozen=True)
class Report:
    """What :func:`replace_rms_norm` did or, with `dry_run`, would do.

    Attributes:
        replaced: the norms by their paths in the model.
        skipped: by their paths, why other modules that look like norms were left as they are. These
            are the modules that have "norm" in the name of their class or in their own.
        dry_run: whether the model was left as it was.
    """

    replaced: dict[str, Norm] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    dry_run: bool = False

    def __str__(self) -> str:
        verb = "to replace" if self.dry_run else "replaced"
        lines = [f"norms {verb}: {len(self.replaced)}, left as they are: {len(self.skipped)}"]
        for title, found in (("", self.replaced), ("left: ", self.skipped)):
            for text, count in Counter(map(str, found.values())).items():
                first = next(path for path, value in found.items() if str(value) == text)
                more = f" and {count - 1} more" if count > 1 else ""
                lines.append(f"  {title}{text}: {first or 'the model itself'}{more}")
        return "\n".join(lines)


def replace_rms_norm(
    model: nn.Module,
    *,
    dry_run: bool = False,
    only: Callable[[str, nn.Module], bool] | None = None,
) -> Report:
    """Make every RMSNorm of a model run on the fused op, in place.

    A module is taken for an RMSNorm if its forward has one argument, its only parameter (if any)
    is a weight, and what it computes of random inputs of several dtypes and magnitudes, with a
    random weight, is ``x / sqrt(mean(x²) + eps) · (offset + weight)`` over the last dimension,
    offset 0 or 1: output, gradients and the dtypes of these, up to rounding, in training and out of
    it. The trials are made on a copy, beside its hooks. It remains the module that it is, with the
    same parameter, hooks, attributes, training mode and state_dict. Later changes of its eps have
    no effect.

    Args:
        model: before it is sharded (FSDP2, DTensor). It may be on any device, the meta device
            included, and in any of float32, float16, bfloat16 and float64.
        dry_run: only report.
        only: is called with path and module; False leaves the module as it is.

    Returns:
        What was replaced, and what was not for which reason.

    Raises:
        TypeError: model is not a module, or only not a function.
        NotImplementedError: model is on a CUDA device, in a build without CUDA kernels.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"replace_rms_norm: expected model to be a torch.nn.Module, got {type(model).__name__}"
        )
    if only is not None and not callable(only):
        raise TypeError(
            f"replace_rms_norm: expected only to be a function, got {type(only).__name__}"
        )
    report = Report(dry_run=dry_run)
    found: list[tuple[nn.Module, Norm]] = []
    inside: set[nn.Module] = set()  # of a norm that was found
    for path, module in model.named_modules():
        if module in inside:
            continue
        if only is not None and not only(path, module):
            continue
        try:
            norm = _recognize(module)
        except _NotReplaced as reason:
            if "norm" in (type(module).__name__ + path.rpartition(".")[2]).lower():
                report.skipped[path] = str(reason)
            if isinstance(module, RMSNorm | _Fused):
                inside.update(module.modules())
            continue
        if norm is not None:
            inside.update(module.modules())
            report.replaced[path] = norm
            found.append((module, norm))
    if not dry_run:
        for module, norm in found:
            _replace(module, norm)
    return report


def restore_rms_norm(model: nn.Module) -> list[str]:
    """Give the norms of a model the forward that they had before :func:`replace_rms_norm`.

    Returns:
        Their paths in the model.

    Raises:
        TypeError: model is not a module.
        RuntimeError: a norm's class or forward has been changed since, as sharding and
            parametrizing do. No norm has been restored then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"restore_rms_norm: expected model to be a torch.nn.Module, got {type(model).__name__}"
        )
    found = {path: m for path, m in model.named_modules() if isinstance(m, _Fused)}
    for path, module in found.items():
        if type(module) is not _fused_class(module._replaced_class) or "forward" in vars(module):
            raise RuntimeError(
                f"restore_rms_norm: expected {path or 'model'} as replace_rms_norm has left it, "
                f"got {type(module).__name__} with another class or forward; undo that first"
            )
    for module in found.values():
        _restore(module)
    return list(found)


class _NotReplaced(Exception):
    """Says why a module is not replaced."""


# The modules that take the place of others.


class _Fused(nn.Module):
    """Comes before the class of a module that is replaced, and has its forward."""

    _replaced_class: type[nn.Module]
    _replaced_norm: Norm
    _replaced_weight: str | None  # its name
    _replaced_impl: nn.Module | None  # what the module had under the name of our RMSNormImpl

    def forward(self, x: Tensor) -> Tensor:
        name = self._replaced_weight
        weight = None if name is None else getattr(self, name)
        return _forward(self._modules[_IMPL], self._replaced_norm, x, weight)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made here and has no name to be found by.
        reduced: Any = super().__reduce_ex__(protocol)
        return (_new, (self._replaced_class,), *reduced[2:])


def _forward(impl: Any, norm: Norm, x: Tensor, weight: Tensor | None) -> Tensor:
    if weight is None:
        y: Tensor = impl(x, x.new_ones(x.shape[-1]))
        return y
    scale = weight
    if norm.rounds == "once":
        scale = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if norm.offset:
        scale = scale + norm.offset
    y = impl(x, scale)
    if norm.output == "input":
        return y.to(x.dtype)
    if norm.output == "weight":
        return y.to(weight.dtype)
    return y.to(torch.promote_types(x.dtype, weight.dtype))


_fused_classes: dict[type, type[_Fused]] = {}


def _fused_class(replaced: type[nn.Module]) -> type[_Fused]:
    if replaced in _fused_classes:
        return _fused_classes[replaced]
    names = {
        "__module__": replaced.__module__,
        "__qualname__": replaced.__qualname__,
        "__doc__": replaced.__doc__,
        "_replaced_class": replaced,
    }
    made: type[_Fused] = types.new_class(
        replaced.__name__, (_Fused, replaced), exec_body=lambda namespace: namespace.update(names)
    )
    return _fused_classes.setdefault(replaced, made)


def _new(replaced: type[nn.Module]) -> _Fused:
    """An object to be filled by pickle and copy."""
    module: _Fused = object.__new__(_fused_class(replaced))
    return module


def _replace(module: Any, norm: Norm) -> None:
    impl = RMSNormImpl(norm.eps)
    impl.train(module.training)
    # To `_init_weights` of transformers, a class with RMSNorm in its name has a weight to set.
    impl._is_hf_initialized = True  # type: ignore[assignment]
    vars(module).update(
        _replaced_norm=norm,
        _replaced_weight=next(iter(_own(module)), None),
        _replaced_impl=module._modules.get(_IMPL),
    )
    module._modules[_IMPL] = impl
    module.__class__ = _fused_class(type(module))


def _restore(module: Any) -> None:
    module.__class__ = module._replaced_class
    if module._replaced_impl is None:
        del module._modules[_IMPL]
    else:
        module._modules[_IMPL] = module._replaced_impl
    for name in ("_replaced_norm", "_replaced_weight", "_replaced_impl"):
        del vars(module)[name]


# How they are recognized.


def _own(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a module without those of the modules in it."""
    return {name: p for name, p in module._parameters.items() if p is not None}


def _recognize(module: nn.Module) -> Norm | None:
    """What RMSNorm a module is; None for a module that holds others and is not to be judged.

    Raises:
        _NotReplaced: it is none, or cannot be replaced.
    """
    if isinstance(module, _Fused):
        raise _NotReplaced("has been replaced before")
    if isinstance(module, RMSNorm):
        raise _NotReplaced("is this package's own RMSNorm")
    if parametrize.is_parametrized(module):
        raise _NotReplaced("is parametrized; replace first and parametrize then")
    parameters = _own(module)
    if len(list(module.parameters())) > len(parameters):
        return None
    if len(parameters) > 1:
        raise _NotReplaced(f"has the parameters {', '.join(parameters)}")
    if buffers := [name for name, _ in module.named_buffers()]:
        raise _NotReplaced(f"has the buffers {', '.join(buffers)}")
    if isinstance(module, torch.jit.ScriptModule):
        raise _NotReplaced("is compiled by TorchScript")
    if "forward" in vars(module):
        raise _NotReplaced("has a forward of its own, which is not that of its class")
    _check_signature(module)
    weight = next(iter(parameters.values()), None)
    if weight is not None:
        _check_weight(weight)
    with _quiet(weight):
        return _Probe(module, weight).norm()


def _check_signature(module: nn.Module) -> None:
    try:
        _, *parameters = inspect.signature(type(module).forward).parameters.values()
    except ValueError:
        raise _NotReplaced("has a forward of unknown arguments") from None
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if len(parameters) != 1 or parameters[0].kind not in positional:
        names = ", ".join(str(p) for p in parameters) or "no arguments"
        raise _NotReplaced(f"has a forward that takes {names}, expected one input")


# No model is wider; the weights of most linear layers and embeddings have more elements.
_MOST_ELEMENTS = 1 << 17


def _check_weight(weight: Tensor) -> None:
    if type(weight.data) is not Tensor:
        kind = type(weight.data).__name__
        raise _NotReplaced(f"has a weight that is a {kind}; replace before sharding or quantizing")
    if weight.dtype not in DTYPES:
        raise _NotReplaced(f"has a weight of dtype {weight.dtype}")
    if not 1 <= weight.dim() <= 3 or not 0 < weight.numel() <= _MOST_ELEMENTS:
        raise _NotReplaced(f"has a weight of shape {tuple(weight.shape)}")


@contextmanager
def _quiet(weight: Tensor | None) -> Iterator[None]:
    """The caller's modes do not reach the trials, nor do these the caller's random numbers."""
    device = torch.device("cpu") if weight is None else weight.device
    on_cuda = [device] if device.type == "cuda" else []
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type if device.type != "meta" else "cpu", enabled=False),
        torch.random.fork_rng(devices=on_cuda),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


@dataclass(frozen=True)
class _Case:
    """Arguments of a norm, and what it makes of them."""

    x: Tensor
    weight: Tensor | None
    grad_output: Tensor
    output: Tensor
    grads: tuple[Tensor, ...]

    @property
    def dtype(self) -> torch.dtype:
        """The coarsest of the dtypes."""
        tensors = (self.x, self.output, *(() if self.weight is None else (self.weight,)))
        coarsest: torch.dtype
        coarsest = max((t.dtype for t in tensors), key=lambda dtype: torch.finfo(dtype).eps)
        return coarsest


class _Probe:
    """Runs a copy of a module, with random weights and inputs."""

    def __init__(self, module: nn.Module, weight: Tensor | None) -> None:
        self.module = module
        self.weight_name = next(iter(_own(module)), None)
        self.weight_shape = None if weight is None else tuple(weight.shape)
        meta = weight is None or weight.is_meta
        self.device = torch.device("cpu") if weight is None or meta else weight.device
        self.dtype = torch.float32 if weight is None else weight.dtype
        self.generator = torch.Generator().manual_seed(0)
        self.shape = self._input_shape()

    def norm(self) -> Norm:
        eps = self._eps()
        double = self.dtype == torch.float64
        dtypes = [self.dtype] if double else [torch.float32, torch.bfloat16]
        if self.dtype == torch.float16:
            dtypes = [torch.float32, torch.float16]
        cases: list[_Case] = []
        pairs = itertools.product(dtypes, dtypes if self.weight_name else dtypes[:1])
        for x_dtype, weight_dtype in pairs:
            required = weight_dtype == self.dtype and x_dtype == self.dtype
            try:
                for magnitude, training in ((1.0, False), (1e-3, True), (64.0, False)):
                    cases.append(self._case(x_dtype, weight_dtype, magnitude, training))
            except Exception as error:
                if required:
                    raise _NotReplaced(_raised(error)) from error
        return self._agreeing(eps, cases)

    def _agreeing(self, eps: float, cases: list[_Case]) -> Norm:
        """The norm that reproduces the cases."""
        make = functools.partial(Norm, type(self.module), self.weight_shape, eps)
        output = self._output(cases)
        kinds: list[tuple[int, Literal["once", "twice"]]] = [(0, "twice")]
        if self.weight_name:
            kinds += [(0, "once"), (1, "once")]
        norms = [make(offset, rounds, output) for offset, rounds in kinds]
        best = min(norms, key=lambda norm: sum(_output_error(norm, case) for case in cases))
        for case in cases:
            _check_agreement(best, case)
        return best

    def _output(self, cases: list[_Case]) -> Literal["input", "weight", "promoted"]:
        rules: dict[Literal["input", "weight", "promoted"], Callable[[_Case], torch.dtype]] = {
            "promoted": lambda case: torch.promote_types(case.x.dtype, _weight_of(case).dtype),
            "input": lambda case: case.x.dtype,
            "weight": lambda case: _weight_of(case).dtype,
        }
        if self.weight_name is None:
            rules = {"input": rules["input"]}
        for name, rule in rules.items():
            if all(case.output.dtype == rule(case) for case in cases):
                return name
        given = Counter(f"{case.output.dtype} of {case.x.dtype}" for case in cases)
        raise _NotReplaced(f"has an output of an unexpected dtype: {', '.join(given)}")

    def _run(self, x: Tensor, weight: Tensor | None, training: bool = False) -> Tensor:
        clone = object.__new__(type(self.module))
        vars(clone).update(vars(self.module), training=training)
        if self.weight_name is not None:
            parameters = {**self.module._parameters, self.weight_name: weight}
            vars(clone)["_parameters"] = parameters
        output: Tensor = type(self.module).forward(clone, x)
        if not isinstance(output, Tensor) or output.shape != x.shape:
            raise _NotReplaced("has an output of another shape than its input")
        return output

    def _random(self, shape: tuple[int, ...], dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        # Not of mean zero, where a norm that subtracts the mean would come close.
        value = scale * (torch.randn(shape, generator=self.generator, device="cpu") + 0.5)
        return value.to(self.device, dtype)

    def _case(
        self, x_dtype: torch.dtype, weight_dtype: torch.dtype, magnitude: float, training: bool
    ) -> _Case:
        x = self._random(self.shape, x_dtype, magnitude).requires_grad_()
        weight = None
        if self.weight_shape is not None:
            weight = nn.Parameter(self._random(self.weight_shape, weight_dtype))
        output = self._run(x, weight, training)
        grad_output = self._random(self.shape, output.dtype)
        leaves = [x] if weight is None else [x, weight]
        grads = torch.autograd.grad(output, leaves, grad_output)
        return _Case(x, weight, grad_output, output.detach(), grads)

    def _input_shape(self) -> tuple[int, ...]:
        if self.weight_shape is not None:
            *groups, dim = self.weight_shape
            rows = [3] if len(groups) < 2 else []
            return (2, *rows, *(3 if group == 1 else group for group in groups), dim)
        dims = []
        for value in vars(self.module).values():
            last = value[-1] if isinstance(value, tuple | list | torch.Size) and value else value
            if type(last) is int and 0 < last <= _MOST_ELEMENTS:
                dims.append(last)
        for dim in (*dims, 64):
            try:
                self._run(torch.ones(2, 3, dim, device="cpu"), None)
            except _NotReplaced as error:
                reason = str(error)
            except Exception as error:
                reason = _raised(error)
            else:
                return (2, 3, dim)
        raise _NotReplaced(reason)

    def _eps(self) -> float:
        """eps from the module's attributes; where it is none of them, as it was measured."""
        dtype = self.dtype if self.dtype == torch.float64 else torch.float32
        weight = None
        if self.weight_shape is not None:
            weight = nn.Parameter(self._random(self.weight_shape, dtype).abs() + 0.5)
        signs = torch.randint(2, self.shape, generator=self.generator, device="cpu")
        signs = (2 * signs - 1).to(self.device, dtype)
        try:
            one = _wide(self._run(signs, weight))
            measured = _measured_eps(
                lambda m: (_wide(self._run(signs * m, weight)) / one).median().item()
            )
        except _NotReplaced:
            raise
        except Exception as error:
            raise _NotReplaced(_raised(error)) from error
        given = [v for v in vars(self.module).values() if type(v) is float]
        for eps in (*given, torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps, 0.0):
            if math.isclose(eps, measured, rel_tol=1e-3, abs_tol=1e-20):
                return eps
        return float(f"{measured:.4g}")


def _measured_eps(ratio: Callable[[float], float]) -> float:
    """eps from ``ratio(m)``, the output for rows of mean square m² over that for rows of 1.

    That is m · sqrt((1 + eps) / (m² + eps)), and tells the most about eps where both are alike.
    """
    ratios = {10.0**-k: ratio(10.0**-k) for k in range(1, 13)}
    m, r = min(ratios.items(), key=lambda item: abs(item[1] - 0.7))
    if min(ratios.values()) > 0.999:
        return 0.0
    if not m < r < 1:
        raise _NotReplaced("does not compute an RMSNorm")
    return m * m * (1 - r * r) / (r * r - m * m)


def _wide(tensor: Tensor) -> Tensor:
    """In float64, which not every device has."""
    return tensor.detach().cpu().double()


def _weight_of(case: _Case) -> Tensor:
    assert case.weight is not None
    return case.weight


def _raised(error: Exception) -> str:
    first = str(error).strip().partition("\n")[0]
    return f"raised {type(error).__name__} in a trial: {first}"


# The bounds below are in units of the coarsest dtype. A norm rounds two or three times on the way
# to its output, twice as often on the way to a gradient, each time by up to half a unit.
_OUTPUT_UNITS = 4
_GRADIENT_UNITS = 8


def _ideal(norm: Norm, case: _Case) -> tuple[Tensor, Tensor, Tensor]:
    """1 / rms, the normalized input, and the magnitude of the scale, in float64."""
    x = _wide(case.x)
    rstd = (x.square().mean(-1, keepdim=True) + norm.eps).rsqrt()
    scale = torch.ones_like(x)
    if case.weight is not None:
        scale = scale * (_wide(case.weight).abs() + norm.offset)
    return rstd, x * rstd, scale


def _ours(norm: Norm, case: _Case) -> Tensor:
    return _forward(RMSNormImpl(norm.eps), norm, case.x, case.weight)


def _error(ours: Tensor, theirs: Tensor, magnitude: Tensor, dtype: torch.dtype) -> float:
    """The largest difference, in units; infinite where one is finite and the other is not."""
    info = torch.finfo(dtype)
    difference = (_wide(ours) - _wide(theirs)).abs()
    units = difference / (magnitude.clamp_min(info.tiny) * info.eps)
    return units.nan_to_num(nan=math.inf).max().item()


def _output_error(norm: Norm, case: _Case) -> float:
    _, normalized, scale = _ideal(norm, case)
    return _error(_ours(norm, case), case.output, (normalized * scale).abs(), case.dtype)


def _check_agreement(norm: Norm, case: _Case) -> None:
    rstd, normalized, scale = _ideal(norm, case)
    ours = _ours(norm, case)
    _check_units(
        "output",
        _error(ours, case.output, (normalized * scale).abs(), case.dtype),
        _OUTPUT_UNITS,
        case,
    )
    leaves = [case.x] if case.weight is None else [case.x, case.weight]
    grads = torch.autograd.grad(ours, leaves, case.grad_output)
    grad = _wide(case.grad_output).abs()
    scaled, normalized = grad * scale, normalized.abs()
    magnitudes = [
        rstd * (scaled + normalized * (scaled * normalized).mean(-1, keepdim=True)),
        *([] if case.weight is None else [(grad * normalized).sum_to_size(case.weight.shape)]),
    ]
    for name, mine, theirs, magnitude in zip(
        ("gradient of the input", "gradient of the weight"),
        grads,
        case.grads,
        magnitudes,
        strict=False,
    ):
        _check_units(name, _error(mine, theirs, magnitude, case.dtype), _GRADIENT_UNITS, case)


def _check_units(name: str, error: float, most: float, case: _Case) -> None:
    if error > most:
        raise _NotReplaced(
            f"does not compute an RMSNorm: its {name} of {case.x.dtype} is {error:.3g} units of "
            f"rounding away, expected at most {most}"
        )
