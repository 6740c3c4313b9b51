"""The CUDA kernels of the residual add and RMSNorm, on the emulator; see test_cuda_simt.py."""

from __future__ import annotations

import pytest
import simt_device
import torch
from cases import assert_no_worse, names, oracle, with_gradients
from simt_device import CARDS, SCHEDULES, Simt, output_dtype
from test_cuda_simt import heads_first, instead
from torch import Tensor

from coreai_torch import reference

Pair = tuple[torch.dtype, torch.dtype]
PAIRS = (
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
    (torch.float64, torch.float64),
)
WIDTHS = (8, 64, 128, 264, 512, 1024, 2048, 4096, 5120, 6144, 8192)
WIDE_WIDTHS = (8200, 16384, 32776, 65536)
ODD_WIDTHS = (1, 3, 33, 129, 1025, 4097)


@pytest.fixture
def simt() -> Simt:
    """The pretended card as it is by default."""
    return Simt(simt_device.build())


def make(shape: tuple[int, ...], pair: Pair, scale_shape=None) -> tuple[Tensor, ...]:
    """Random input, residual, scale, and gradients of the output and of the sum."""
    x, r = ((torch.randn(shape) * 1.7 + 0.3).to(pair[0]) for _ in range(2))
    w = torch.randn(scale_shape or shape[-1:]).to(pair[1])
    return x, r, w, torch.randn(shape).to(output_dtype(x, w)), torch.randn(shape).to(pair[0])


def check(
    simt: Simt,
    x: Tensor,
    r: Tensor,
    w: Tensor,
    dy: Tensor,
    dh: Tensor,
    output: Tensor | None = None,
    new_residual: Tensor | None = None,
    grad_input: Tensor | None = None,
) -> None:
    """The sum has the bits of an addition, the norm is that of the sum; gradients are accurate."""
    forward = simt.forward(x, w, residual=r, output=output, new_residual=new_residual)
    h = forward["new_residual"]
    assert torch.equal(h, x + r)
    backward = simt.backward(dy, h, w, grad_input=grad_input, grad_new_residual=dh)
    grad_input = backward["grad_input"]
    exact = oracle(h, w, dy, 1e-5)
    ours = forward["output"], backward["grad_scale"]
    if x.dtype == torch.float64:
        for result, expected in zip(ours, (exact[0], exact[2]), strict=True):
            torch.testing.assert_close(result, expected, rtol=1e-14, atol=1e-13)
    else:
        theirs = with_gradients(reference.rms_norm, h, w, dy, 1e-5)
        rows = x.shape[:-1].numel()
        assert_no_worse("output", ours[0], theirs[0], exact[0], rows)
        assert_no_worse("grad_scale", ours[1], theirs[2], exact[2], rows)
    if x.numel():  # rounded once: half an ulp in 16 bits
        expected = exact[1] + dh.double()
        error, eps = (grad_input.double() - expected).abs(), torch.finfo(x.dtype).eps
        noise = 16 * torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps
        rounding = 0.5 * eps * expected.abs() if x.dtype.itemsize == 2 else 0.0
        assert (error <= rounding + noise * (expected.abs() + expected.abs().mean())).all()
    assert forward.buffers["output"].gaps_are_untouched()
    assert forward.buffers["new_residual"].gaps_are_untouched()
    assert backward.buffers["grad_input"].gaps_are_untouched()


@pytest.mark.parametrize("pair", PAIRS, ids=names)
@pytest.mark.parametrize("dim", WIDTHS)
def test_dtypes_and_widths(simt: Simt, pair: Pair, dim: int) -> None:
    turn = WIDTHS.index(dim) + PAIRS.index(pair)
    simt.set_schedule(SCHEDULES[turn % 4], seed=turn)
    check(simt, *make((37 if dim <= 512 else 5, dim), pair))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dim", [64, 128, 1024, 4096])
def test_schedules(simt: Simt, schedule: str, dim: int) -> None:
    simt.set_schedule(schedule, seed=dim)
    check(simt, *make((19 if dim <= 512 else 5, dim), PAIRS[1]))


