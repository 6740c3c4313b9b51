"""What holds for every call, tried on random ones: shapes, layouts, dtypes, scales, eps and values
are drawn by hypothesis, which also shrinks what fails to the smallest case that does.

The draws are the same in every run. COREAI_TORCH_EXAMPLES=10000 makes that many for each property,
new ones every time.
"""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass

import pytest
import torch
from cases import DTYPES, FLOATS, oracle, with_gradients
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode

from coreai_torch import ops, reference
from coreai_torch.backends import cpu
from coreai_torch.reference.rms_norm import output_dtype

EXAMPLES = int(os.environ.get("COREAI_TORCH_EXAMPLES", "0"))
EXHAUSTIVE = settings(
    max_examples=EXAMPLES or 100,
    derandomize=not EXAMPLES,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)

SIZES = (1, 1, 2, 3, 4, 5, 8, 11, 16)
WIDTHS = (1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 31, 32, 33, 47, 64, 65, 96, 127, 128, 200, 513)
EPS = (1e-5, 1e-6, 1e-12, 1.0, 0.0)
LAYOUTS = ("dense", "permuted", "columns", "rows", "expanded", "offset", "overlapping")

# How values are made of normally distributed ones.
TAME = {
    "normal": lambda x: x,
    "small": lambda x: x * 1e-3,
    "large": lambda x: x * 1e3,
    "spike": lambda x: torch.where(torch.arange(x.numel()).view(x.shape) % 13 == 7, 6e4, x * 1e-2),
    "equal": lambda x: torch.ones_like(x),
}
WILD = TAME | {
    "zeros": lambda x: x * 0.0,  # of both signs
    "denormal": lambda x: x * 1e-39,
    "tiny": lambda x: x * 1e-22,
    "huge": lambda x: x * 1e22,
    "largest": lambda x: x.sign() * torch.finfo(torch.float32).max,
    "largest float16": lambda x: x.sign() * 65504,
    "smallest float16": lambda x: x.sign() * 2.0**-24,
    "infinite": lambda x: torch.where(x > 2, float("inf"), x),
    "not a number": lambda x: torch.where(x < -2, float("nan"), x),
    "any bits": lambda x: (
        torch.randint(-(2**31), 2**31, x.shape, dtype=torch.int64)
        .to(torch.int32)
        .view(torch.float32)
    ),
}


