"""What each op of the library must have. Whoever adds one is told what is missing, and where.

They are found among the registered ones. `coreai_torch::OP`, `fused_OP` and `fused_OP_backward` are
one op: the first is what an exported program has, where there is one, the others have the kernels.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from environments import ROOT
from torch.distributed.tensor import DTensor

from coreai_torch import _C, ops, reference

IN_CHECKOUT = (ROOT / "csrc").exists()


def registered() -> set[str]:
    names = (schema.name for schema in torch._C._jit_get_all_schemas())
    return {name.partition("::")[2] for name in names if name.startswith("coreai_torch::")}


def stem(name: str) -> str:
    return name.removeprefix("fused_").removesuffix("_backward")


def found() -> list[str]:
    return sorted({stem(name) for name in registered()})


def with_kernels(op: str) -> list[str]:
    return sorted({f"fused_{op}", f"fused_{op}_backward"} & registered())


def has_kernel(name: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"coreai_torch::{name}", key)


def has_fake(name: str) -> bool:
    return torch._library.simple_registry.singleton.find(
        f"coreai_torch::{name}"
    ).fake_impl.kernel is not None or has_kernel(name, "Meta")


def has_sharding(name: str) -> bool:
    op = getattr(torch.ops.coreai_torch, name).default
    return op in DTensor._op_dispatcher.sharding_propagator.op_strategy_funcs


OF_KERNELS: dict[str, Callable[[str], bool]] = {
    "CPU kernel (csrc/torch/{op}_cpu.cpp)": lambda name: has_kernel(name, "CPU"),
    "Autograd kernel (csrc/torch/{op}_autograd.cpp)": lambda name: has_kernel(name, "Autograd"),
    "formula for devices without kernels, under CompositeExplicitAutograd (csrc/torch/{op}.cpp)": (
        lambda name: has_kernel(name, "CompositeExplicitAutograd")
    ),
    "fake kernel, torch.library.register_fake (coreai_torch/ops/{op}.py)": has_fake,
    "vmap rule, torch.library.register_vmap (coreai_torch/ops/_{op}_vmap.py)": (
        lambda name: has_kernel(name, "FuncTorchBatched")
    ),
    "sharding strategy, register_sharding (coreai_torch/ops/_{op}_sharding.py)": has_sharding,
}


def mentioned(op: str, *patterns: str) -> bool:
    """Whether a file has the name of the function, file or op, and not only a like word."""
    files = [path for pattern in patterns for path in ROOT.glob(pattern)]
    name = re.compile(rf"(?:ops\.|ops/|::|`|import |fused_){op}\b")
    return any(name.search(file.read_text()) for file in files)


def missing(op: str) -> Iterator[str]:
    if f"fused_{op}" not in registered():
        yield f"an op fused_{op} with the kernels (csrc/torch/library.cpp)"
    for name in with_kernels(op):
        for what, present in OF_KERNELS.items():
            if not present(name):
                yield f"for {name}, a " + what.format(op=op)
    if not callable(getattr(_C, f"fused_{op}", None)):
        yield f"a call in the Python module, fused_{op} (csrc/torch/python_calls.cpp)"
    if op in registered() and not has_kernel(op, "CompositeImplicitAutograd"):
        yield f"a CompositeImplicitAutograd kernel (coreai_torch/ops/{op}.py)"
    for module in (ops, reference):
        if op not in module.__all__ or not callable(getattr(module, op, None)):
            yield f"a function in {module.__name__} and its __all__"
    if not IN_CHECKOUT:
        return
    for folder, file in (("reference", op), ("ops", op)):
        if not Path(ROOT, "coreai_torch", folder, f"{file}.py").exists():
            yield f"a file of its own, coreai_torch/{folder}/{file}.py"
    if not list(ROOT.glob(f"tests/test_{op}*.py")):
        yield f"tests (tests/test_{op}*.py)"
    if not mentioned(op, "benchmarks/**/*.py"):
        yield "a benchmark (benchmarks/)"
    if not mentioned(op, "docs/*.md", "docs/api/*.md"):
        yield "a mention on a page of the documentation (docs/)"
    if not mentioned(op, "csrc/README.md"):
        yield "its way through the folders (csrc/README.md)"


def check(op: str) -> None:
    lacks = "; ".join(missing(op))
    assert not lacks, f"coreai_torch::{op} lacks {lacks}. csrc/README.md says how to add an op."


def test_what_belongs_together():
    assert "rms_norm" in found()
    assert with_kernels("rms_norm") == ["fused_rms_norm", "fused_rms_norm_backward"]


@pytest.mark.parametrize("op", found())
def test_nothing_is_missing(op):
    check(op)


@pytest.mark.skipif(not IN_CHECKOUT, reason="needs a checkout")
def test_what_a_new_op_is_told():
    with torch.library._scoped_library("coreai_torch", "FRAGMENT") as library:
        library.define("halve(Tensor input) -> Tensor")
        library.define("fused_halve(Tensor input) -> Tensor")
        library.impl("fused_halve", lambda input: input / 2, "CPU")
        lacks = list(missing("halve"))
        with pytest.raises(AssertionError, match=r"coreai_torch::halve lacks for fused_halve, a"):
            check("halve")
    told = "\n".join(lacks)
    for what in ("Autograd", "devices without", "fake", "vmap", "sharding", "reference", "ops"):
        assert what in told
    for what in ("python_calls", "tests/test_halve*.py", "benchmark", "page", "csrc/README.md"):
        assert what in told
    assert "CPU kernel" not in told
    assert len(lacks) == 5 + 1 + 1 + 2 + 2 + 4