@pytest.mark.parametrize("pair", PAIRS[:5], ids=names)
@pytest.mark.parametrize("dim", ODD_WIDTHS)
def test_odd_widths(simt: Simt, pair: Pair, dim: int) -> None:
    simt.set_schedule(SCHEDULES[dim % 4], seed=dim)
    check(simt, *make((9, dim), pair))


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("pair", PAIRS[:3], ids=names)
@pytest.mark.parametrize("dim", WIDE_WIDTHS)
def test_wide_rows(simt: Simt, card: str, pair: Pair, dim: int) -> None:
    turn = WIDE_WIDTHS.index(dim) + PAIRS.index(pair)
    simt.set_schedule(SCHEDULES[turn % 4], seed=turn)
    simt.set_card(9, **CARDS[card])
    check(simt, *make((3 if dim > 32776 else 9, dim), pair))


@pytest.mark.parametrize("pair", PAIRS[:3], ids=names)
@pytest.mark.parametrize("scale_shape", [(64,), (3, 1, 64), (2, 3, 1, 64)], ids=str)
def test_every_operand_with_strides_of_its_own(
    simt: Simt, pair: Pair, scale_shape: tuple[int, ...]
) -> None:
    x = heads_first(torch.randn(2, 5, 3 * 3 * 64).to(pair[0])[..., 3 * 64 : 6 * 64], 3)
    r = torch.randn(2, 3, 5, 72).to(pair[0])[..., :64]
    w = torch.randn(scale_shape).to(pair[1])
    dy = heads_first(torch.randn(2, 5, 3 * 64).to(output_dtype(x, w)), 3)
    dh = torch.randn(5, 64).to(pair[0]).expand(2, 3, 5, 64)
    check(
        simt,
        x,
        r,
        w,
        dy,
        dh,
        output=heads_first(torch.empty(2, 5, 3 * 64, dtype=dy.dtype), 3),
        new_residual=torch.empty(2, 3, 5, 80, dtype=pair[0])[..., :64],
        grad_input=heads_first(torch.empty(2, 5, 6 * 64, dtype=pair[0])[..., 192:], 3),
    )


@pytest.mark.parametrize(
    "operand", ["x", "r", "w", "dy", "dh", "output", "new_residual", "grad_input"]
)
def test_unaligned_base(simt: Simt, operand: str) -> None:
    """One element off: wide accesses would fault."""

    def shifted(tensor: Tensor) -> Tensor:
        storage = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
        return storage[1:].view(tensor.shape).copy_(tensor)

    x, r, w, dy, dh = make((5, 256), PAIRS[1])
    operands = {"x": x, "r": r, "w": w, "dy": dy, "dh": dh}
    operands |= {name: torch.empty_like(x) for name in ("output", "new_residual", "grad_input")}
    operands[operand] = shifted(operands[operand])
    check(simt, **operands)


@pytest.mark.parametrize("shape", [(64,), (1, 64), (0, 64), (3, 0, 64)], ids=str)
def test_few_and_no_rows(simt: Simt, shape: tuple[int, ...]) -> None:
    check(simt, *make(shape, PAIRS[0]))


@pytest.mark.parametrize("dim", [64, 4096, 4097, 32776])
def test_without_a_gradient_of_the_scale(simt: Simt, dim: int) -> None:
    simt.set_card(clusters=False)
    x, _, w, dy, dh = make((6, dim), PAIRS[0])
    both = simt.backward(dy, x, w, grad_new_residual=dh)
    some = simt.backward(dy, x, w, grad_new_residual=dh, output_mask=(True, False))
    assert torch.equal(some["grad_input"], both["grad_input"])
    assert some.traffic("grad_scale").written == 0


@pytest.mark.parametrize("dim", [64, 1024, 4097, 20000])
def test_rows_do_not_depend_on_other_rows(simt: Simt, dim: int) -> None:
    x, r, w, dy, dh = make((9, dim), PAIRS[1])
    forward = simt.forward(x, w, residual=r)
    backward = simt.backward(dy, x, w, grad_new_residual=dh)
    rows = slice(4, 5)
    x, r, dy, dh = (t[rows].clone() for t in (x, r, dy, dh))
    assert torch.equal(simt.forward(x, w, residual=r)["output"], forward["output"][rows])
    alone = simt.backward(dy, x, w, grad_new_residual=dh)
    assert torch.equal(alone["grad_input"], backward["grad_input"][rows])