@dataclass(frozen=True)
class Case:
    """What a call is drawn as."""

    shape: tuple[int, ...]
    scale_shape: tuple[int, ...]
    input_dtype: torch.dtype
    scale_dtype: torch.dtype
    layout: str
    grad_layout: str
    values: str
    scale_values: str
    eps: float
    seed: int

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Input, scale and a gradient of the output."""
        torch.manual_seed(self.seed)
        x = laid_out(WILD[self.values](torch.randn(self.shape)).to(self.input_dtype), self.layout)
        w = WILD[self.scale_values](torch.randn(self.scale_shape)).to(self.scale_dtype)
        dtype = output_dtype(self.input_dtype, self.scale_dtype)
        return x, w, laid_out(torch.randn(self.shape).to(dtype), self.grad_layout)

    @property
    def fused(self) -> bool:
        """Whether a kernel takes it; the others run in PyTorch operations, in their order."""
        if self.scale_dtype == torch.float64 and self.input_dtype != torch.float64:
            return False
        ones = (1,) * (len(self.shape) - len(self.scale_shape))
        spans = [
            scale_size != 1
            for size, scale_size in zip(self.shape, ones + self.scale_shape, strict=True)
            if size != 1
        ]
        spans = spans[: len(spans) - (self.shape[-1] != 1)]
        changes = sum(a != b for a, b in itertools.pairwise(spans))
        return changes <= (1 if spans and spans[0] else 2)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """A tensor of the same shape in another layout, with the values of x where these can be."""
    if layout == "permuted":
        order = torch.randperm(x.dim()).tolist()
        return x.permute(order).contiguous().permute([order.index(d) for d in range(x.dim())])
    if layout == "columns":
        wider = x.new_full((*x.shape[:-1], x.shape[-1] + 5), float("nan"))
        wider[..., 3:-2] = x
        return wider[..., 3:-2]
    if layout == "rows" and x.dim() > 1:
        sparser = x.new_full((2 * x.shape[0], *x.shape[1:]), float("nan"))
        sparser[::2] = x
        return sparser[::2]
    if layout == "expanded":
        dim = int(torch.randint(x.dim(), ()))
        return x.narrow(dim, 0, min(1, x.shape[dim])).expand(x.shape)
    if layout == "offset":
        return torch.cat([x.new_full((1,), float("nan")), x.flatten()])[1:].view(x.shape)
    if layout == "overlapping":
        strides = [int(torch.randint(0, 4, ())) for _ in range(x.dim() - 1)] + [1]
        last = sum((max(n, 1) - 1) * s for n, s in zip(x.shape, strides, strict=True))
        if last < x.numel():
            return x.flatten().as_strided(x.shape, strides)
    return x


@st.composite
def cases(draw: st.DrawFn, values: dict = WILD, scale_values: dict = WILD, eps=EPS) -> Case:
    rows = draw(st.lists(st.sampled_from((*SIZES, 0)), max_size=4))
    shape = (*rows, draw(st.sampled_from(WIDTHS)))
    kept = [size if draw(st.booleans()) else 1 for size in rows]
    scale_shape = (*kept[draw(st.integers(0, len(kept))) :], shape[-1])
    return Case(
        shape,
        scale_shape,
        draw(st.sampled_from(DTYPES)),
        draw(st.sampled_from(DTYPES)),
        draw(st.sampled_from(LAYOUTS)),
        draw(st.sampled_from(LAYOUTS)),
        draw(st.sampled_from(sorted(values))),
        draw(st.sampled_from(sorted(scale_values))),
        draw(st.sampled_from(eps)),
        draw(st.integers(0, 2**32)),
    )


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    """All bits, those of zeros included; a NaN is a NaN."""
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    same = torch.where(a.isnan(), b.isnan(), (a == b) & (a.signbit() == b.signbit()))
    assert same.all(), f"{(~same).sum()} of {same.numel()} differ, {a[~same][0]} and {b[~same][0]}"


@given(cases())
@EXHAUSTIVE
def test_forward_is_that_of_the_reference(case: Case) -> None:
    x, w, _ = case.tensors()
    y = ops.rms_norm(x, w, case.eps)
    expected = reference.rms_norm(x.contiguous(), w.contiguous(), case.eps)
    if case.fused or x.is_contiguous():
        assert_same_bits(y, expected)
    else:  # the mean is taken in the order of the strides
        torch.testing.assert_close(y, expected, equal_nan=True)
    assert y.stride() == torch.empty_like(x).stride() or not case.fused


@given(cases())
@EXHAUSTIVE
def test_traced_calls_have_the_sizes_and_strides_of_real_ones(case: Case) -> None:
    x, w, grad = case.tensors()
    backward = torch.ops.coreai_torch.fused_rms_norm_backward
    real = (ops.rms_norm(x, w, case.eps), *backward(grad, x, w, case.eps, [True, True]))
    with FakeTensorMode() as mode:
        x, w, grad = (mode.from_tensor(t) for t in (x, w, grad))
        fake = (ops.rms_norm(x, w, case.eps), *backward(grad, x, w, case.eps, [True, True]))
    for a, b in zip(real, fake, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert a.stride() == b.stride() or a.numel() == 0 or not case.fused


@given(cases(TAME, TAME, EPS[:-1]))
@EXHAUSTIVE
def test_gradients_are_those_of_the_oracle(case: Case) -> None:
    """Within a bound on what rounding can do, element by element."""
    x, w, grad = case.tensors()
    ours = with_gradients(ops.rms_norm, x, w, grad, case.eps)
    exact = oracle(x, w, grad, case.eps)
    # The terms that are summed, without their signs: what roundings are in proportion to.
    wide = [t.double().abs() for t in (x, w, grad)]
    rstd = (wide[0].square().mean(-1, keepdim=True) + case.eps).rsqrt()
    normalized, scaled = wide[0] * rstd, wide[2] * wide[1]
    magnitudes = (
        normalized * wide[1],
        (scaled + normalized * (scaled * normalized).mean(-1, keepdim=True)) * rstd,
        (wide[2] * normalized).sum_to_size(w.shape),
    )
    unit = (2.0**-53 if case.input_dtype == torch.float64 else 2.0**-24) * (16 + case.shape[-1])
    for name, a, b, magnitude in zip(
        ("output", "grad_input", "grad_scale"), ours, exact, magnitudes, strict=True
    ):
        info = torch.finfo(a.dtype)
        # A rounding to the result's dtype, and one of the normalized input to its own in output.
        roundings = info.eps + (torch.finfo(case.input_dtype).eps if name == "output" else 0)
        smallest = max(info.smallest_normal * info.eps, 2.0**-149)
        if name == "output":  # a denormal normalized input
            tiny = torch.finfo(case.input_dtype)
            smallest = smallest + tiny.smallest_normal * tiny.eps * wide[1].expand(a.shape)
        bound = unit * magnitude + roundings * b.abs() + smallest
        finite = b.abs() < info.max / 2
        assert ((a.double() - b).abs() <= bound)[finite].all(), name


@given(cases(scale_values=TAME))
@EXHAUSTIVE
def test_gradients_do_not_depend_on_layouts_levels_or_threads(case: Case) -> None:
    x, w, grad = case.tensors()
    dense = with_gradients(ops.rms_norm, x.contiguous(), w, grad.contiguous(), case.eps)
    if not case.fused:
        return
    threads = torch.get_num_threads()
    try:
        for level in {cpu.supported_levels()[0], cpu.supported_levels()[-1]}:
            torch.set_num_threads(1 if threads > 1 and level == "x86-64" else threads)
            with cpu.level(level):
                ours = with_gradients(ops.rms_norm, x, w, grad, case.eps)
            for a, b in zip(ours, dense, strict=True):
                assert_same_bits(a, b)
    finally:
        torch.set_num_threads(threads)


@given(cases(), st.data())
@EXHAUSTIVE
def test_a_row_does_not_depend_on_the_others(case: Case, data: st.DataObject) -> None:
    x, w, _ = case.tensors()
    if x.numel() == 0 or x.dim() == 1 or not case.fused:
        return
    whole = ops.rms_norm(x, w, case.eps)
    index = tuple(data.draw(st.integers(0, size - 1)) for size in x.shape[:-1])
    row_of_scale = w.expand(x.shape)[index]
    assert_same_bits(ops.rms_norm(x[index], row_of_scale, case.eps), whole[index])


@given(cases(TAME, TAME, EPS[:-1]))
@EXHAUSTIVE
def test_scaling_the_input_by_a_power_of_two_changes_nothing(case: Case) -> None:
    """Without eps, the norm is the same of 4 x as of x: exactly, as no bit of it is lost."""
    if case.input_dtype == torch.float16 or case.values == "spike":
        return  # 4 x is not always a number then
    x, w, _ = case.tensors()
    assert_same_bits(ops.rms_norm(4 * x, w, 0.0), ops.rms_norm(x, w, 0.0))


@given(cases(TAME, TAME), st.sampled_from(FLOATS))
@EXHAUSTIVE
def test_an_input_with_the_negative_bit(case: Case, dtype: torch.dtype) -> None:
    """Such as the imaginary part of a conjugate: the values are those of its memory, negated."""
    x, w, _ = case.tensors()
    negated = torch._neg_view(x.clone())
    assert_same_bits(ops.rms_norm(negated, w, case.eps), -ops.rms_norm(x.clone(), w, case.eps))


def test_the_drawn_cases_are_of_both_kinds() -> None:
    """`Case.fused` follows the rule of the kernels."""
    fused = {
        ((2, 3, 5, 16), (16,)): True,
        ((2, 3, 5, 16), (3, 1, 16)): True,
        ((2, 3, 5, 16), (5, 16)): True,
        ((2, 3, 5, 16), (2, 3, 1, 16)): True,
        ((2, 3, 5, 16), (2, 1, 1, 16)): True,
        ((2, 3, 5, 16), (2, 1, 5, 16)): False,
        ((2, 1, 5, 16), (2, 1, 5, 16)): True,
        ((5, 1), (5, 1)): True,
    }
    common = (torch.float32, torch.float32, "dense", "dense", "normal", "normal", 1e-5, 0)
    for (shape, scale), expected in fused.items():
        case = Case(shape, scale, *common)
        assert case.fused == expected
        x, w, _ = case.tensors()
        with torch.profiler.profile() as profile:
            ops.rms_norm(x, w)
        composed = "aten::rsqrt" in {event.key for event in profile.key_averages()}
        assert composed != expected


# Found by the tests above and by tests/fuzz_ops.py, shrunk.


def test_no_elements_in_more_dimensions_than_the_kernels_describe() -> None:
    """Was a write behind an array on the stack."""
    x = torch.ones(8).as_strided((0, *(2,) * 70, 8), (1,) * 72).requires_grad_()
    w = torch.ones(8, requires_grad=True)
    y = ops.rms_norm(x, w)
    assert y.shape == x.shape
    y.sum().backward()
    assert torch.equal(w.grad, torch.zeros(8))


@pytest.mark.parametrize("name", ["input", "scale", "grad_output"])
@pytest.mark.parametrize("kept", [0, 4, 60])
def test_freed_storage(name: str, kept: int) -> None:
    """FSDP frees parameters by resizing their storage. Was a crash."""
    tensors = {"grad_output": torch.ones(2, 8), "input": torch.ones(2, 8), "scale": torch.ones(8)}
    tensors[name] = tensors[name].clone()
    tensors[name].untyped_storage().resize_(min(kept, tensors[name].nbytes - 4))
    with pytest.raises(RuntimeError, match=f"rms_norm: expected {name} with .* bytes of storage"):
        torch.ops.coreai_torch.fused_rms_norm_backward(*tensors.values(), 1e-5, [True, True])
    if name != "grad_output":
        with pytest.raises(RuntimeError, match="the storage has been freed or resized"):
            ops.rms_norm(tensors["input"], tensors["scale"])
