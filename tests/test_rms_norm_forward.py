"""The forward: bit-equal to the eager reference, whatever the dtypes, layouts and values."""

from __future__ import annotations

import pytest
import torch
from cases import ALL_PAIRS, FLOATS, PAIRS, names

from coreai_torch import ops, reference

WIDTHS = (
    *(1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 31, 32, 33, 64, 65, 100, 127, 128, 500),
    *(511, 512, 513, 1000, 1024, 4097),  # sums of more than one level, from 512 on
)


def assert_same_bits(a: torch.Tensor, b: torch.Tensor) -> None:
    """Of everything but numbers that are none."""
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(a.signbit() & ~a.isnan(), b.signbit() & ~b.isnan())


@pytest.mark.parametrize("pair", ALL_PAIRS, ids=names)
def test_same_bits_as_the_reference(pair, level):
    for dim in WIDTHS:
        for rows in (1, 5, 33):
            x, w = torch.randn(rows, dim).to(pair[0]), torch.randn(dim).to(pair[1])
            assert_same_bits(ops.rms_norm(x, w), reference.rms_norm(x, w))


@pytest.mark.parametrize("dim", [8160, 8191, 8192, 8193, 8704, 11008, 16384, 65536])
def test_same_bits_in_long_rows(dim, level):
    for dtype in FLOATS:
        x, w = torch.randn(5, dim).to(dtype), torch.randn(dim).to(dtype)
        assert_same_bits(ops.rms_norm(x, w), reference.rms_norm(x, w))


@pytest.mark.slow
def test_same_bits_where_the_cascade_has_all_its_levels(level):
    x, w = torch.randn(2, 1 << 20), torch.randn(1 << 20)
    assert_same_bits(ops.rms_norm(x, w), reference.rms_norm(x, w))


SCALES = {
    "plain": (16,),
    "per head": (3, 1, 16),
    "per token": (5, 16),
    "per head and token": (3, 5, 16),
    "per sample": (2, 1, 1, 16),
    "per sample and head": (2, 3, 1, 16),
    "full": (2, 3, 5, 16),
    "not a grouping": (2, 1, 5, 16),
    "ones in front": (1, 1, 1, 16),
}


@pytest.mark.parametrize("shape", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("pair", PAIRS, ids=names)
def test_scale_shapes(shape, pair):
    x, w = torch.randn(2, 3, 5, 16).to(pair[0]), torch.randn(shape).to(pair[1])
    assert_same_bits(ops.rms_norm(x, w), reference.rms_norm(x, w))


LAYOUTS = {
    "contiguous": lambda: torch.randn(4, 6, 10, 48),
    "transposed heads": lambda: torch.randn(4, 10, 6, 48).transpose(1, 2),
    "slice of qkv": lambda: torch.randn(4, 10, 3 * 6, 48)[:, :, 6:12].transpose(1, 2),
    "sliced rows": lambda: torch.randn(4, 6, 20, 48)[:, :, ::2],
    "sliced columns": lambda: torch.randn(4, 6, 10, 64)[..., 5:53],
    "storage offset": lambda: torch.randn(4 * 6 * 10 * 48 + 1)[1:].view(4, 6, 10, 48),
    "expanded rows": lambda: torch.randn(4, 1, 10, 48).expand(4, 6, 10, 48),
    "expanded elements": lambda: torch.randn(4, 6, 10, 1).expand(4, 6, 10, 48),
    "flipped": lambda: torch.randn(4, 6, 10, 48).flip(1, 3),
    "channels last": lambda: torch.randn(4, 6, 10, 48).to(memory_format=torch.channels_last),
    "column major": lambda: torch.randn(48, 10, 6, 4).permute(3, 2, 1, 0),
    "permuted": lambda: torch.randn(10, 4, 6, 48).permute(1, 2, 0, 3),
    "overlapping rows": lambda: torch.randn(1000).as_strided((4, 6, 10, 48), (200, 31, 3, 1)),
}


@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS, ids=names)
def test_layouts(make, dtype):
    x = make().to(dtype)
    w = torch.randn(6, 1, 48, dtype=dtype)
    y = ops.rms_norm(x, w)
    assert_same_bits(y, reference.rms_norm(x.contiguous(), w))
    assert y.stride() == torch.empty_like(x).stride()