# ---- traffic -------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", PAIRS[:3], ids=names)
@pytest.mark.parametrize("dim", [64, 128, 1024, 4096, 8192, 16384])
def test_every_operand_is_moved_once_in_wide_accesses(simt: Simt, pair: Pair, dim: int) -> None:
    x, r, w, dy, dh = make((6, dim), pair)
    forward = simt.forward(x, w, residual=r)
    for name in ("input", "residual"):
        traffic = forward.traffic(name)
        assert traffic.read == traffic.read_wide == x.nbytes, name
    for name, tensor in (("output", dy), ("new_residual", x)):
        traffic = forward.traffic(name)
        assert traffic.written == traffic.written_wide == tensor.nbytes, name
        assert traffic.read == 0, name

    backward = simt.backward(dy, x, w, grad_new_residual=dh)
    for name, tensor in (("input", x), ("grad_output", dy), ("grad_new_residual", dh)):
        traffic = backward.traffic(name)
        assert traffic.read == traffic.read_wide == tensor.nbytes, name
    assert backward.traffic("grad_input").written_wide == x.nbytes
    assert backward.traffic("grad_input").read == 0


@pytest.mark.parametrize("dim", [33, 65544])
def test_rows_of_any_width_are_read_once_too(simt: Simt, dim: int) -> None:
    """Forward comes back to the sum that it wrote, and not to the addends."""
    simt.set_card(clusters=False)
    x, r, w, dy, dh = make((3, dim), PAIRS[1])
    forward = simt.forward(x, w, residual=r)
    assert forward.traffic("input").read == forward.traffic("residual").read == x.nbytes
    assert forward.traffic("new_residual").read == x.nbytes
    backward = simt.backward(dy, x, w, grad_new_residual=dh)
    assert backward.traffic("grad_new_residual").read == dh.nbytes


# ---- deliberate mistakes -------------------------------------------------------------------------

ADDED = """const Input* more = added_to(k);
#pragma unroll
      for (int i = 0; i < kAccesses; ++i) {
        """
MISTAKES = {
    # name: file, change, width of the rows, what is reported
    "the sum is written beyond the end of a row": (
        "rms_norm_forward.cuh",
        instead("if (has(i)) x[i].store(new_residual", "if (live) x[i].store(new_residual"),
        72,
        "race: write of new_residual|runs past the end of new_residual|outside of every buffer",
    ),
    "the sum is read before it is written": (
        "rms_norm_forward.cuh",
        instead("        x[i].store(new_residual + first + i * step);\n", ""),
        33,
        "uninitialized new_residual",
    ),
    "the gradient is read beyond the end of a row": (
        "rms_norm_backward.cuh",
        instead(ADDED + "if (!has(i)) continue;", ADDED),
        72,
        "runs past the end of grad_new_residual|outside of every buffer",
    ),
    "wide accesses to an unaligned residual": (
        "rms_norm_forward.cuh",
        instead("is_aligned<Input, N>(shape, call.residual, call.residual_strides)", "true"),
        64,
        "misaligned",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_reported(mistake: str, tmp_path) -> None:
    file, change, dim, report = MISTAKES[mistake]
    entry = "add_rms_norm_bfloat16.cu"
    simt = Simt(simt_device.build_changed(tmp_path, file, change, entry))
    simt.set_card(multiprocessors=1)
    x, r, w, dy, dh = make((23, dim), PAIRS[1])
    if "unaligned" in mistake:
        r = torch.cat([r.flatten(), r.flatten()[:1]])[1:].view(r.shape)

    def run() -> None:
        h = simt.forward(x, w, residual=r)["new_residual"]
        simt.backward(dy, h, w, grad_new_residual=dh)

    for schedule in SCHEDULES:
        simt.set_schedule(schedule, seed=3)
        with pytest.raises(simt_device.SimtError, match=report):
            run()
