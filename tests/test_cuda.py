"""The op on a CUDA card; skipped without one. test_cuda_simt.py runs the kernels anywhere."""

from __future__ import annotations

import pytest
import torch
from cases import (
    ALL_PAIRS,
    PAIRS,
    assert_as_accurate_as_reference,
    assert_no_worse,
    names,
    oracle,
    with_gradients,
)
from torch import Tensor

from coreai_torch import _C, ops, reference
from coreai_torch.composite_ops import RMSNorm

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or _C.build_info()["cuda_version"] is None,
    reason="needs a CUDA card and a build with CUDA kernels",
)
DEVICE = torch.device("cuda")
WIDTHS = (64, 128, 256, 512, 1024, 3072, 4096, 5120, 6144, 8192, 16384, 32768, 65536)
WIDTHS += (131072, 200000)  # a cluster of the largest size, and what is too wide for any
ODD_WIDTHS = (1, 3, 33, 127, 1023, 4095, 4097, 16385)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


@pytest.mark.parametrize("pair", PAIRS, ids=names)
@pytest.mark.parametrize("dim", WIDTHS + ODD_WIDTHS)
def test_accuracy(pair: tuple[torch.dtype, torch.dtype], dim: int) -> None:
    rows = max(8, min(1000, 2**22 // dim))
    x, w = randn(rows, dim, dtype=pair[0]), randn(dim, dtype=pair[1])
    assert_as_accurate_as_reference(x, w, randn(rows, dim))


@pytest.mark.parametrize("pair", [p for p in ALL_PAIRS if torch.float64 in p], ids=names)
def test_float64(pair: tuple[torch.dtype, torch.dtype]) -> None:
    x, w, dy = randn(50, 300, dtype=pair[0]), randn(300, dtype=pair[1]), randn(50, 300)
    if pair[0] != torch.float64:  # sums are taken in the precision of the input's dtype
        assert_as_accurate_as_reference(x, w, dy)
        return
    dy = dy.to(reference.rms_norm(x, w).dtype)
    ours = with_gradients(ops.rms_norm, x, w, dy, 1e-5)
    theirs = with_gradients(reference.rms_norm, x, w, dy, 1e-5)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("rows", [1, 64, 2048, 32768, 1_000_000])
def test_numbers_of_rows(rows: int) -> None:
    x, w = randn(rows, 128, dtype=torch.bfloat16), randn(128)
    assert_as_accurate_as_reference(x, w, randn(rows, 128))


@pytest.mark.parametrize("scale_shape", [(64,), (6, 1, 64), (2, 6, 1, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=names)
def test_heads_of_a_projection(scale_shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """No copy of the input: the only memory asked for is that of the output."""
    qkv = randn(2, 512, 3 * 6 * 64, dtype=dtype)
    x = qkv[..., 6 * 64 : 12 * 64].unflatten(-1, (6, 64)).transpose(1, 2)
    w = randn(*scale_shape)
    assert_as_accurate_as_reference(x, w, randn(2, 512, 6, 64).transpose(1, 2))
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    torch.cuda.reset_peak_memory_stats()
    y = ops.rms_norm(x, w)
    taken = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
    assert taken == y.numel() * y.element_size()


LAYOUTS = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "padded rows": lambda t: torch.nn.functional.pad(t, (0, 8))[..., :-8],
    "every second element": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "unaligned": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
    "expanded": lambda t: t[:1].expand_as(t),
    "one number": lambda t: t.flatten()[0].expand_as(t),
}


@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, grad_layout: str) -> None:
    x = LAYOUTS[layout](randn(6, 7, 256, dtype=torch.bfloat16))
    dy = LAYOUTS[grad_layout](randn(6, 7, 256, dtype=torch.bfloat16))
    w = randn(256, dtype=torch.bfloat16)
    same = with_gradients(ops.rms_norm, x.contiguous(), w, dy.contiguous(), 1e-5)
    for a, b in zip(with_gradients(ops.rms_norm, x, w, dy, 1e-5), same, strict=True):
        torch.testing.assert_close(a, b)


def test_more_row_dimensions_than_the_kernels_take() -> None:
    x = randn(*[3] * 10, 16)[tuple([slice(2)] * 10)]
    w = randn(16)
    torch.testing.assert_close(ops.rms_norm(x, w), reference.rms_norm(x, w))


@pytest.mark.parametrize("shape", [(0, 64), (3, 0, 64), (4, 0)])
def test_no_rows(shape: tuple[int, ...]) -> None:
    x, w = randn(*shape).requires_grad_(), randn(shape[-1]).requires_grad_()
    ops.rms_norm(x, w).sum().backward()
    assert w.grad is not None
    assert torch.equal(w.grad, torch.zeros_like(w))


def test_gradients_by_finite_differences() -> None:
    x = torch.randn(3, 40, device=DEVICE, dtype=torch.float64, requires_grad=True)
    w = torch.randn(40, device=DEVICE, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ops.rms_norm, (x, w))
    assert torch.autograd.gradgradcheck(ops.rms_norm, (x, w))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=names)
def test_opcheck(dtype: torch.dtype) -> None:
    x, w = randn(6, 64, dtype=dtype), randn(64, dtype=dtype)
    namespace = torch.ops.coreai_torch
    torch.library.opcheck(namespace.fused_rms_norm, (x, w, 1e-5))
    torch.library.opcheck(namespace.fused_rms_norm_backward, (x, x, w, 1e-5, [True, True]))
    torch.library.opcheck(namespace.fused_add_rms_norm, (x, x, w, 1e-5))
    torch.library.opcheck(namespace.fused_add_rms_norm_backward, (x, x, x, w, 1e-5, [True, True]))
    torch.library.opcheck(namespace.rms_norm, (x.requires_grad_(), w.requires_grad_(), 1e-5))


@pytest.mark.parametrize("dim", [64, 4096, 16384, 65536])
def test_rows_do_not_depend_on_other_rows(dim: int) -> None:
    x, w = randn(300, dim, dtype=torch.bfloat16), randn(dim, dtype=torch.bfloat16)
    y = ops.rms_norm(x, w)
    for rows in (1, 2, 17):
        assert torch.equal(ops.rms_norm(x[:rows], w), y[:rows])


@pytest.mark.parametrize("dim", [64, 4096, 16384])
def test_the_same_bits_every_time(dim: int) -> None:
    x, w, dy = randn(3000, dim), randn(dim), randn(3000, dim)
    first = with_gradients(ops.rms_norm, x, w, dy, 1e-5)
    for _ in range(3):
        again = with_gradients(ops.rms_norm, x, w, dy, 1e-5)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def apart(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    return reference.rms_norm(x + r, w), x + r


def add_with_gradients(function, x: Tensor, r: Tensor, w: Tensor, dy: Tensor, dh: Tensor):
    """Both outputs, and the gradients of the three tensors."""
    leaves = [t.detach().requires_grad_() for t in (x, r, w)]
    outputs = function(*leaves)
    return *outputs, *torch.autograd.grad(outputs, leaves, (dy.to(outputs[0].dtype), dh))


@pytest.mark.parametrize("pair", PAIRS, ids=names)
@pytest.mark.parametrize("dim", WIDTHS + ODD_WIDTHS)
def test_residual_add(pair: tuple[torch.dtype, torch.dtype], dim: int) -> None:
    """Narrow rows are drawn several times: a single sum of grad_scale has its luck."""
    rows = max(8, min(1000, 2**22 // dim))
    draws = 16 if dim < 8 else 1
    results: dict[str, list] = {"output": [], "grad_input": [], "grad_scale": []}
    for _ in range(draws):
        x, r, dh = (randn(rows, dim, dtype=pair[0]) for _ in range(3))
        w, dy = randn(dim, dtype=pair[1]), randn(rows, dim)
        ours, theirs = (add_with_gradients(f, x, r, w, dy, dh) for f in (ops.add_rms_norm, apart))
        h = x + r
        assert torch.equal(ours[1], h)
        assert torch.equal(ours[2], ours[3])
        exact = oracle(h, w, dy.to(ours[0].dtype), 1e-5)
        rstd = (h.double().square().mean(-1, keepdim=True) + 1e-5).rsqrt()
        ones = torch.ones_like(rstd), torch.ones_like(exact[2])
        results["output"] += [(ours[0], theirs[0], exact[0], ones[0])]
        results["grad_input"] += [(ours[2], theirs[2], exact[1] + dh.double(), rstd)]
        results["grad_scale"] += [(ours[4], theirs[4], exact[2], ones[1])]
    for name, drawn in results.items():
        a, b, c, unit = (torch.cat(parts) for parts in zip(*drawn, strict=True))
        assert_no_worse(name, a, b, c, draws * rows, unit)


@pytest.mark.parametrize("residual_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_residual_add_of_any_layout(layout: str, residual_layout: str) -> None:
    x, dy = (LAYOUTS[layout](randn(6, 7, 256, dtype=torch.bfloat16)) for _ in range(2))
    r, dh = (LAYOUTS[residual_layout](randn(6, 7, 256, dtype=torch.bfloat16)) for _ in range(2))
    w = randn(256, dtype=torch.bfloat16)
    given = (x, r, w, dy, dh)
    dense = add_with_gradients(ops.add_rms_norm, *(t.contiguous() for t in given))
    for a, b in zip(add_with_gradients(ops.add_rms_norm, *given), dense, strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_of_the_residual_add_by_finite_differences() -> None:
    shapes = ((3, 40), (3, 40), (40,))
    leaves = [randn(*s, dtype=torch.float64).requires_grad_() for s in shapes]
    assert torch.autograd.gradcheck(ops.add_rms_norm, leaves)
    assert torch.autograd.gradgradcheck(ops.add_rms_norm, leaves)


@pytest.mark.parametrize("dim", [64, 4096, 16384, 65536])
def test_rows_of_the_residual_add_do_not_depend_on_other_rows(dim: int) -> None:
    x, r = randn(300, dim, dtype=torch.bfloat16), randn(300, dim, dtype=torch.bfloat16)
    w = randn(dim, dtype=torch.bfloat16)
    y, _ = ops.add_rms_norm(x, r, w)
    for rows in (1, 2, 17):
        assert torch.equal(ops.add_rms_norm(x[:rows], r[:rows], w)[0], y[:rows])


@pytest.mark.parametrize("dim", [64, 4096, 16384])
def test_the_same_bits_of_the_residual_add_every_time(dim: int) -> None:
    x, r, w, dy, dh = (randn(*s) for s in [(3000, dim)] * 2 + [(dim,)] + [(3000, dim)] * 2)
    first = add_with_gradients(ops.add_rms_norm, x, r, w, dy, dh)
    for _ in range(3):
        again = add_with_gradients(ops.add_rms_norm, x, r, w, dy, dh)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_does_not_wait_for_the_card() -> None:
    x, w = randn(64, 512).requires_grad_(), randn(512).requires_grad_()
    ops.rms_norm(x, w).sum().backward()  # loads the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.rms_norm(x, w).backward(x.detach())
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_runs_on_the_current_stream() -> None:
    x, w = randn(4096, 4096), randn(4096)
    expected = reference.rms_norm(2 * x, w)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # if the op ran elsewhere, it would read x before this
        doubled = 2 * x
        y = ops.rms_norm(doubled, w)
    stream.synchronize()
    torch.testing.assert_close(y, expected)


def test_streams_at_once() -> None:
    streams = [torch.cuda.Stream() for _ in range(4)]
    inputs = [randn(512, 1024 * (i + 1)) for i in range(4)]
    scales = [randn(x.shape[-1]) for x in inputs]
    torch.cuda.synchronize()
    results: list[tuple[Tensor, ...]] = []
    for _ in range(5):
        results.clear()
        for stream, x, w in zip(streams, inputs, scales, strict=True):
            with torch.cuda.stream(stream):
                results.append(with_gradients(ops.rms_norm, x, w, x, 1e-5))
    torch.cuda.synchronize()
    for result, x, w in zip(results, inputs, scales, strict=True):
        expected = with_gradients(ops.rms_norm, x, w, x, 1e-5)
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


@pytest.mark.parametrize("dim", [128, 4096, 32768])
def test_captured_in_a_graph(dim: int) -> None:
    x, w = randn(256, dim).requires_grad_(), randn(dim).requires_grad_()
    dy = randn(256, dim)

    def step() -> tuple[Tensor, ...]:
        y = ops.rms_norm(x, w)
        return (y, *torch.autograd.grad(y, (x, w), dy))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.copy_(randn(256, dim))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compile(mode: str) -> None:
    norm = RMSNorm(512).cuda().to(torch.bfloat16)
    compiled = torch.compile(norm, fullgraph=True, mode=mode)
    x = randn(64, 512, dtype=torch.bfloat16).requires_grad_()
    for _ in range(3):
        expected = torch.autograd.grad(norm(x).float().square().sum(), (x, norm.weight))
        got = torch.autograd.grad(compiled(x).float().square().sum(), (x, norm.weight))
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_autocast_keeps_the_fused_path() -> None:
    norm = RMSNorm(256).cuda()
    x = randn(8, 256, dtype=torch.bfloat16)
    with torch.autocast("cuda", torch.bfloat16):
        y = norm(x)
    assert y.dtype == torch.bfloat16
    assert "RmsNorm" in y.grad_fn.name()


def test_scale_on_another_device_is_named() -> None:
    with pytest.raises(
        RuntimeError, match=r"expected scale on the device of input, cuda:0, got cpu"
    ):
        ops.rms_norm(randn(2, 8), torch.ones(8))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two cards")
def test_on_a_card_that_is_not_the_current_one() -> None:
    x, w = torch.randn(4, 64, device="cuda:1"), torch.randn(64, device="cuda:1")
    with torch.cuda.device(0):
        torch.testing.assert_close(ops.rms_norm(x, w), reference.rms_norm(x, w))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2**31 // 4096 + 3, 4096), (2**31 // 64 + 5, 64), (3, 2**30)])
def test_more_than_2_to_the_31_elements(shape: tuple[int, int]) -> None:
    if torch.cuda.get_device_properties(0).total_memory < 64 * 2**30:
        pytest.skip("needs 64 GiB on the card")
    x = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE).normal_()
    w = randn(shape[-1], dtype=torch.bfloat16)
    y = ops.rms_norm(x, w)
    ends = [0, shape[0] // 2, shape[0] - 1]
    for row in ends:
        torch.testing.assert_close(y[row], reference.rms_norm(x[row], w))
    dx, dw = torch.ops.coreai_torch.fused_rms_norm_backward(y, x, w, 1e-5, [True, True])
    for row in ends:
        alone = torch.ops.coreai_torch.fused_rms_norm_backward(
            y[row], x[row], w, 1e-5, [True, True]
        )
        torch.testing.assert_close(dx[row], alone[0])
    assert dw.isfinite().all()
