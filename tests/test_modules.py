"""The modules in the life of a PyTorch model, beside torch.nn.RMSNorm doing the same."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize

from coreai_torch import reference
from coreai_torch.composite_ops import RMSNorm, RMSNormImpl

SHAPES = {"shared": (None, (3, 8)), "per head": (2, (3, 2, 5, 8))}


@pytest.fixture(params=SHAPES.values(), ids=SHAPES)
def norm_and_input(request):
    n_heads, shape = request.param
    norm = RMSNorm(8, n_heads=n_heads)
    nn.init.normal_(norm.weight)
    return norm, torch.randn(shape)


def through_a_file(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module)), through_a_file],
    ids=["deepcopy", "pickle", "save and load"],
)
def test_copies(copied, norm_and_input):
    norm, x = norm_and_input
    norm.rmsnorm_impl.eps = 1e-3
    other = copied(norm)
    assert other.weight is not norm.weight
    assert torch.equal(other(x), norm(x))
    with torch.no_grad():
        other.weight.zero_()
    assert norm(x).abs().max() > 0


def test_state_dict_through_a_file(norm_and_input):
    norm, x = norm_and_input
    file = io.BytesIO()
    torch.save(norm.state_dict(), file)
    file.seek(0)
    other = RMSNorm(8, n_heads=None if norm.weight.dim() == 1 else 2)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), norm(x))


def test_state_dict_to_and_from_torch():
    ours, theirs, x = RMSNorm(8), nn.RMSNorm(8, eps=1e-5), torch.randn(3, 8)
    nn.init.normal_(ours.weight)
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(x), theirs(x))
    nn.init.normal_(theirs.weight)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(x), theirs(x))
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        theirs.load_state_dict(RMSNorm(8, n_heads=2).state_dict())


@pytest.mark.parametrize("n_heads", [None, 2])
def test_state_dict_to_and_from_apple_s(n_heads):
    apple = pytest.importorskip(
        "coreai_torch.composite_ops._rms_norm", reason="needs Apple's coreai-torch"
    )
    ours, theirs = RMSNorm(8, n_heads=n_heads), apple.RMSNorm(8, n_heads=n_heads)
    x = torch.randn(3, 2, 5, 8)
    nn.init.normal_(ours.weight)
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(ours(x), theirs(x))
    nn.init.normal_(theirs.weight)
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours(x), theirs(x))


def test_meta_device_then_memory_then_values(norm_and_input):
    norm, x = norm_and_input
    norm.to("meta")
    assert norm(x.to("meta")).shape == x.shape
    norm.to_empty(device="cpu")
    norm.reset_parameters()
    assert torch.equal(norm.weight, torch.ones_like(norm.weight))
    assert torch.equal(norm(x), reference.rms_norm(x, norm.weight))


def test_built_on_the_meta_device_and_loaded():
    norm = RMSNorm(8)
    nn.init.normal_(norm.weight)
    with torch.device("meta"):
        other = RMSNorm(8)
    assert other.weight.is_meta
    other.load_state_dict(norm.state_dict(), assign=True)
    x = torch.randn(3, 8)
    assert torch.equal(other(x), norm(x))
    assert nn.utils.skip_init(RMSNorm, 8).weight.device == torch.device("cpu")


@pytest.mark.parametrize(
    ("change", "dtype"),
    [
        (lambda m: m.half(), torch.float16),
        (lambda m: m.bfloat16(), torch.bfloat16),
        (lambda m: m.double(), torch.float64),
        (lambda m: m.to(torch.bfloat16), torch.bfloat16),
    ],
    ids=["half", "bfloat16", "double", "to"],
)
def test_changes_of_dtype(change, dtype, norm_and_input):
    norm, x = norm_and_input
    norm = change(norm)
    x = x.to(dtype)
    assert norm.weight.dtype == norm(x).dtype == dtype
    assert torch.equal(norm(x), reference.rms_norm(x, norm.weight))


class Block(nn.Module):
    """A transformer block with both kinds of norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = RMSNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.q_norm, self.k_norm = RMSNorm(8, n_heads=2), RMSNorm(8, n_heads=2)
        self.mlp = nn.Sequential(RMSNorm(16), nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 16))

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 8)).transpose(1, 3)
        q, k, v = heads.unbind(2)
        y = nn.functional.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.mlp(x)


