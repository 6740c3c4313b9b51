"""The modules: their contract with converters, inference and training. Their life in PyTorch is in
test_modules.py."""

from __future__ import annotations

import inspect

import torch

import coreai_torch
from coreai_torch import ExternalizeSpec, ops, reference
from coreai_torch.composite_ops import RMSNorm, RMSNormImpl


def test_names_and_shapes():
    norm, heads = RMSNorm(8), RMSNorm(8, eps=1e-6, n_heads=4, dtype=torch.bfloat16)
    assert list(norm.state_dict()) == ["weight"]
    assert torch.equal(norm.weight, torch.ones(8))
    assert heads.weight.shape == (4, 1, 8)
    assert heads.weight.dtype == torch.bfloat16
    assert repr(heads).startswith("RMSNorm(\n  8, eps=1e-06, n_heads=4")
    assert isinstance(norm.rmsnorm_impl, RMSNormImpl)
    assert (norm.rmsnorm_impl.axes, norm.rmsnorm_impl.eps) == (-1, 1e-5)
    assert set(coreai_torch.__all__) <= set(dir(coreai_torch))


def test_what_a_converter_relies_on():
    """The parameters of forward become the inputs of the composite op."""
    signature = inspect.signature(RMSNormImpl.forward)
    assert list(signature.parameters) == ["self", "input", "scale"]
    assert torch.library.infer_schema(RMSNormImpl(1e-5).forward, mutates_args=()) == (
        "(Tensor input, Tensor scale) -> Tensor"
    )
    spec = ExternalizeSpec(RMSNormImpl, "rms_norm", ["axes", "eps", "version"])
    assert all(hasattr(RMSNormImpl(), name) for name in spec.composite_attrs)


def test_inference_mode():
    x, w = torch.randn(3, 8), torch.randn(8)
    with torch.inference_mode():
        y = ops.rms_norm(x, w)
    assert y.is_inference()
    assert torch.equal(y, reference.rms_norm(x, w))


def test_a_model_trains_with_the_reference_s_losses():
    def losses(norm):
        torch.manual_seed(0)
        weights = [torch.randn(16, 16), torch.ones(16), torch.randn(16, 1)]
        for weight in weights:
            weight.requires_grad_()
        data, out = torch.randn(64, 16), []
        target = data.sum(-1, keepdim=True).tanh()
        optimizer = torch.optim.Adam(weights, lr=0.01)
        for _ in range(30):
            loss = (
                (norm(data @ weights[0], weights[1]).tanh() @ weights[2] - target).square().mean()
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            out.append(loss.item())
        return torch.tensor(out)

    ours, expected = losses(ops.rms_norm), losses(reference.rms_norm)
    assert expected[-1] < expected[0] / 4
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)