def test_a_row_with_adjacent_elements_is_not_copied():
    x = torch.randn(4, 10, 18, 48)[:, :, 6:12].transpose(1, 2)
    with torch.profiler.profile() as profile:
        ops.rms_norm(x, torch.randn(6, 1, 48))
    called = {event.key for event in profile.key_averages()}
    assert "coreai_torch::fused_rms_norm" in called
    assert not called & {"aten::copy_", "aten::clone", "aten::contiguous"}


def test_every_element_is_written_and_none_beside():
    base = torch.full((3, 40), float("nan"))
    x = torch.randn(3, 33)
    for _ in range(20):  # recycled memory, full of NaN
        poison = torch.full((3, 33), float("nan"))
        del poison
        assert not ops.rms_norm(x, torch.ones(33)).isnan().any()
    assert base.isnan().all()


VALUES = {
    "zeros": lambda x: torch.zeros_like(x),
    "tiny": lambda x: x * 1e-20,
    "denormal": lambda x: x * 1e-39,
    "huge": lambda x: x * 1e18,
    "overflowing squares": lambda x: x * 1e25,
    "one spike": lambda x: torch.where(torch.arange(x.shape[-1]) == 7, 6e4, x * 1e-3),
    "near the largest float16": lambda x: x.sign() * 65504,
    "infinite": lambda x: torch.where(torch.arange(x.shape[-1]) == 3, float("inf"), x),
    "not a number": lambda x: torch.where(torch.arange(x.shape[-1]) == 3, float("nan"), x),
    "negative zero": lambda x: x * -0.0,
}