def trained(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    y = model(x)
    y.square().mean().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    return [y.detach(), *(grads[name] for name in sorted(grads))]


@pytest.mark.slow
@pytest.mark.parametrize("in_place", [False, True])
def test_a_whole_model_compiled(in_place):
    torch._dynamo.reset()
    model, x = nn.Sequential(Block(), Block(), RMSNorm(16)), torch.randn(2, 6, 16)
    expected = trained(model, x)
    if in_place:
        model.compile(fullgraph=True)
        ours = trained(model, x)
    else:
        ours = trained(torch.compile(model, fullgraph=True), x)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_symbolic_trace():
    model, x = Block(), torch.randn(2, 6, 16)
    traced = fx.symbolic_trace(model)
    targets = [str(node.target) for node in traced.graph.nodes]
    assert targets.count("coreai_torch.fused_rms_norm.default") == 4
    for ours, expected in zip(trained(traced, x), trained(model, x), strict=True):
        assert torch.equal(ours, expected)


def test_symbolic_trace_with_norms_as_leaves():
    class Tracer(fx.Tracer):
        def is_leaf_module(self, module: nn.Module, name: str) -> bool:
            return isinstance(module, RMSNorm) or super().is_leaf_module(module, name)

    model, x = Block(), torch.randn(2, 6, 16)
    traced = fx.GraphModule(model, Tracer().trace(model))
    assert torch.equal(traced(x), model(x))


def test_hooks(norm_and_input):
    norm, x = norm_and_input
    calls = []

    def note(name):
        return lambda *_: calls.append(name)

    for name, module in (("norm", norm), ("impl", norm.rmsnorm_impl)):
        module.register_forward_pre_hook(note(f"before {name}"))
        module.register_forward_hook(note(f"after {name}"))
        module.register_full_backward_pre_hook(note(f"into {name}"))
        module.register_full_backward_hook(note(f"out of {name}"))
    norm.weight.register_hook(note("weight"))
    norm.weight.register_post_accumulate_grad_hook(note("accumulated"))
    norm(x.requires_grad_()).sum().backward()
    assert calls[:4] == ["before norm", "before impl", "after impl", "after norm"]
    assert calls[4:6] == ["into norm", "into impl"]
    assert sorted(calls[6:]) == ["accumulated", "out of impl", "out of norm", "weight"]


def test_hooks_change_what_passes(norm_and_input):
    norm, x = norm_and_input
    expected = norm(2 * x) + 1
    norm.register_forward_pre_hook(lambda _, inputs: (2 * inputs[0],))
    norm.register_forward_hook(lambda _, inputs, output: output + 1)
    assert torch.equal(norm(x), expected)


class OnePlus(nn.Module):
    """The scale of some models: 1 + weight."""

    def forward(self, weight: Tensor) -> Tensor:
        return 1 + weight

    def right_inverse(self, scale: Tensor) -> Tensor:
        return scale - 1


def test_a_parametrization_of_the_weight(norm_and_input):
    norm, x = norm_and_input
    expected = norm(x)
    parametrize.register_parametrization(norm, "weight", OnePlus())
    original = norm.parametrizations.weight.original
    torch.testing.assert_close(norm(x), expected)
    norm(x).square().sum().backward()
    scale = (1 + original.detach()).requires_grad_()
    reference.rms_norm(x, scale).square().sum().backward()
    torch.testing.assert_close(original.grad, scale.grad)
    parametrize.remove_parametrizations(norm, "weight")
    torch.testing.assert_close(norm(x), expected)
    assert list(norm.state_dict()) == ["weight"]


def test_weight_norm(norm_and_input):
    norm, x = norm_and_input
    expected = norm(x)
    parametrizations.weight_norm(norm, dim=None)
    torch.testing.assert_close(norm(x), expected)
    norm(x).sum().backward()
    assert all(p.grad is not None for p in norm.parameters())


def test_tied_weights():
    model = nn.Sequential(RMSNorm(8), nn.Linear(8, 8), RMSNorm(8))
    model[2].weight = model[0].weight
    x = torch.randn(3, 8)
    assert len(list(model.parameters())) == 3
    model(x).square().sum().backward()
    first, second = (model[0].weight.detach().clone().requires_grad_() for _ in range(2))
    y = reference.rms_norm(model[1](reference.rms_norm(x, first)), second)
    y.square().sum().backward()
    torch.testing.assert_close(model[0].weight.grad, first.grad + second.grad)
    other = copy.deepcopy(model)
    assert other[2].weight is other[0].weight
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))


def test_called_with_other_weights(norm_and_input):
    norm, x = norm_and_input
    weight = torch.randn_like(norm.weight)
    y = functional_call(norm, {"weight": weight}, (x,))
    assert torch.equal(y, reference.rms_norm(x, weight))


def test_a_frozen_weight_has_no_gradient(norm_and_input):
    norm, x = norm_and_input
    norm.requires_grad_(False)
    norm(x.requires_grad_()).sum().backward()
    assert norm.weight.grad is None
    assert x.grad is not None


def test_the_stateless_module_takes_any_scale():
    impl, x, scale = RMSNormImpl(eps=1e-3), torch.randn(3, 8), torch.randn(8)
    assert list(impl.parameters()) == []
    assert torch.equal(copy.deepcopy(impl)(x, scale), reference.rms_norm(x, scale, 1e-3))
    assert torch.equal(impl(input=x, scale=scale), impl(x, scale))
