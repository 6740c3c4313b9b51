"""Training the language model with several processes, which `torchrun` starts.

ddp    every process has the whole model and a part of the batch
fsdp   the same, but parameters, gradients and optimizer state are sharded over the processes
sp     tensor and sequence parallel: matrices are cut, activations between them are sharded over
       the sequence, and each process norms its part of it
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from lm_model import LanguageModel
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

KINDS = ("ddp", "fsdp", "sp")
Call = Callable[[Tensor], Tensor]


class HeadParallel(ParallelStyle):
    """For a norm with a weight per head, where each process has some of the heads.

    The weight (n_heads, 1, head_dim) is sharded over the heads, as the inputs (batch, n_heads,
    seq_len, head_dim) are; so neither needs to be communicated, forward or backward.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return distribute_module(module, device_mesh, self._shard, self._enter, self._leave)

    @staticmethod
    def _shard(name: str, module: nn.Module, mesh: DeviceMesh) -> None:
        for key, parameter in module.named_parameters(recurse=False):
            module.register_parameter(
                key, nn.Parameter(distribute_tensor(parameter, mesh, [Shard(0)]))
            )

    @staticmethod
    def _enter(module: nn.Module, inputs: tuple[Tensor, ...], mesh: DeviceMesh) -> tuple[DTensor]:
        return (DTensor.from_local(inputs[0], mesh, [Shard(1)]),)

    @staticmethod
    def _leave(module: nn.Module, output: DTensor, mesh: DeviceMesh) -> Tensor:
        return output.to_local()


def shard_sequence(model: LanguageModel, mesh: DeviceMesh) -> None:
    """Tensor parallel inside of attention and feed-forward, sequence parallel between them."""
    sequence, whole = Shard(1), Replicate()
    gather = {"input_layouts": sequence, "desired_input_layouts": whole}
    for block in model.blocks:
        plan = {
            "attention_norm": SequenceParallel(),
            "attention": PrepareModuleInput(
                input_layouts=(sequence, None), desired_input_layouts=(whole, None)
            ),
            "attention.qkv": ColwiseParallel(),
            "attention.q_norm": HeadParallel(),
            "attention.k_norm": HeadParallel(),
            "attention.out": RowwiseParallel(output_layouts=sequence),
            "mlp_norm": SequenceParallel(),
            "mlp": PrepareModuleInput(**gather),
            "mlp.gate": ColwiseParallel(),
            "mlp.up": ColwiseParallel(),
            "mlp.out": RowwiseParallel(output_layouts=sequence),
        }
        parallelize_module(block, mesh, plan)
    plan = {
        "embedding": RowwiseParallel(input_layouts=whole, output_layouts=sequence),
        "final_norm": SequenceParallel(),
    }
    parallelize_module(model, mesh, plan)
    # The output layer is the embedding, a DTensor, and so are its logits.
    parallelize_module(
        model,
        mesh,
        PrepareModuleOutput(output_layouts=sequence, desired_output_layouts=whole),
    )


class Processes:
    """The processes that train together; by default this one alone."""

    def __init__(self, kind: str | None, device: torch.device) -> None:
        self.kind, self.device, self.rank, self.count = kind, device, 0, 1
        if kind is None:
            return
        if "LOCAL_RANK" not in os.environ:
            raise SystemExit(
                "--parallel: expected to be started by torchrun, for example\n"
                f"    torchrun --nproc-per-node 2 examples/train_lm.py --parallel {kind}"
            )
        if device.type == "cuda":
            self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(self.device)
        self.mesh = init_device_mesh(device.type, (int(os.environ["WORLD_SIZE"]),))
        self.rank, self.count = self.mesh.get_rank(), self.mesh.size()

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and prints."""
        return self.rank == 0

    def check(self, batch_size: int, n_heads: int, seq_len: int) -> None:
        """Exit with a message where the work cannot be divided evenly."""
        parts = {"--n-heads": n_heads, "--seq-len": seq_len}
        if self.kind in ("ddp", "fsdp"):
            parts = {"--batch-size": batch_size}
        for name, size in parts.items():
            if size % self.count:
                raise SystemExit(
                    f"{name}: expected a multiple of {self.count} processes, got {size}"
                )

    def spread(self, model: LanguageModel) -> Call:
        """Spread the model over the processes; returns what to call in its place."""
        if self.kind == "ddp":
            return DistributedDataParallel(model)
        if self.kind == "fsdp":
            for block in model.blocks:
                fully_shard(block, mesh=self.mesh)
            fully_shard(model, mesh=self.mesh)
        elif self.kind == "sp":
            shard_sequence(model, self.mesh)
        return model

    def part(self, tensor: Tensor) -> Tensor:
        """This process's part of a batch."""
        return tensor if self.kind in (None, "sp") else tensor.chunk(self.count)[self.rank]

    def mean(self, value: Tensor) -> float:
        """The mean over all processes."""
        value = value.detach().clone()
        if self.kind is not None:
            dist.all_reduce(value)
        return value.item() / self.count

    def finish(self, status: int) -> int:
        """The last thing a process does; one of several ends here, with that exit status.

        It ends without what Python does at its end. DTensor's caches keep the group and gloo's
        threads beyond destroy_process_group(), and a thread that only then lets go of the tensor
        of the last collective would abort the process: "terminate called without an active
        exception".
        """
        if self.kind is None:
            return status
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
