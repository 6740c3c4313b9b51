"""Mixed precision: autocast leaves dtypes as the dtype rule says, and GradScaler works."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import ALL_PAIRS, names
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from coreai_torch import _C, ops
from coreai_torch.composite_ops import RMSNorm
from coreai_torch.reference.rms_norm import output_dtype

HAS_CUDA = torch.cuda.is_available() and _C.build_info()["cuda_version"] is not None
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not HAS_CUDA, reason="needs the CUDA kernels")),
]
LOW = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("autocast", LOW, ids=names)
@pytest.mark.parametrize("pair", ALL_PAIRS, ids=names)
def test_the_dtype_rule_is_that_without_autocast(pair, autocast, device):
    x, w = torch.randn(5, 8, device=device).to(pair[0]), torch.randn(8, device=device).to(pair[1])
    x.requires_grad_()
    w.requires_grad_()
    with torch.autocast(device, autocast):
        y = ops.rms_norm(x, w)
    plain = ops.rms_norm(x, w)
    assert y.dtype == output_dtype(*pair)
    assert torch.equal(y, plain)
    grads = torch.autograd.grad(y.float().sum(), (x, w))
    for ours, expected in zip(grads, torch.autograd.grad(plain.float().sum(), (x, w)), strict=True):
        assert ours.dtype == expected.dtype
        assert torch.equal(ours, expected)


class Model(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(16, 16), norm, nn.Linear(16, 4)
        self.seen: list[torch.dtype] = []

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        y = self.norm(h)
        self.seen += [h.dtype, y.dtype]
        self.grad_fn = y.grad_fn
        return self.last(y)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("autocast", LOW, ids=names)
def test_low_activations_beside_a_float32_weight_stay_low_and_fused(autocast, device):
    model = Model(RMSNorm(16)).to(device)
    with torch.autocast(device, autocast):
        y = model(torch.randn(5, 16, device=device))
        assert model.seen == [autocast, autocast]
        assert "RmsNormFunction" in model.grad_fn.name()
    y.float().sum().backward()
    assert model.norm.weight.dtype == model.norm.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("autocast", LOW, ids=names)
def test_results_are_those_of_torch_s_norm(autocast, device):
    """Which in the forward rounds as ours does; on CUDA its output is float32."""
    ours = Model(RMSNorm(16)).to(device)
    theirs = copy.deepcopy(ours)
    theirs.norm = nn.RMSNorm(16, eps=1e-5, device=device)
    x, results = torch.randn(50, 16, device=device), []
    for model in (ours, theirs):
        with torch.autocast(device, autocast):
            loss = model(x).float().square().mean()
        loss.backward()
        results.append((loss.detach(), *(p.grad for p in model.parameters())))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=8 * torch.finfo(autocast).eps)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_under_autocast(use_reentrant, device):
    model = Model(RMSNorm(16)).to(device)
    x = torch.randn(5, 16, device=device, requires_grad=True)
    grads = []
    for call in (model, lambda x: checkpoint(model, x, use_reentrant=use_reentrant)):
        model.zero_grad()
        with torch.autocast(device, torch.bfloat16):
            y = call(x)
        y.float().square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert set(model.seen) == {torch.bfloat16}


def test_compiled_under_autocast():
    norm, x = RMSNorm(16), torch.randn(5, 16, dtype=torch.bfloat16)
    compiled = torch.compile(norm, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = compiled(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, norm(x))


@pytest.mark.parametrize("device", DEVICES)
def test_grad_scaler(device):
    """Scaled by a power of two, gradients have the same bits as unscaled ones."""
    scaled = Model(RMSNorm(16)).to(device)
    plain = copy.deepcopy(scaled)
    scaler = torch.amp.GradScaler(device, init_scale=1024.0, growth_interval=2)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (scaled, plain)]
    for _ in range(5):
        x = torch.randn(50, 16, device=device)
        for model, optimizer in zip((scaled, plain), optimizers, strict=True):
            optimizer.zero_grad()
            with torch.autocast(device, torch.bfloat16):
                loss = model(x).float().square().mean()
            if model is plain:
                loss.backward()
                optimizer.step()
            else:
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
    assert scaler.get_scale() == 4096.0
    for ours, expected in zip(scaled.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_grad_scaler_sees_an_overflow_in_float16(device):
    norm = RMSNorm(16, device=device)
    before = norm.weight.detach().clone()
    scaler = torch.amp.GradScaler(device, init_scale=2.0**20)
    optimizer = torch.optim.SGD(norm.parameters(), lr=0.1)
    y = norm(torch.randn(5, 16, device=device).half())
    scaler.scale(y.sum()).backward()  # 2²⁰ is beyond float16
    assert not norm.weight.grad.isfinite().all()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(norm.weight, before)
    assert scaler.get_scale() == 2.0**19