@pytest.mark.parametrize("make", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("pair", PAIRS, ids=names)
@pytest.mark.parametrize("eps", [1e-5, 0.0])
def test_values(make, pair, eps, level):
    x, w = make(torch.randn(5, 67)).to(pair[0]), torch.randn(67).to(pair[1])
    assert_same_bits(ops.rms_norm(x, w, eps), reference.rms_norm(x, w, eps))


@pytest.mark.parametrize("dtype", FLOATS, ids=names)
def test_results_that_are_denormal(dtype, level):
    x = torch.randn(5, 67, dtype=dtype)
    w = (torch.randn(67) * (1e-39 if dtype != torch.float16 else 1e-6)).to(dtype)
    assert_same_bits(ops.rms_norm(x, w), reference.rms_norm(x, w))


@pytest.mark.parametrize("pair", PAIRS, ids=names)
def test_a_single_tiny_number(pair, level):
    """Among ordinary ones, in the input, the scale, or both; of every size that matters."""
    dim = 67
    for place in (0, 31, 64, 66):
        exponents = torch.arange(-150.0, -90.0, 1.5)
        tiny = (2**exponents).unsqueeze(-1).to(pair[0])
        x = torch.randn(len(exponents), dim).to(pair[0])
        x[:, place : place + 1] = torch.where(
            torch.arange(len(exponents))[:, None] % 3 > 0, tiny, 0
        )
        w = torch.randn(dim).to(pair[1])
        for scale_there in (0.7, -1e-30, 1e-38, 0.0):
            w[place] = scale_there
            assert_same_bits(ops.rms_norm(x, w, 0.0), reference.rms_norm(x, w, 0.0))
            output, total = ops.add_rms_norm(x, torch.zeros_like(x), w)
            assert_same_bits(total, x)
            assert_same_bits(output, reference.rms_norm(x, w))


@pytest.mark.parametrize("heads", [3, 4])
@pytest.mark.parametrize("dim", [48, 64])
@pytest.mark.parametrize("pair", PAIRS, ids=names)
def test_a_tiny_number_in_the_scale_of_one_head(pair, dim, heads, level):
    x = torch.randn(2, 9, heads, dim).to(pair[0]).transpose(1, 2)
    for head in range(heads):
        for tiny in (-1e-30, 1e-38, 1e-39, 0.0):
            w = torch.randn(heads, 1, dim).to(pair[1])
            w[head, 0, 5] = tiny
            assert_same_bits(ops.rms_norm(x, w), reference.rms_norm(x, w))


def test_all_16_bit_patterns(level):
    """Loading and rounding are right for every number of the type."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        w = bits.view(dtype)
        x = torch.ones(1, 2**16, dtype=dtype)
        assert_same_bits(ops.rms_norm(x, w, 0.0), reference.rms_norm(x, w, 0.0))


def finite_bits(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Any finite number as likely as any other, so that they are of every size."""
    bits = torch.randint(-(2**15), 2**15, shape, dtype=torch.int32).to(torch.int16)
    numbers = bits.view(dtype)
    return torch.where(numbers.isfinite(), numbers, 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=names)
def test_16_bit_numbers_of_every_size(dtype, level):
    """Products and sums of the type are rounded once, also where processors compute with it."""
    for dim in (64, 67, 4096):
        x, r, w = (finite_bits(*shape, dtype=dtype) for shape in ((99, dim), (99, dim), (dim,)))
        similar = torch.randn(99, dim).to(dtype)
        for a in (x, similar):
            assert_same_bits(ops.rms_norm(a, w, 0.0), reference.rms_norm(a, w, 0.0))
            output, total = ops.add_rms_norm(a, r, w)
            assert_same_bits(total, a + r)
            assert_same_bits(output, reference.rms_norm(a + r, w))


SCALES_OF_NANS = {
    "bfloat16": lambda nans: nans,
    "float32": lambda nans: torch.full((nans.numel(),), 0x7FFFFFFF, dtype=torch.int32).view(
        torch.float32
    ),
}


@pytest.mark.parametrize("scale", SCALES_OF_NANS)
def test_every_nan_of_bfloat16_stays_one(scale, level):
    """Rounded like numbers, some would be infinite or zero."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    nans = bits.view(torch.bfloat16)
    nans = nans[nans.isnan()]
    count, dim = nans.numel(), 70
    r, numbers = (torch.randn(count, dim).bfloat16() for _ in range(2))
    one_each = numbers.clone()
    places = torch.arange(count), torch.arange(count) % dim
    one_each[places] = nans
    w, nan_w = torch.randn(dim).to(getattr(torch, scale)), SCALES_OF_NANS[scale](nans)

    assert ops.rms_norm(one_each, w).isnan().all()
    assert ops.rms_norm(torch.randn(5, count).bfloat16(), nan_w).isnan().all()
    output, total = ops.add_rms_norm(one_each, r, w)
    assert output.isnan().all()
    assert_same_bits(total, one_each + r)

    for x, grad in ((one_each, numbers), (numbers, one_each)):
        x = x.clone().requires_grad_()
        ops.rms_norm(x, w).backward(grad)
        assert x.grad.isnan().all()
    x = torch.randn(5, count).bfloat16().requires_grad_()
    ops.rms_norm(x, nan_w).sum().backward()
    assert x.grad.isnan().all()


def test_a_row_does_not_depend_on_the_others():
    x, w = torch.randn(257, 1000, dtype=torch.bfloat16), torch.randn(1000)
    whole = ops.rms_norm(x, w)
    for rows in (slice(0, 1), slice(3, 4), slice(100, 257)):
        assert_same_bits(ops.rms_norm(x[rows], w), whole[rows])


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (0, 3, 5, 8), (2, 0), (8,), (1,), (1, 1)])
def test_small_shapes(shape):
    x, w = torch.randn(shape), torch.randn(shape[-1:])
    assert_same_bits(ops.rms_norm(x, w), reference.rms_norm(x, w))
