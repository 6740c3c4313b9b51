"""The CUDA kernels, run on the CPU by the emulator of tests/simt, under its memory checker."""

from __future__ import annotations

import pytest
import simt_device
import torch
from cases import ALL_PAIRS, PAIRS, assert_accurate, names, oracle
from simt_device import CARDS, SCHEDULES, Simt, output_dtype
from torch import Tensor

from coreai_torch import reference

Pair = tuple[torch.dtype, torch.dtype]

KERNEL_PAIRS = tuple(p for p in ALL_PAIRS if p[0] == torch.float64 or p in PAIRS)
MAIN_PAIRS = (
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.bfloat16),
)
# Of each kernel's widths, for 16-bit input: those around which another instance takes over.
WIDTHS = (8, 64, 72, 128, 256, 264, 512, 1024, 1032, 2048, 3072, 4096, 5120, 6144, 8192)
WIDE_WIDTHS = (8200, 12288, 16384, 16392, 32776, 65536, 65544)  # clusters, or a way without them
ODD_WIDTHS = (1, 3, 33, 127, 129, 257, 513, 1025, 4095, 4097)


@pytest.fixture(scope="module")
def simt() -> Simt:
    return Simt(simt_device.build())


@pytest.fixture(autouse=True)
def _card(simt: Simt):
    """Each test finds the pretended card as it is by default."""
    simt.set_schedule("forward")
    simt.set_card()


def make(shape: tuple[int, ...], pair: tuple[torch.dtype, torch.dtype], scale_shape=None):
    """Random input, scale and gradient of the output."""
    x = (torch.randn(shape) * 1.7 + 0.3).to(pair[0])
    w = torch.randn(scale_shape or shape[-1:]).to(pair[1])
    return x, w, torch.randn(shape).to(output_dtype(x, w))


def check(
    simt: Simt,
    x: Tensor,
    w: Tensor,
    dy: Tensor,
    eps: float = 1e-5,
    output: Tensor | None = None,
    grad_input: Tensor | None = None,
) -> None:
    """Forward and backward: accurate, everything written, nothing else touched."""
    forward = simt.forward(x, w, eps, output=output)
    backward = simt.backward(dy, x, w, eps, grad_input=grad_input)
    ours = (forward["output"], backward["grad_input"], backward["grad_scale"])
    if x.dtype == torch.float64:
        for result, exact in zip(ours, oracle(x, w, dy, eps), strict=True):
            scale_error = torch.finfo(result.dtype).eps * 8
            torch.testing.assert_close(result.double(), exact, rtol=scale_error, atol=1e-13)
    else:
        assert_accurate(ours, x, w, dy, eps)
    assert forward.buffers["output"].gaps_are_untouched()
    assert backward.buffers["grad_input"].gaps_are_untouched()


def test_the_checker_is_on(simt: Simt) -> None:
    simt.forward(torch.randn(2, 64), torch.randn(64))
    assert simt.library.simt_saw_access()


# Every width runs with every pair of dtypes; the schedules take turns.
@pytest.mark.parametrize("pair", KERNEL_PAIRS, ids=names)
@pytest.mark.parametrize("dim", WIDTHS)
def test_dtypes_and_widths(simt: Simt, pair: Pair, dim: int) -> None:
    turn = WIDTHS.index(dim) + KERNEL_PAIRS.index(pair)
    simt.set_schedule(SCHEDULES[turn % 4], seed=turn)
    check(simt, *make((37 if dim <= 512 else 7, dim), pair))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("pair", MAIN_PAIRS, ids=names)
@pytest.mark.parametrize("dim", [64, 128, 512, 1024, 4096])
def test_schedules(simt: Simt, schedule: str, pair: Pair, dim: int) -> None:
    simt.set_schedule(schedule, seed=dim)
    check(simt, *make((19 if dim <= 512 else 5, dim), pair))


@pytest.mark.parametrize("pair", PAIRS, ids=names)
@pytest.mark.parametrize("dim", ODD_WIDTHS)
def test_odd_widths(simt: Simt, pair: Pair, dim: int) -> None:
    simt.set_schedule(SCHEDULES[dim % 4], seed=dim)
    check(simt, *make((9, dim), pair))


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("pair", MAIN_PAIRS, ids=names)
@pytest.mark.parametrize("dim", WIDE_WIDTHS)
def test_wide_rows(simt: Simt, card: str, pair: Pair, dim: int) -> None:
    turn = WIDE_WIDTHS.index(dim) + MAIN_PAIRS.index(pair)
    simt.set_schedule(SCHEDULES[turn % 4], seed=turn)
    simt.set_card(9, **CARDS[card])
    check(simt, *make((3 if dim > 32776 else 9, dim), pair))


