"""RMSNorm as modules: with its weight, and as the stateless op that a converter externalizes.

API-compatible with the classes of the same names in Apple's `coreai-torch`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops.rms_norm import rms_norm
from ..reference.rms_norm import DTYPES, check_eps


def _check_size(name: str, value: int) -> None:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"rms_norm: expected {name} to be an int, got {value!r}")
    if value <= 0:
        raise ValueError(f"rms_norm: expected {name} > 0, got {value}")


class RMSNormImpl(nn.Module):
    """Root mean square normalization over the last dimension, with the scale as an input.

    A converter externalizes this class as the composite op ``rms_norm``, whose inputs are named
    after the parameters of :meth:`forward` and whose attributes are `axes` and `eps`. As the scale
    is an input, it becomes an input of the op's graph and not a constant.

    Args:
        eps: added to the mean of squares; zero or above.

    Raises:
        ValueError: eps is negative or NaN.
        TypeError: eps is not a number.
    """

    axes = -1
    version = 1

    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        check_eps(eps)
        self.eps = eps

    def forward(self, input: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Normalize; see :func:`coreai_torch.ops.rms_norm` for shapes, dtypes and errors."""
        return rms_norm(input, scale, self.eps)

    def extra_repr(self) -> str:
        return f"eps={self.eps}"


class RMSNorm(nn.Module):
    """Root mean square layer normalization (Zhang & Sennrich 2019, arXiv:1910.07467).

    Args:
        dim: size of the last dimension of the input.
        eps: added to the mean of squares; zero or above.
        n_heads: one weight per head instead of one for all; the input is then of shape
            (..., n_heads, length, dim).
        device, dtype: of the weight.

    Attributes:
        weight: the scale, initialized to ones; shape (dim,) or (n_heads, 1, dim).

    Raises:
        ValueError: dim or n_heads is not positive, or eps is negative or NaN.
        TypeError: one of them is not a number.
        NotImplementedError: a dtype that the op does not take.
    """

    def __init__(
        self,
        dim: int,
        eps: float = 1e-5,
        n_heads: int | None = None,
        *,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_size("dim", dim)
        if n_heads is not None:
            _check_size("n_heads", n_heads)
        if isinstance(dtype, torch.dtype) and dtype not in DTYPES:
            raise NotImplementedError(
                f"rms_norm: expected dtype to be float64, float32, float16 or bfloat16, got {dtype}"
            )
        shape = (dim,) if n_heads is None else (n_heads, 1, dim)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.rmsnorm_impl = RMSNormImpl(eps)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weight to ones."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize `x` over its last dimension, of size dim."""
        # Past nn.Module.__getattr__, which takes as long as a tenth of the call with one row.
        impl = self._modules["rmsnorm_impl"]
        return impl(x, self.weight)  # type: ignore[misc, no-any-return]

    def extra_repr(self) -> str:
        heads = "" if self.weight.dim() == 1 else f", n_heads={self.weight.shape[0]}"
        return f"{self.weight.shape[-1]}, eps={self.rmsnorm_impl.eps}{heads}"
