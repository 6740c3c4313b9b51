"""What the tests share: the matrix of dtypes, the float64 oracle, and the accuracy bar."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from coreai_torch import ops, reference
from coreai_torch.backends import cpu

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
DTYPES = (*FLOATS, torch.float64)
PAIRS = tuple(itertools.product(FLOATS, FLOATS))
ALL_PAIRS = tuple(itertools.product(DTYPES, DTYPES))


def names(value: object) -> str | None:
    """Readable test ids for dtypes and pairs of them."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, tuple) and value and isinstance(value[0], torch.dtype):
        return "-".join(str(v).removeprefix("torch.") for v in value)
    return None


def with_gradients(
    function, input: Tensor, scale: Tensor, grad_output: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, gradient of the input and gradient of the scale."""
    x, w = input.detach().requires_grad_(), scale.detach().requires_grad_()
    y = function(x, w, eps)
    y.backward(grad_output.to(y.dtype))
    assert x.grad is not None
    assert w.grad is not None
    return y.detach(), x.grad, w.grad


# Shapes of input and scale for the following: many rows, few long ones, a scale for each head.
REPRODUCIBLE = [((2000, 96), (96,)), ((65, 1000), (1000,)), ((2, 4, 300, 64), (4, 1, 64))]


def assert_same_bits_at_every_level_and_number_of_threads(
    run: Callable[[], Sequence[Tensor]],
) -> None:
    results = []
    threads = torch.get_num_threads()
    try:
        for name in cpu.supported_levels():
            for count in (1, 2, 3, 7):
                torch.set_num_threads(count)
                with cpu.level(name):
                    results.append(run())
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def oracle(
    input: Tensor, scale: Tensor, grad_output: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The mathematical function and its gradient in float64, of the inputs as they are."""
    x, w, g = input.double(), scale.double(), grad_output.double()
    rstd = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    normalized = x * rstd
    scaled = g * w
    grad_input = (scaled - normalized * (scaled * normalized).mean(-1, keepdim=True)) * rstd
    return normalized * w, grad_input, (g * normalized).sum_to_size(scale.shape)


def assert_as_accurate_as_reference(
    input: Tensor, scale: Tensor, grad_output: Tensor, eps: float = 1e-5
) -> None:
    """The accuracy bar, for the op on the device of its arguments."""
    grad_output = grad_output.to(reference.rms_norm(input, scale, eps).dtype)
    ours = with_gradients(ops.rms_norm, input, scale, grad_output, eps)
    assert_accurate(ours, input, scale, grad_output, eps)


def assert_accurate(
    ours: tuple[Tensor, Tensor, Tensor],
    input: Tensor,
    scale: Tensor,
    grad_output: Tensor,
    eps: float = 1e-5,
) -> None:
    """The accuracy bar, of output, gradient of the input and gradient of the scale: against the
    oracle, our mean error is at most 1.05 and our largest at most 1.5 times that of the eager
    reference.

    Means of few samples are given room for chance: the ratio of two means of n errors varies by a
    factor of exp(1.07 / sqrt(n)), or e squared every so often where there are one or two. Samples
    are the elements where rounding to the result's dtype decides; in float32 they are the rows,
    since a row shares the error of its rstd.
    """
    theirs = with_gradients(reference.rms_norm, input, scale, grad_output, eps)
    exact = oracle(input, scale, grad_output, eps)
    for name, a, b, c in zip(
        ("output", "grad_input", "grad_scale"), ours, theirs, exact, strict=True
    ):
        assert_no_worse(name, a, b, c, input.numel() // max(input.shape[-1], 1))


def assert_no_worse(
    name: str, a: Tensor, b: Tensor, c: Tensor, rows: int, unit: Tensor | float = 1.0
) -> None:
    """That bar for one result: ours, that of the eager reference, the oracle's. Errors are measured
    in `unit`, so that a few ill-conditioned rows do not decide for all."""
    assert a.dtype == b.dtype, name
    assert a.shape == b.shape, name
    if c.numel() == 0:
        return
    finite = c.abs() <= torch.finfo(a.dtype).max
    assert torch.equal(a.isnan(), b.isnan()), f"{name}: NaN in other places"
    error, error_of_reference = (((t.double() - c) / unit)[finite].abs() for t in (a, b))
    samples = finite.sum().item()
    if a.dtype == torch.float32:
        samples = min(samples, rows)
    noise = max(samples, 1) ** -0.5
    assert error.mean() <= (1.05 + 2 * noise + 8 * noise**2) * error_of_reference.mean(), (
        f"{name}: mean error {error.mean():.3e}, reference {error_of_reference.mean():.3e}"
    )
    assert error.max() <= (1.5 + 16 * noise) * error_of_reference.max(), (
        f"{name}: largest error {error.max():.3e}, reference {error_of_reference.max():.3e}"
    )