def heads_first(tensor: Tensor, heads: int) -> Tensor:
    """(batch, time, heads * dim) as (batch, heads, time, dim), without a copy."""
    return tensor.unflatten(-1, (heads, -1)).transpose(1, 2)


@pytest.mark.parametrize("pair", MAIN_PAIRS, ids=names)
@pytest.mark.parametrize("scale_shape", [(64,), (3, 1, 64), (2, 3, 1, 64), (5, 64)])
def test_heads_of_a_projection(simt: Simt, pair: Pair, scale_shape: tuple[int, ...]) -> None:
    """Queries, keys and values in one tensor: rows with gaps, in another order than memory's."""
    qkv = torch.randn(2, 5, 3 * 3 * 64).to(pair[0])
    x = heads_first(qkv[..., 3 * 64 : 6 * 64], 3)
    w = torch.randn(scale_shape).to(pair[1])
    grad = torch.randn(2, 5, 3 * 64).to(output_dtype(x, w))
    check(
        simt,
        x,
        w,
        heads_first(grad, 3),
        output=heads_first(torch.empty_like(grad), 3),
        grad_input=heads_first(torch.empty_like(qkv)[..., : 3 * 64], 3),
    )


def test_expanded_gradient(simt: Simt) -> None:
    x, w, _ = make((7, 128), (torch.bfloat16, torch.bfloat16))
    for sizes in ((7, 1), (1, 128)):
        dy = torch.randn(sizes, dtype=torch.bfloat16).expand(7, 128)
        if sizes == (7, 1):
            dy = dy.contiguous()
        check(simt, x, w, dy)


@pytest.mark.parametrize("pair", MAIN_PAIRS, ids=names)
@pytest.mark.parametrize("operand", ["input", "scale", "grad_output", "output", "grad_input"])
def test_unaligned_base(simt: Simt, pair: Pair, operand: str) -> None:
    """One element off: wide accesses would fault."""

    def shifted(tensor: Tensor) -> Tensor:
        storage = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
        return storage[1:].view(tensor.shape).copy_(tensor)

    x, w, dy = make((5, 256), pair)
    output, grad_input = torch.empty_like(dy), torch.empty_like(x)
    if operand == "input":
        x = shifted(x)
    elif operand == "scale":
        w = shifted(w)
    elif operand == "grad_output":
        dy = shifted(dy)
    elif operand == "output":
        output = shifted(output)
    else:
        grad_input = shifted(grad_input)
    check(simt, x, w, dy, output=output, grad_input=grad_input)


def test_row_stride_that_breaks_alignment(simt: Simt) -> None:
    x = torch.randn(6, 65, dtype=torch.float32)[:, :64]
    w, dy = torch.randn(64), torch.randn(6, 64)
    check(simt, x, w, dy)


def test_eight_row_dimensions(simt: Simt) -> None:
    sizes = (2, 1, 2, 3, 2, 1, 2, 2)
    x = torch.randn(*(size + 1 for size in sizes), 32)
    x = x[tuple(slice(size) for size in sizes)]
    check(simt, x, torch.randn(32), torch.randn(x.shape))


def test_too_many_row_dimensions_are_refused(simt: Simt) -> None:
    with pytest.raises(simt_device.SimtError):
        simt.forward(torch.randn(*([1] * 9), 32), torch.randn(32))


@pytest.mark.parametrize("shape", [(64,), (1, 64), (0, 64), (3, 0, 64)])
def test_few_and_no_rows(simt: Simt, shape: tuple[int, ...]) -> None:
    check(simt, *make(shape, (torch.float32, torch.float32)))


@pytest.mark.parametrize("eps", [0.0, 1e-12, 1.0])
@pytest.mark.parametrize("kind", ["tiny", "huge", "spike", "denormal", "zero"])
def test_hard_rows(simt: Simt, kind: str, eps: float) -> None:
    for pair in ((torch.float32, torch.float32), (torch.float16, torch.float16)):
        x, w, dy = make((8, 512), pair)
        if kind == "tiny":
            x = x * (1e-15 if pair[0] == torch.float32 else 1e-4)
        elif kind == "huge":
            x = x * (1e15 if pair[0] == torch.float32 else 1e4)
        elif kind == "spike":
            x = x * 1e-3
            x[:, 77] = torch.rand(8) * 50000 + 10000
        elif kind == "denormal" and eps > 0:
            x = torch.full_like(x, torch.finfo(pair[0]).smallest_normal / 4)
        elif kind == "zero" and eps > 0:
            x = torch.zeros_like(x)
        check(simt, x, w, dy, eps)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_numbers_stay_in_their_row(simt: Simt, value: float) -> None:
    x, w, dy = make((6, 256), (torch.float32, torch.float32))
    x[2, 17] = value
    forward, backward = simt.forward(x, w), simt.backward(dy, x, w)
    expected = reference.rms_norm(x, w, 1e-5)
    assert torch.equal(forward["output"].isnan(), expected.isnan())
    others = torch.arange(6) != 2
    assert forward["output"][others].isfinite().all()
    assert backward["grad_input"][others].isfinite().all()
    assert backward["grad_input"][2].isnan().any()
    assert backward["grad_scale"].isnan().any()


