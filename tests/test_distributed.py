"""torch.distributed with two processes on gloo: results and losses equal those of one process.

The processes are started once and stay: a test sends both of them a function of this module, its
job, and compares what they return with the same done here.
"""

from __future__ import annotations

import copy
import csv
import functools
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
    init_device_mesh,
)
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from coreai_torch import ops, reference
from coreai_torch.composite_ops import RMSNorm

WORLD = 2
PATIENCE_S = 120

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")


def serve(rank: int, store: str, pipe: Any) -> None:
    """A member of the group: does what it is sent, and sends back what came of it."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    while (work := pipe.recv()) is not None:
        job, arguments = work
        torch.manual_seed(0)
        try:
            pipe.send((True, job(*arguments)))
        except Exception:
            pipe.send((False, traceback.format_exc()))
    dist.destroy_process_group()


class Group:
    """The processes, started when first needed, and anew after a failure."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.starts = folder, 0
        self.members: list[tuple[Any, Any]] = []

    def run(self, job: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What the job returned, by rank."""
        if not self.members:
            self.start()
        for _, pipe in self.members:
            pipe.send((job, arguments))
        results = [pipe.recv() if pipe.poll(PATIENCE_S) else None for _, pipe in self.members]
        if failed := [r for r in results if r is None or not r[0]]:
            self.stop()
            pytest.fail("\n".join("no answer" if r is None else r[1] for r in failed))
        return [value for _, value in results]

    def start(self) -> None:
        self.starts += 1
        context = mp.get_context("spawn")
        for rank in range(WORLD):
            here, there = context.Pipe()
            arguments = (rank, str(self.folder / f"store{self.starts}"), there)
            process = context.Process(target=serve, args=arguments, daemon=True)
            process.start()
            self.members.append((process, here))

    def stop(self) -> None:
        for process, _ in self.members:
            process.kill()
        self.members = []

    def finish(self) -> None:
        for process, pipe in self.members:
            pipe.send(None)
            process.join(PATIENCE_S)


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    members = Group(tmp_path_factory.mktemp("group"))
    yield members
    members.finish()


@functools.cache
def mesh():
    return init_device_mesh("cpu", (WORLD,))


# --- DTensor ----------------------------------------------------------------------------------

# Shapes of input and scale, the dimension that is sharded, and the scale's placement beside it.
SHARDINGS = {
    "batch": ((4, 6, 8), (8,), 0, Replicate()),
    "sequence": ((4, 6, 8), (8,), 1, Replicate()),
    "sequence, uneven": ((4, 5, 8), (8,), 1, Replicate()),
    "batch of heads": ((4, 2, 6, 8), (2, 1, 8), 0, Replicate()),
    "heads": ((4, 2, 6, 8), (2, 1, 8), 1, Shard(0)),
    "sequence of heads": ((4, 2, 6, 8), (2, 1, 8), 2, Replicate()),
    "heads beside a batch of 1": ((1, 2, 6, 8), (1, 2, 1, 8), 1, Shard(1)),
    "rows of their own": ((4, 8), (4, 8), 0, Shard(0)),
}


def inputs_of(shape, scale):
    torch.manual_seed(1)
    return torch.randn(shape), torch.randn(scale), torch.randn(shape)


def sharded_call(shape, scale, dim, scale_placement, wanted):
    x, w, g = inputs_of(shape, scale)
    on = mesh()
    x, g = (distribute_tensor(t, on, [Shard(dim)]) for t in (x, g))
    w = distribute_tensor(w, on, [scale_placement])
    leaves = [t.requires_grad_() for t, asked in zip((x, w), wanted, strict=True) if asked]
    with CommDebugMode() as communication:
        y = ops.rms_norm(x, w)
        grads = torch.autograd.grad(y, leaves, g)
    assert communication.get_total_counts() == 0, communication.get_comm_counts()
    assert y.placements == (Shard(dim),)
    expected = dict(zip((x, w), (Shard(dim), scale_placement), strict=True))
    if isinstance(scale_placement, Replicate):
        expected[w] = Partial()
    assert [t.placements for t in grads] == [(expected[leaf],) for leaf in leaves]
    return [t.full_tensor().detach() for t in (y, *grads)]


# Both come last: DTensor must not take what it decided for one gradient to be right for two.
@pytest.mark.parametrize("wanted", [(True, False), (False, True), (True, True)], ids=str)
@pytest.mark.parametrize("sharding", SHARDINGS.values(), ids=SHARDINGS)
def test_sharded_rows_need_no_communication(group, sharding, wanted):
    x, w, g = inputs_of(*sharding[:2])
    leaves = [t.requires_grad_() for t, asked in zip((x, w), wanted, strict=True) if asked]
    y = ops.rms_norm(x, w)
    expected = [y, *torch.autograd.grad(y, leaves, g)]
    for results in group.run(sharded_call, *sharding, wanted):
        for ours, whole in zip(results, expected, strict=True):
            torch.testing.assert_close(ours, whole)


def test_sharded_gradients_are_the_reference_s(group):
    """Not only ours in one process: what the two together compute is what the formula says."""
    x, w, g = inputs_of((4, 6, 8), (8,))
    y = reference.rms_norm(x.requires_grad_(), w.requires_grad_(), 1e-5)
    y.backward(g)
    sharding = SHARDINGS["sequence"]
    for results in group.run(sharded_call, *sharding, (True, True)):
        for ours, whole in zip(results, (y, x.grad, w.grad), strict=True):
            torch.testing.assert_close(ours, whole)


def sharded_add_call(shape, scale, dim, scale_placement, wanted):
    x, w, dy = inputs_of(shape, scale)
    on = mesh()
    x, r, dy, dh = (distribute_tensor(t, on, [Shard(dim)]) for t in (x, x.sin(), dy, dy.cos()))
    w = distribute_tensor(w, on, [scale_placement])
    leaves = [t.requires_grad_() for t, asked in zip((x, r, w), wanted, strict=True) if asked]
    with CommDebugMode() as communication:
        outputs = ops.add_rms_norm(x, r, w)
        grads = torch.autograd.grad(outputs, leaves, (dy, dh))
    assert communication.get_total_counts() == 0, communication.get_comm_counts()
    assert all(t.placements == (Shard(dim),) for t in outputs)
    of_scale = Partial() if isinstance(scale_placement, Replicate) else scale_placement
    expected = [
        p for p, asked in zip((Shard(dim),) * 2 + (of_scale,), wanted, strict=True) if asked
    ]
    assert [t.placements for t in grads] == [(placement,) for placement in expected]
    return [t.full_tensor().detach() for t in (*outputs, *grads)]


@pytest.mark.parametrize(
    "wanted", [(True, False, False), (False, False, True), (True, True, True)], ids=str
)
@pytest.mark.parametrize("sharding", SHARDINGS.values(), ids=SHARDINGS)
def test_sharded_residual_add(group, sharding, wanted):
    x, w, dy = inputs_of(*sharding[:2])
    r, dh = x.sin(), dy.cos()
    leaves = [t.requires_grad_() for t, asked in zip((x, r, w), wanted, strict=True) if asked]
    outputs = ops.add_rms_norm(x, r, w)
    expected = [*outputs, *torch.autograd.grad(outputs, leaves, (dy, dh))]
    for results in group.run(sharded_add_call, *sharding, wanted):
        for ours, whole in zip(results, expected, strict=True):
            torch.testing.assert_close(ours, whole)


def redistributed_add_call(input_placement, residual_placement):
    x, w, dy = inputs_of((4, 2, 6, 8), (2, 1, 8))
    x, r = (
        distribute_tensor(t, mesh(), [placement]).requires_grad_()
        for t, placement in ((x, input_placement), (x.sin(), residual_placement))
    )
    w = distribute_tensor(w, mesh(), [Replicate()]).requires_grad_()
    y, h = ops.add_rms_norm(x, r, w)
    torch.autograd.backward((y, h), [distribute_tensor(dy, mesh(), [Replicate()])] * 2)
    return [t.full_tensor().detach() for t in (y, h, x.grad, r.grad, w.grad)]


@pytest.mark.parametrize(
    ("input_placement", "residual_placement"),
    [(Shard(3), Shard(3)), (Shard(0), Shard(1)), (Replicate(), Shard(2)), (Shard(1), Replicate())],
    ids=str,
)
def test_residual_add_of_other_placements(group, input_placement, residual_placement):
    x, w, dy = inputs_of((4, 2, 6, 8), (2, 1, 8))
    r = x.sin()
    y, h = ops.add_rms_norm(*(t.requires_grad_() for t in (x, r, w)))
    torch.autograd.backward((y, h), (dy, dy))
    expected = (y, h, x.grad, r.grad, w.grad)
    for results in group.run(redistributed_add_call, input_placement, residual_placement):
        for ours, whole in zip(results, expected, strict=True):
            torch.testing.assert_close(ours, whole)


def call_on_two_dimensions():
    x, w, g = inputs_of((4, 2, 6, 8), (2, 1, 8))
    on = init_device_mesh("cpu", (1, WORLD), mesh_dim_names=("data", "heads"))
    x, g = (distribute_tensor(t, on, [Shard(0), Shard(1)]) for t in (x, g))
    w = distribute_tensor(w, on, [Replicate(), Shard(0)])
    leaves = x.requires_grad_(), w.requires_grad_()
    with CommDebugMode() as communication:
        y = ops.rms_norm(x, w)
        grads = torch.autograd.grad(y, leaves, g)
    assert communication.get_total_counts() == 0
    assert grads[1].placements == (Partial(), Shard(0))
    return [t.full_tensor().detach() for t in (y, *grads)]


def test_a_mesh_of_two_dimensions(group):
    """Data parallel along one, the heads along the other."""
    x, w, g = inputs_of((4, 2, 6, 8), (2, 1, 8))
    y = ops.rms_norm(x.requires_grad_(), w.requires_grad_())
    y.backward(g)
    for results in group.run(call_on_two_dimensions):
        for ours, whole in zip(results, (y, x.grad, w.grad), strict=True):
            torch.testing.assert_close(ours, whole)


def inference_call():
    x, w, _ = inputs_of((4, 6, 8), (8,))
    with torch.inference_mode():
        x, w = distribute_tensor(x, mesh(), [Shard(0)]), distribute_tensor(w, mesh(), [Replicate()])
        return ops.rms_norm(x, w).full_tensor()


def test_inference_mode(group):
    x, w, _ = inputs_of((4, 6, 8), (8,))
    for y in group.run(inference_call):
        assert torch.equal(y, ops.rms_norm(x, w))


def redistributed_call(input_placement, scale_placement):
    x, w, g = inputs_of((4, 2, 6, 8), (2, 1, 8))
    x = distribute_tensor(x, mesh(), [input_placement]).requires_grad_()
    w = distribute_tensor(w, mesh(), [scale_placement]).requires_grad_()
    y = ops.rms_norm(x, w)
    y.backward(distribute_tensor(g, mesh(), [Replicate()]))
    return [t.full_tensor().detach() for t in (y, x.grad, w.grad)]


@pytest.mark.parametrize(
    ("input_placement", "scale_placement"),
    [
        (Shard(3), Replicate()),  # a row in two parts
        (Shard(3), Shard(2)),
        (Shard(1), Replicate()),  # the scale is cut locally
        (Shard(0), Shard(0)),
        (Replicate(), Shard(0)),
        (Replicate(), Replicate()),
    ],
    ids=str,
)
def test_other_placements_are_right_too(group, input_placement, scale_placement):
    x, w, g = inputs_of((4, 2, 6, 8), (2, 1, 8))
    y = ops.rms_norm(x.requires_grad_(), w.requires_grad_())
    y.backward(g)
    for results in group.run(redistributed_call, input_placement, scale_placement):
        for ours, whole in zip(results, (y, x.grad, w.grad), strict=True):
            torch.testing.assert_close(ours, whole)


def compiled_call():
    x, w, _ = inputs_of((4, 6, 8), (8,))
    x = distribute_tensor(x, mesh(), [Shard(1)]).requires_grad_()
    w = distribute_tensor(w, mesh(), [Replicate()]).requires_grad_()
    function = torch.compile(ops.rms_norm, backend="aot_eager", fullgraph=True)
    y = function(x, w)
    y.sum().backward()
    return [t.full_tensor().detach() for t in (y, x.grad, w.grad)]


def test_compiled_on_dtensors(group):
    x, w, _ = inputs_of((4, 6, 8), (8,))
    y = ops.rms_norm(x.requires_grad_(), w.requires_grad_())
    y.sum().backward()
    for results in group.run(compiled_call):
        for ours, whole in zip(results, (y, x.grad, w.grad), strict=True):
            torch.testing.assert_close(ours, whole)


@pytest.mark.parametrize("first", ["coreai_torch", "torch.distributed.tensor"])
def test_strategies_are_there_in_any_order_of_imports(first):
    """And DTensor, which takes long to import, is not imported by us."""
    second = {"coreai_torch": "torch.distributed.tensor"}.get(first, "coreai_torch")
    program = f"""
import sys, {first}
assert ("torch.distributed.tensor" in sys.modules) == ({first!r} != "coreai_torch")
import {second}, torch
known = torch.distributed.tensor.DTensor._op_dispatcher.sharding_propagator.op_strategy_funcs
assert torch.ops.coreai_torch.fused_rms_norm.default in known
assert torch.ops.coreai_torch.fused_rms_norm_backward.default in known
assert torch.ops.coreai_torch.fused_add_rms_norm.default in known
assert torch.ops.coreai_torch.fused_add_rms_norm_backward.default in known
"""
    subprocess.run([sys.executable, "-W", "error:coreai_torch", "-c", program], check=True)


# --- training ---------------------------------------------------------------------------------

DIM, HEADS, LENGTH, BATCH, STEPS = 16, 2, 6, 4, 4


class Attention(nn.Module):
    """Attention with norms over each head's queries and keys, the heads those of the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(DIM, DIM, bias=False) for _ in range(4))
        self.q_norm = RMSNorm(DIM // HEADS, n_heads=HEADS)
        self.k_norm = RMSNorm(DIM // HEADS, n_heads=HEADS)

    def forward(self, x: Tensor) -> Tensor:
        heads = [f(x).unflatten(-1, (-1, DIM // HEADS)).transpose(1, 2) for f in self.projections]
        q, k = self.q_norm(heads[0]), self.k_norm(heads[1])
        y = nn.functional.scaled_dot_product_attention(q, k, heads[2], is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))

    @property
    def projections(self) -> tuple[nn.Module, ...]:
        return self.q, self.k, self.v


class Model(nn.Module):
    """A transformer block and what is around it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.attention = RMSNorm(DIM), Attention()
        self.mlp_norm = RMSNorm(DIM)
        self.mlp = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.SiLU(), nn.Linear(2 * DIM, DIM))
        self.final_norm = RMSNorm(DIM)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        x = x + self.mlp(self.mlp_norm(x))
        return self.final_norm(x)


def model_and_data() -> tuple[Model, Tensor, Tensor]:
    torch.manual_seed(2)
    model = Model()
    for norm in model.modules():
        if isinstance(norm, RMSNorm):
            nn.init.normal_(norm.weight, mean=1, std=0.1)
    return model, torch.randn(BATCH, LENGTH, DIM), torch.randn(BATCH, LENGTH, DIM)


def train(
    model: nn.Module, x: Tensor, target: Tensor, mean_over_ranks: bool = False
) -> list[float]:
    """The losses of a few steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = (model(x).float() - target).square().mean()
        loss.backward()
        optimizer.step()
        value = loss.detach()
        if mean_over_ranks:
            dist.all_reduce(value)
            value /= WORLD
        losses.append(value.item())
    return losses


def alone() -> list[float]:
    losses = train(*model_and_data())
    assert losses[-1] < losses[0]
    return losses


def assert_losses(results: list[list[float]], expected: list[float], rtol: float = 1e-5) -> None:
    for losses in results:
        assert losses == pytest.approx(expected, rel=rtol)


def my_part(tensor: Tensor, dim: int = 0) -> Tensor:
    return tensor.chunk(WORLD, dim)[dist.get_rank()]


def train_ddp() -> list[float]:
    model, x, target = model_and_data()
    return train(DistributedDataParallel(model), my_part(x), my_part(target), mean_over_ranks=True)


def test_data_parallel(group):
    assert_losses(group.run(train_ddp), alone())


def sharded_model(policy: MixedPrecisionPolicy | None = None) -> nn.Module:
    model, _, _ = model_and_data()
    options = {"mesh": mesh()} | ({"mp_policy": policy} if policy else {})
    for module in (model.attention, model.mlp, model):
        fully_shard(module, **options)
    return model


def train_fsdp() -> list[float]:
    _, x, target = model_and_data()
    return train(sharded_model(), my_part(x), my_part(target), mean_over_ranks=True)


def test_fully_sharded_data_parallel(group):
    assert_losses(group.run(train_fsdp), alone())


def train_fsdp_from_meta() -> list[float]:
    """Built without memory, sharded, and only then given memory and values."""
    expected, x, target = model_and_data()
    with torch.device("meta"):
        model = Model()
    for module in (model.attention, model.mlp, model):
        fully_shard(module, mesh=mesh())
    model.to_empty(device="cpu")
    for norm in model.modules():
        if isinstance(norm, RMSNorm):
            norm.reset_parameters()
            assert torch.equal(norm.weight.full_tensor(), torch.ones(norm.weight.shape))
    set_model_state_dict(
        model, expected.state_dict(), options=StateDictOptions(full_state_dict=True)
    )
    return train(model, my_part(x), my_part(target), mean_over_ranks=True)


def test_fully_sharded_from_the_meta_device(group):
    assert_losses(group.run(train_fsdp_from_meta), alone())


def train_fsdp_in_bfloat16() -> list[float]:
    _, x, target = model_and_data()
    model = sharded_model(MixedPrecisionPolicy(torch.bfloat16, torch.float32))
    seen = set()

    def note(norm: nn.Module, inputs: Any, output: Tensor) -> None:
        seen.add((inputs[0].dtype, norm.weight.dtype, output.dtype))

    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.register_forward_hook(note)
    losses = train(model, my_part(x), my_part(target), mean_over_ranks=True)
    assert seen == {(torch.bfloat16,) * 3}
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())
    return losses


def test_fully_sharded_data_parallel_in_mixed_precision(group):
    assert_losses(group.run(train_fsdp_in_bfloat16), alone(), rtol=2e-2)


def sharded_by_heads(norm: nn.Module, on: Any) -> None:
    """A norm with a weight per head, for inputs (batch, heads, length, dim) whose heads are local
    to the processes."""
    distribute_module(
        norm,
        on,
        lambda _, module, on: [
            module.register_parameter(name, nn.Parameter(distribute_tensor(p, on, [Shard(0)])))
            for name, p in module.named_parameters(recurse=False)
        ],
        lambda _, inputs, on: tuple(DTensor.from_local(x, on, [Shard(1)]) for x in inputs),
        lambda _, output, on: output.to_local(),
    )


def train_sequence_parallel() -> list[float]:
    model, x, target = model_and_data()
    on = mesh()
    plan = {
        "attention_norm": SequenceParallel(),
        "attention": PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate()),
        "attention.q": ColwiseParallel(),
        "attention.k": ColwiseParallel(),
        "attention.v": ColwiseParallel(),
        "attention.out": RowwiseParallel(output_layouts=Shard(1)),
        "mlp_norm": SequenceParallel(),
        "mlp": PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate()),
        "mlp.0": ColwiseParallel(),
        "mlp.2": RowwiseParallel(output_layouts=Shard(1)),
        "final_norm": SequenceParallel(use_local_output=True),
    }
    parallelize_module(model, on, plan)
    for norm in (model.attention.q_norm, model.attention.k_norm):
        sharded_by_heads(norm, on)
        assert norm.weight.to_local().shape == (HEADS // WORLD, 1, DIM // HEADS)
    return train(model, my_part(x, 1), my_part(target, 1), mean_over_ranks=True)


def test_tensor_and_sequence_parallel(group):
    # Each process's loss is the mean over its half of the sequence, so that the gradients that are
    # added up are twice those of one process: to AdamW, which divides by their size, the same.
    assert_losses(group.run(train_sequence_parallel), alone(), rtol=1e-4)


def communication_of_sequence_parallel() -> dict[str, int]:
    norm = parallelize_module(RMSNorm(DIM), mesh(), SequenceParallel())
    x = torch.randn(BATCH, LENGTH // WORLD, DIM, requires_grad=True)
    with CommDebugMode() as communication:
        norm(x).to_local().sum().backward()
    assert isinstance(norm.weight.grad, DTensor)
    return communication.get_total_counts()


def test_sequence_parallel_gathers_nothing(group):
    assert group.run(communication_of_sequence_parallel) == [0, 0]


def train_context_parallel() -> list[float]:
    """Each process has all weights and two parts of the sequence, as ring attention wants them."""
    norm = RMSNorm(DIM)
    _, x, target = model_and_data()
    x, target = x.repeat(1, 2, 1), target.repeat(1, 2, 1)
    optimizer = torch.optim.AdamW(norm.parameters(), lr=0.01)
    losses = []
    with context_parallel(mesh(), buffers=[x, target], buffer_seq_dims=[1, 1]):
        assert x.shape[1] == 2 * LENGTH // WORLD
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss = (norm(x) - target).square().mean()
            loss.backward()
            for value in (loss.detach(), norm.weight.grad):
                dist.all_reduce(value)
                value /= WORLD
            optimizer.step()
            losses.append(loss.item())
    return losses


def test_context_parallel(group):
    _, x, target = model_and_data()
    assert_losses(group.run(train_context_parallel), train(RMSNorm(DIM), x, target))


# --- checkpoints ------------------------------------------------------------------------------


def save_sharded(folder: str) -> None:
    dcp.save({"model": get_model_state_dict(sharded_model())}, checkpoint_id=folder)


def load_sharded(folder: str) -> dict[str, Tensor]:
    model = sharded_model()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    state = {"model": get_model_state_dict(model)}
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state["model"])
    return {name: p.full_tensor().detach() for name, p in model.named_parameters()}


def test_distributed_checkpoint(group, tmp_path):
    """Saved by two processes, it loads in one, and the other way round."""
    expected, _, _ = model_and_data()
    group.run(save_sharded, str(tmp_path / "two"))
    loaded = copy.deepcopy(expected)
    for parameter in loaded.parameters():
        nn.init.zeros_(parameter)
    state = {"model": loaded.state_dict()}
    dcp.load(state, checkpoint_id=tmp_path / "two")
    loaded.load_state_dict(state["model"])
    for ours, whole in zip(loaded.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, whole)

    dcp.save({"model": expected.state_dict()}, checkpoint_id=tmp_path / "one")
    for results in group.run(load_sharded, str(tmp_path / "one")):
        for name, whole in expected.named_parameters():
            assert torch.equal(results[name], whole)


# --- the example ------------------------------------------------------------------------------

TRAIN = Path(__file__).parents[1] / "examples" / "train_lm.py"
SMALL = [
    *("--dim", "64", "--n-layers", "2", "--seq-len", "32"),
    *("--batch-size", "4", "--steps", "6", "--data-mb", "0.5"),
]


def run_example(out: Path, *options: str, kind: str | None = None) -> list[float]:
    """The losses of a short run."""
    for needed in ("matplotlib", "tqdm"):
        pytest.importorskip(needed)
    launch = [sys.executable]
    if kind is not None:
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WORLD)]
        options = (*options, "--parallel", kind)
    command = [*launch, str(TRAIN), *SMALL, "--device", "cpu", "--out", str(out), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    with (out / "loss.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def losses_of_one_process(tmp_path_factory):
    return run_example(tmp_path_factory.mktemp("one"))


@pytest.mark.slow
@pytest.mark.skipif(not TRAIN.exists(), reason="needs a checkout")
@pytest.mark.parametrize("kind", ["ddp", "fsdp", "sp"])
def test_example_in_parallel(kind, losses_of_one_process, tmp_path):
    assert run_example(tmp_path, kind=kind) == pytest.approx(losses_of_one_process, rel=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not TRAIN.exists(), reason="needs a checkout")
def test_example_goes_on_with_another_number_of_processes(losses_of_one_process, tmp_path):
    run_example(tmp_path, "--stop-at", "2")
    run_example(tmp_path, "--resume", "--stop-at", "4", kind="sp")
    losses = run_example(tmp_path, "--resume")
    assert losses == pytest.approx(losses_of_one_process, rel=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not TRAIN.exists(), reason="needs a checkout")
def test_example_says_how_to_start_it():
    command = [sys.executable, str(TRAIN), "--parallel", "ddp"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "torchrun --nproc-per-node 2" in done.stderr
