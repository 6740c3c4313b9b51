"""Replacing the norms of a model: what is found and what is not, and what stays as it was."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from cases import names
from replace_cases import DIM, T5, Gemma, HardCoded, L2Norm, Llama, Olmo, PerHead
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

import coreai_torch
from coreai_torch import reference, replace_rms_norm, restore_rms_norm
from coreai_torch.composite_ops import RMSNorm, RMSNormImpl

NORMS = {
    "nn": lambda: nn.RMSNorm(DIM, eps=1e-6),
    "nn, default eps": lambda: nn.RMSNorm(DIM),
    "nn, no weight": lambda: nn.RMSNorm(DIM, eps=1e-6, elementwise_affine=False),
    "Llama": Llama,
    "Gemma": Gemma,
    "OLMo": Olmo,
    "T5": T5,
    "hard-coded eps": HardCoded,
    "per head": PerHead,
    "no width": L2Norm,
}
EPS = {"nn, default eps": torch.finfo(torch.float32).eps, "hard-coded eps": 3e-5}


def results(norm: nn.Module, x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    x = x.detach().requires_grad_()
    y = norm(x)
    return y.detach(), *torch.autograd.grad(y, [x, *norm.parameters()], grad.to(y.dtype))


@pytest.mark.parametrize("scale", [torch.float32, torch.bfloat16, torch.float16], ids=names)
@pytest.mark.parametrize("kind", NORMS)
def test_the_same_results_from_the_fused_op(kind, scale):
    """For inputs of the weight's dtype and, as under autocast, of another."""
    norm = NORMS[kind]().to(scale)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    before = copy.deepcopy(norm)
    report = replace_rms_norm(norm)
    assert report.replaced[""].eps == EPS.get(kind, 1e-6)
    for dtype in {torch.float32, torch.bfloat16, scale}:
        x = torch.randn(2, 4, 7, DIM).to(dtype)
        grad = torch.randn_like(x)
        ours, theirs = results(norm, x, grad), results(before, x, grad)
        unit = max(torch.finfo(dtype).eps, torch.finfo(scale).eps)
        for mine, other in zip(ours, theirs, strict=True):
            assert mine.dtype == other.dtype
            bound = {"rtol": 4 * unit, "atol": 4 * unit * other.abs().max().item()}
            torch.testing.assert_close(mine, other, **bound)
        if norm(x).dtype == dtype == scale:
            assert torch.equal(ours[0], theirs[0]) or "nn" in kind or kind == "hard-coded eps"
    assert "RmsNorm" in graph(norm(x.requires_grad_()))


def graph(y: Tensor) -> str:
    """The names of the autograd nodes that made a tensor."""
    nodes, seen = [y.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [following for following, _ in node.next_functions]
    return " ".join(node.name() for node in seen)


class Gated(Llama):
    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return super().forward(x) * (1 if gate is None else gate)


class SlightlyOff(Llama):
    """Adds eps outside of the root."""

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True).sqrt() + 1e-4) * self.weight