@pytest.mark.parametrize("mask", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("dim", [64, 4096, 4097, 32776])
def test_only_the_gradients_asked_for(simt: Simt, mask: tuple[bool, bool], dim: int) -> None:
    simt.set_card(clusters=False)
    x, w, dy = make((6, dim), (torch.float32, torch.float32))
    both, some = simt.backward(dy, x, w), simt.backward(dy, x, w, output_mask=mask)
    for name, wanted in zip(("grad_input", "grad_scale"), mask, strict=True):
        if wanted:
            assert torch.equal(some[name], both[name])
        assert (some.traffic(name).written > 0) == wanted


@pytest.mark.parametrize("dim", [64, 1024, 4097, 20000])
def test_rows_do_not_depend_on_other_rows(simt: Simt, dim: int) -> None:
    """Batch invariance: the same bits, whatever is beside a row and however many there are."""
    x, w, dy = make((9, dim), (torch.bfloat16, torch.bfloat16))
    forward, backward = simt.forward(x, w), simt.backward(dy, x, w)
    alone = slice(4, 5)
    assert torch.equal(simt.forward(x[alone].clone(), w)["output"], forward["output"][alone])
    few = simt.backward(dy[alone].clone(), x[alone].clone(), w)
    assert torch.equal(few["grad_input"], backward["grad_input"][alone])


@pytest.mark.parametrize("multiprocessors", [1, 2, 40])
@pytest.mark.parametrize("dim", [64, 512, 2048, 20000])
def test_any_number_of_multiprocessors(simt: Simt, multiprocessors: int, dim: int) -> None:
    simt.set_card(multiprocessors)
    check(simt, *make((50 if dim < 2048 else 9, dim), (torch.float32, torch.float32)))


def test_a_scale_for_every_row(simt: Simt) -> None:
    """Per-sample gradients: as many groups as rows, no partial sums."""
    x, _, dy = make((11, 64), (torch.float32, torch.float32))
    w = torch.randn(11, 64)
    check(simt, x, w, dy)
    assert simt.backward(dy, x, w).buffers["workspace"].bytes == 0


# ---- traffic: what a memory-bound kernel is about ------------------------------------------------


@pytest.mark.parametrize("pair", MAIN_PAIRS, ids=names)
@pytest.mark.parametrize("dim", [64, 128, 1024, 4096, 8192, 16384])
def test_rows_are_read_once_in_wide_accesses(simt: Simt, pair: Pair, dim: int) -> None:
    x, w, dy = make((6, dim), pair)
    forward = simt.forward(x, w)
    of_input, of_output = forward.traffic("input"), forward.traffic("output")
    assert of_input.read == of_input.read_wide == x.nbytes
    assert of_output.written == of_output.written_wide == dy.nbytes
    assert of_output.read == 0

    backward = simt.backward(dy, x, w)
    for name, tensor in (("input", x), ("grad_output", dy)):
        traffic = backward.traffic(name)
        assert traffic.read == traffic.read_wide == tensor.nbytes, name
    assert backward.traffic("grad_input").written_wide == x.nbytes
    assert backward.traffic("grad_scale").written == w.nbytes


def test_partial_sums_are_bounded_and_read_once(simt: Simt) -> None:
    x, w, dy = make((400, 256), (torch.bfloat16, torch.float32))
    launches = simt.launches
    backward = simt.backward(dy, x, w)
    assert simt.launches == launches + 2
    workspace = backward.traffic("workspace")
    assert workspace.written == workspace.read == backward.buffers["workspace"].bytes
    assert workspace.written <= 3 * 1024 // 128 * 256 * 4  # 3 multiprocessors, blocks of 128


def test_few_rows_take_one_launch(simt: Simt) -> None:
    x, w, dy = make((1, 4096), (torch.bfloat16, torch.bfloat16))
    launches = simt.launches
    simt.forward(x, w)
    simt.backward(dy, x, w)
    assert simt.launches == launches + 2


# ---- deliberate mistakes: does the checker find them? --------------------------------------------


def without(text: str, nth: int = 0):
    """A change that takes out one occurrence of a text."""

    def change(source: str) -> str:
        pieces = source.split(text)
        assert len(pieces) > nth + 1, f"{text!r} is not in the source any more"
        return text.join(pieces[: nth + 1]) + text.join(pieces[nth + 1 :])

    return change


def instead(text: str, other: str):
    """A change of one text for another."""

    def change(source: str) -> str:
        assert source.count(text) == 1, f"{text!r} is in the source {source.count(text)} times"
        return source.replace(text, other)

    return change


MISTAKES = {
    # name: file, change, width of the rows, what is reported
    "no barrier before the sums of other warps are read": (
        "row_sum.cuh",
        without("      __syncthreads();\n"),
        1024,
        "race: read of shared memory|uninitialized shared memory",
    ),
    "one buffer for the sums of all rows": (
        "rms_norm_backward.cuh",
        instead("row_buffer == buffer ? buffer + Resources::kSumBuffer : buffer;", "buffer;"),
        1024,
        "race: write of shared memory",
    ),
    "one access too many at the end of a row": (
        "rms_norm_forward.cuh",
        instead("return live && column(i) < dim;", "return live && column(i) <= dim;"),
        8008,
        "runs past the end of input|outside of every buffer",
    ),
    "rows beyond the last": (
        "rms_norm_forward.cuh",
        instead(" = W::kBlockRows == 1 || row < args.layout.rows;", " = true;"),
        64,
        # or in the buffer that happens to be next to it
        "runs past the end of input|outside of every buffer|output at byte",
    ),
    "other blocks of the cluster may not have started": (
        "rms_norm_forward.cuh",
        instead("    if constexpr (cluster > 1) cluster_wait();", "   "),
        66000,
        "may not have started",
    ),
    "other blocks of the cluster may not have started backward": (
        "rms_norm_backward.cuh",
        instead("    cluster_sync();  // the other blocks have started\n", ""),
        20000,
        "may not have started",
    ),
    "a barrier of the block where one of the cluster is needed": (
        "row_sum.cuh",
        instead("      cluster_sync();\n", "      __syncthreads();\n"),
        66000,
        "uninitialized shared memory|race|may not have started|exited",
    ),
    "sums of a cluster are read before they are there": (
        "rms_norm_backward.cuh",
        instead("      cluster_wait();\n      add_received", "      add_received"),
        20000,
        "race|uninitialized shared memory",
    ),
    "a row is read before it has arrived": (
        "rms_norm_backward.cuh",
        instead("mine.template wait<1>();\n    } else", "mine.template wait<2>();\n    } else"),
        1024,
        "uninitialized shared memory",
    ),
    "rows beyond the last are asked for": (
        "rms_norm_backward.cuh",
        instead(
            "if (k >= args_.rows_of_group) return;\n    int64_t offset[3]", "int64_t offset[3]"
        ),
        1024,
        # or whatever buffer happens to be next to it
        "without waiting for its copies|outside of every buffer|runs past the end|uninitialized",
    ),
    "no barrier before sums take the place of rows": (
        "rms_norm_backward.cuh",
        instead("    __syncthreads();  // the last rows have been read\n", ""),
        64,
        "race: write of shared memory",
    ),
    "no barrier before the sums of other rows are read": (
        "rms_norm_backward.cuh",
        instead("    __syncthreads();\n    for (int c", "    for (int c"),
        64,
        "race: read of shared memory|uninitialized shared memory",
    ),
    "no barrier in the second stage": (
        "rms_norm_backward.cuh",
        instead("  __syncthreads();\n#pragma unroll\n  for (int c", "#pragma unroll\n  for (int c"),
        1024,
        "race: read of shared memory|uninitialized shared memory",
    ),
    "only live threads meet at the barrier": (
        "rms_norm_forward.cuh",
        instead("    float sum[1] = {0};\n", "    if (!live) return;\n    float sum[1] = {0};\n"),
        64,
        "deadlock",
    ),
    "two blocks write one partial sum": (
        "rms_norm_backward.cuh",
        instead("args.parts + part)", "args.parts + 0 * part)"),
        1024,
        "race: write of workspace|uninitialized workspace",
    ),
    "wide accesses to an unaligned base": (
        "alignment.cuh",
        instead(
            "return reinterpret_cast<uintptr_t>(p) %", "return 0 * reinterpret_cast<uintptr_t>(p) %"
        ),
        64,
        "misaligned",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_reported(mistake: str, tmp_path) -> None:
    file, change, dim, report = MISTAKES[mistake]
    simt = Simt(simt_device.build_changed(tmp_path, file, change))
    simt.set_card(multiprocessors=9 if dim > 8192 else 1)
    x, w, dy = make((23, dim), (torch.bfloat16, torch.bfloat16))
    if "unaligned" in mistake:
        x = torch.cat([x.flatten(), x.flatten()[:1]])[1:].view(x.shape)

    def run() -> None:
        simt.forward(x, w)
        simt.backward(dy, x, w)

    for schedule in SCHEDULES:
        simt.set_schedule(schedule, seed=3)
        with pytest.raises(simt_device.SimtError, match=report):
            run()