class WrongGradient(Llama):
    """Treats the root mean square as a constant."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt().detach() * self.weight


class Partial(Llama):
    """Takes the root mean square of a part of the row."""

    def forward(self, x: Tensor) -> Tensor:
        part = x[..., : DIM // 2]
        return x * (part.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * self.weight


class Fails(Llama):
    def forward(self, x: Tensor) -> Tensor:
        raise OSError("no kernel for this machine\nand more")


class DropsInTraining(Llama):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), 0.1, self.training)


class WithBuffer(Llama):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))


def with_own_forward() -> nn.Module:
    norm = Llama()
    norm.forward = lambda x: x
    return norm


def parametrized() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(Llama(), dim=None)


NOT_NORMS = {
    "LayerNorm": (lambda: nn.LayerNorm(DIM), "has the parameters weight, bias"),
    "LayerNorm without bias": (lambda: nn.LayerNorm(DIM, bias=False), "does not compute"),
    "BatchNorm": (lambda: nn.BatchNorm1d(DIM), "has the parameters weight, bias"),
    "two dimensions": (lambda: nn.RMSNorm((4, DIM)), "does not compute an RMSNorm: its output"),
    "gated": (Gated, "has a forward that takes x: 'Tensor', gate"),
    "slightly off": (SlightlyOff, "does not compute an RMSNorm: its output of torch.float32"),
    "wrong gradient": (WrongGradient, "gradient of the input"),
    "partial": (Partial, "does not compute"),
    "fails": (Fails, "raised OSError in a trial: no kernel for this machine"),
    "drops": (lambda: DropsInTraining().eval(), "does not compute"),
    "buffer": (WithBuffer, "has the buffers seen"),
    "own forward": (with_own_forward, "has a forward of its own"),
    "parametrized": (parametrized, "is parametrized; replace first"),
    "float8": (lambda: Llama().to(torch.float8_e4m3fn), "has a weight of dtype torch.float8"),
    "ours": (lambda: RMSNorm(DIM), "is this package's own"),
    "computes in float32": (lambda: Llama().double(), "its output of torch.float64"),
}


@pytest.mark.parametrize("kind", NOT_NORMS)
def test_what_is_no_such_norm_is_left_with_the_reason(kind):
    make, reason = NOT_NORMS[kind]
    model = nn.ModuleDict({"a_norm": make()})
    kept = type(model["a_norm"])
    report = replace_rms_norm(model)
    assert not report.replaced
    assert reason in report.skipped["a_norm"]
    assert type(model["a_norm"]) is kept


def test_other_modules_are_not_mentioned():
    model = nn.Sequential(
        nn.Linear(8, 8, bias=False), nn.SiLU(), nn.Dropout(), nn.PReLU(8), nn.Embedding(4, 8)
    )
    report = replace_rms_norm(model)
    assert (report.replaced, report.skipped) == ({}, {})


def a_model() -> nn.Sequential:
    tied = Llama()
    tied.weight.requires_grad_(False)
    model = nn.Sequential(nn.Linear(DIM, DIM), Gemma(), nn.Linear(DIM, DIM), tied, Llama(), tied)
    model[4].weight = tied.weight
    return model.eval()


def test_everything_else_stays():
    model = a_model()
    calls = []
    model[1].register_forward_hook(lambda *_: calls.append("hook"))
    modules, state = list(model), list(model.state_dict())
    parameters = dict(model.named_parameters())
    random = torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        report = replace_rms_norm(model)
    assert torch.equal(torch.get_rng_state(), random)
    assert calls == []  # the trials do not run the hooks
    assert list(report.replaced) == ["1", "3", "4"]
    assert list(model) == modules
    assert list(model.state_dict()) == state
    after = dict(model.named_parameters())
    assert list(after) == list(parameters)
    assert all(after[name] is parameter for name, parameter in parameters.items())
    assert model[4].weight is model[3].weight
    assert [module.training for module in model.modules()] == [False] * len(list(model.modules()))
    assert [p.requires_grad for p in model.parameters()] == [True] * 5 + [False]
    assert type(model[1]).__name__ == "Gemma"
    assert isinstance(model[1], Gemma)
    assert model[1].variance_epsilon == 1e-6
    assert "RMSNormImpl(eps=1e-06)" in repr(model)
    model(torch.randn(2, DIM))
    assert calls == ["hook"]


def test_an_optimizer_goes_on():
    x = torch.randn(64, DIM)

    def train(replace_at: int | None) -> list[float]:
        torch.manual_seed(0)
        model, losses = a_model().train(), []
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for step in range(8):
            if step == replace_at:
                assert len(replace_rms_norm(model).replaced) == 3
            loss = (model(x) - x.roll(1)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    expected = train(None)
    assert expected[-1] < expected[0] / 1.1
    assert train(4) == pytest.approx(expected, rel=1e-5)


def test_restore():
    model = nn.ModuleList([Llama(), PerHead(), nn.RMSNorm(DIM)])
    before = [(type(m), dict(m._modules), set(vars(m))) for m in model]
    found = list(replace_rms_norm(model).replaced)
    assert found == ["0", "1", "2"]
    assert "has been replaced before" in replace_rms_norm(model).skipped["2"]
    assert restore_rms_norm(model) == found
    assert [(type(m), dict(m._modules), set(vars(m))) for m in model] == before
    assert restore_rms_norm(model) == []
    assert list(replace_rms_norm(model).replaced) == found


def test_restore_after_another_change():
    model = nn.Sequential(Llama(), Llama())
    replace_rms_norm(model)
    nn.utils.parametrize.register_parametrization(model[1], "weight", nn.Identity())
    model(torch.randn(2, DIM))
    with pytest.raises(RuntimeError, match="expected 1 as replace_rms_norm has left it, got Param"):
        restore_rms_norm(model)
    assert isinstance(model[0].rmsnorm_impl, RMSNormImpl)


def test_apples_own_norm():
    apple = pytest.importorskip("coreai_torch.composite_ops._rms_norm")
    model = nn.ModuleList([apple.RMSNorm(DIM), apple.RMSNorm(DIM, n_heads=4)])
    impl = model[1].rmsnorm_impl
    assert list(replace_rms_norm(model).replaced) == ["0", "1"]
    assert type(model[1].rmsnorm_impl) is RMSNormImpl
    restore_rms_norm(model)
    assert model[1].rmsnorm_impl is impl


def test_dry_run_and_only():
    model = nn.ModuleDict({"norm": Llama(), "q_norm": Llama(), "out_norm": nn.LayerNorm(4)})
    report = replace_rms_norm(model, dry_run=True, only=lambda path, _: path != "q_norm")
    assert str(report) == (
        "norms to replace: 1, left as they are: 1\n"
        "  Llama, weight (32,), eps 1e-06: norm\n"
        "  left: has the parameters weight, bias: out_norm"
    )
    assert type(model["norm"]) is Llama
    report = replace_rms_norm(model)
    assert "norms replaced: 2" in str(report)
    assert "norm and 1 more" in str(report)


def test_meta_device():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(DIM, DIM), Gemma())
        assert len(replace_rms_norm(nn.ModuleList([L2Norm(), Llama()]), dry_run=True).replaced) == 2
    assert list(replace_rms_norm(model).replaced) == ["1"]
    model.to_empty(device="cpu")
    nn.init.ones_(model[1].weight)
    x = torch.randn(3, DIM)
    torch.testing.assert_close(model[1](x), 2 * reference.rms_norm(x, torch.ones(DIM), 1e-6))


def test_the_trials_leave_no_trace():
    class Counts(Llama):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x)

    norm = Counts()
    before = norm.weight.clone()
    assert replace_rms_norm(norm, dry_run=True).replaced
    assert "calls" not in vars(norm)
    assert torch.equal(norm.weight, before)
    assert norm.weight.grad is None


def test_copies_and_pickles():
    norm = Gemma()
    nn.init.normal_(norm.weight)
    replace_rms_norm(norm)
    x = torch.randn(3, DIM, requires_grad=True)
    file = io.BytesIO()
    torch.save(norm, file)
    file.seek(0)
    others = [
        copy.deepcopy(norm),
        pickle.loads(pickle.dumps(norm)),
        torch.load(file, weights_only=False),
    ]
    for other in others:
        assert type(other) is type(norm)
        assert other.weight is not norm.weight
        assert torch.equal(other(x), norm(x))
        assert restore_rms_norm(other) == [""]
        assert type(other) is Gemma


def test_a_pickle_is_read_by_another_process(tmp_path):
    norm = nn.RMSNorm(DIM, eps=1e-6)
    replace_rms_norm(norm)
    torch.save(norm, tmp_path / "norm.pt")
    program = (
        "import sys, torch\n"
        "norm = torch.load(sys.argv[1], weights_only=False)\n"
        "assert 'rmsnorm_impl' in dict(norm.named_modules())\n"
        "norm(torch.randn(2, 32)).sum().backward()\n"
    )
    subprocess.run([sys.executable, "-c", program, tmp_path / "norm.pt"], check=True)


def test_state_dicts_go_both_ways():
    model, plain = a_model(), a_model()
    replace_rms_norm(model)
    model.load_state_dict(plain.state_dict())
    plain.load_state_dict(model.state_dict())


def test_bfloat16_after_it_was_replaced():
    """The rule is that of the class, not that of the dtype at the time."""
    for kind in (Llama, Gemma, Olmo, T5):
        norm = kind()
        nn.init.normal_(norm.weight)
        expected = copy.deepcopy(norm).bfloat16()
        replace_rms_norm(norm)
        x = torch.randn(16, DIM).bfloat16()
        assert torch.equal(norm.bfloat16()(x), expected(x))


@pytest.mark.slow
def test_compiled_before_and_after():
    """What was compiled with the norm before is compiled anew."""
    norm = Gemma()
    nn.init.normal_(norm.weight)
    compiled = torch.compile(norm, fullgraph=True, dynamic=False)
    x = torch.randn(3, DIM)
    expected = compiled(x)
    targets: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    replace_rms_norm(compiled)
    torch.testing.assert_close(compiled(x), expected)
    assert torch.equal(compiled(x), norm(x))
    torch.compile(norm, backend=backend, fullgraph=True)(x)
    assert any("fused_rms_norm" in target for target in targets)


@pytest.fixture
def one_process() -> Iterator[DeviceMesh]:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        torch.distributed.destroy_process_group()


def test_a_sharded_weight(one_process):
    norm = Llama()
    norm.weight = nn.Parameter(distribute_tensor(norm.weight.data, one_process, [Replicate()]))
    report = replace_rms_norm(nn.ModuleDict({"norm": norm}))
    assert "is a DTensor; replace before sharding" in report.skipped["norm"]
    norm = Llama()
    replace_rms_norm(norm)
    norm.weight = nn.Parameter(distribute_tensor(norm.weight.data, one_process, [Replicate()]))
    x = distribute_tensor(torch.randn(2, DIM), one_process, [Replicate()])
    assert isinstance(norm(x), DTensor)


def test_replaced_and_then_sharded(one_process):
    """FSDP2 makes classes of its own, too."""
    model = a_model().train()
    plain = copy.deepcopy(model)
    replace_rms_norm(model)
    x = torch.randn(8, DIM)
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    for each in (model, plain):
        fully_shard(each[1], mesh=one_process, mp_policy=policy)
        fully_shard(each, mesh=one_process, mp_policy=policy)
    y, expected = model(x), plain(x)
    assert torch.equal(y, expected)
    y.sum().backward()
    expected.sum().backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        if ours.requires_grad:
            ours, theirs = ours.grad.full_tensor(), theirs.grad.full_tensor()
            torch.testing.assert_close(ours, theirs, rtol=2**-6, atol=2**-6)
    with pytest.raises(RuntimeError, match="got FSDPGemma with another class"):
        restore_rms_norm(model)


def test_the_names_in_the_package():
    assert {"replace_rms_norm", "restore_rms_norm"} <= set(coreai_torch.__all__)


@pytest.mark.parametrize("function", [replace_rms_norm, restore_rms_norm])
def test_not_a_model(function):
    with pytest.raises(TypeError, match=r"expected model to be a torch\.nn\.Module, got dict"):
        function({})
