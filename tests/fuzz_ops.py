"""Calls every op of the namespace with arguments of which no more is known than the schema says.

    python tests/fuzz_ops.py                       100,000 calls
    python tests/fuzz_ops.py --calls 10000000 --seed 7
    python tests/fuzz_ops.py --seed 7 --only 4711  that one call, printed before it is made

Arguments are wrong in rank, size, dtype, layout, device, strides or storage as often as they are
right. A call may return tensors or raise one of the errors of the contract; anything else is a
finding, and so is memory written beside the results. Calls are made in a child process, so that a
crash is one too: the parent knows which call was under way, and how to repeat it.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import mmap
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import coreai_torch  # noqa: F401  registers the ops

NAMESPACE = "coreai_torch"
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
OTHER_DTYPES = (
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)
SIZES = (1, 1, 1, 2, 2, 3, 3, 4, 5, 8, 16, 17, 33, 64, 0)
MOST_ELEMENTS = 2048  # of the shape of a call: time is for more calls
EPS = (1e-5, 1e-6, 0.0, -0.0, 1.0, 1e-40, 1e300, float("inf"), -1.0, -1e-30, float("nan"))

# What a call may say of its arguments, and what PyTorch says before the call is ours.
KINDS = (RuntimeError, NotImplementedError, ValueError, TypeError)
MESSAGES = re.compile(
    r"(fused_)?\w*rms_norm\w*: expected \w+ "  # ours
    r"|.*DefaultCPUAllocator: can't allocate memory"
    r"|Could not run '\S+' with arguments from the '\w+' backend"
    r"|.*Expected a value of type '.*' for argument '\w+'"
    r"|Tried to convert a List with \d+ elements to a fixed-size array"
    r"|(Stride|Storage size) calculation overflowed"
    r"|only tensors with up to 64 dims are supported"
    r"|Inference tensors cannot be saved for backward"
)


def ops() -> dict[str, torch._ops.OpOverload]:
    """Every op of the namespace, with all its overloads."""
    found = {}
    for schema in torch._C._jit_get_all_schemas():
        namespace, _, name = schema.name.partition("::")
        if namespace == NAMESPACE:
            overload = schema.overload_name or "default"
            found[f"{name}.{overload}"] = getattr(getattr(torch.ops.coreai_torch, name), overload)
    return dict(sorted(found.items()))


class Arguments:
    """Random arguments. What a tensor is like is drawn around one shape and dtype for each call, so
    that many calls are nearly right."""

    def __init__(self, seed: int, index: int) -> None:
        self.random = random.Random(f"{seed}.{index}")
        shape = [self.random.choice(SIZES) for _ in range(self.random.randint(1, 4))]
        while math.prod(shape) > MOST_ELEMENTS:
            shape[shape.index(max(shape))] = 2
        self.shape = tuple(shape)
        self.dtype = self.random.choice(DTYPES)
        self.wrong = self.random.choice((0.0, 0.0, 0.02, 0.2))  # how often something is

    def of(self, argument: Any) -> Any:
        """A value for one argument of a schema."""
        kind = str(argument.type)
        if kind == "Tensor":
            return self.tensor(argument.name)
        if kind == "Optional[Tensor]":
            return None if self.random.random() < 0.3 else self.tensor(argument.name)
        if kind == "float":
            return self.random.choice(EPS[:5] if self.random.random() > self.wrong else EPS)
        if kind == "bool":
            return self.random.random() < 0.5
        if kind == "List[bool]":
            length = 2 if self.random.random() > self.wrong else self.random.randint(0, 3)
            return [self.random.random() < 0.7 for _ in range(length)]
        raise SystemExit(f"tests/fuzz_ops.py makes no values of type {kind} yet ({argument.name})")

    def tensor(self, name: str) -> Tensor | None:
        """A tensor for the argument of that name."""
        wrong = self.random.random() < self.wrong
        if wrong and self.random.random() < 0.05:
            return None
        shape = self._scale_shape() if "scale" in name or "weight" in name else self.shape
        if wrong and self.random.random() < 0.5:
            shape = self._other_shape(shape)
        dtype = self.dtype
        if self.random.random() < 0.2 or ("scale" in name and self.random.random() < 0.3):
            dtype = self.random.choice(DTYPES)
        if wrong and self.random.random() < 0.2:
            dtype = self.random.choice(OTHER_DTYPES)
        tensor = self._laid_out(shape, dtype)
        if wrong and self.random.random() < 0.5:
            with suppress(RuntimeError, NotImplementedError, IndexError):  # there is no such tensor
                tensor = self._odd(tensor)
        elif tensor.is_floating_point() and self.random.random() < 0.3:
            tensor = tensor.detach().requires_grad_()
        return tensor

    def _scale_shape(self) -> tuple[int, ...]:
        """One that broadcasts to the shape of the call and spans its last dimension."""
        shape = [size if self.random.random() < 0.5 else 1 for size in self.shape]
        shape[-1] = self.shape[-1]
        return tuple(shape[self.random.randrange(len(shape)) :])

    def _other_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        changed = list(shape)
        choice = self.random.randrange(6)
        if choice == 0:
            return ()
        if choice == 1:
            changed.pop(self.random.randrange(len(changed)))
        elif choice == 2:
            changed.insert(self.random.randint(0, len(changed)), self.random.choice(SIZES))
        elif choice == 3:
            changed[self.random.randrange(len(changed))] = self.random.choice(SIZES)
        elif choice == 4:
            self.random.shuffle(changed)
        else:
            changed[:0] = [1] * self.random.choice((5, 60, 63, 64, 65, 100))
        return tuple(changed)

    def _values(self, count: int, dtype: torch.dtype) -> Tensor:
        """Memory with random bits: every value is possible, NaN and Inf among them."""
        generator = torch.Generator().manual_seed(self.random.getrandbits(60))
        if dtype in DTYPES and self.random.random() < 0.7:
            return torch.randn(count, generator=generator).to(dtype)
        size = count * dtype.itemsize
        bits = torch.randint(256, (size,), generator=generator, dtype=torch.uint8)
        return bits % 2 == 0 if dtype == torch.bool else bits.view(dtype)

    def _laid_out(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        count = math.prod(shape)
        choice = self.random.randrange(8)
        if choice == 0 and shape:  # transposed in memory
            order = list(range(len(shape)))
            self.random.shuffle(order)
            tensor = self._values(count, dtype).view([shape[d] for d in order])
            return tensor.permute([order.index(d) for d in range(len(shape))])
        if choice == 1:  # anything that the storage holds: overlapping, expanded, with gaps
            strides = [self.random.choice((0, 1, 1, 2, 3, 7, 40)) for _ in shape]
            offset = self.random.randrange(9)
            last = sum((max(size, 1) - 1) * s for size, s in zip(shape, strides, strict=True))
            return self._values(offset + last + 1, dtype).as_strided(shape, strides, offset)
        if choice == 2 and shape:  # a slice of something wider
            wider = (*shape[:-1], shape[-1] + 9)
            offset = self.random.randrange(9)
            whole = self._values(math.prod(wider), dtype).view(wider)
            return whole[..., offset : offset + shape[-1]]
        if choice == 3 and count:  # expanded
            small = [size if self.random.random() < 0.5 else 1 for size in shape]
            return self._values(math.prod(small), dtype).view(small).expand(shape)
        offset = self.random.randrange(9) if choice == 4 else 0
        return self._values(count + offset, dtype)[offset:].view(shape)

    def _odd(self, tensor: Tensor) -> Tensor:
        """A tensor of another kind, or in a state that few are in."""
        choice = self.random.randrange(14)
        shape = tuple(tensor.shape)
        if choice == 0:  # freed, wholly or in part
            tensor = tensor.clone()
            storage = tensor.untyped_storage()
            storage.resize_(self.random.choice((0, 1, storage.nbytes() // 2)))
            return tensor
        if choice == 1:
            return tensor.to("meta")
        if choice == 2:
            return tensor.to_sparse()
        if choice == 3 and tensor.dim() == 2:
            return tensor.to_sparse_csr()
        if choice == 4 and tensor.dtype == torch.float32:
            return tensor.contiguous().to_mkldnn()
        if choice == 5 and tensor.dim() > 1:
            return torch.nested.nested_tensor([tensor[0], tensor[0]])
        if choice == 6 and tensor.dtype == torch.float32:
            return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)
        if choice == 7:
            return torch._efficientzerotensor(shape, dtype=tensor.dtype)
        if choice == 8:  # with the negative bit
            return torch._neg_view(tensor) if tensor.dtype in DTYPES else tensor
        if choice == 9:  # more elements than any machine has room for
            huge = self.random.choice((1 << 40, 1 << 50, 1 << 58))
            return tensor.as_strided((huge, *shape), (0, *tensor.stride()))
        if choice == 10:  # no elements, in more dimensions than anything else could have
            dims = self.random.choice((5, 62, 64, 70, 200))
            stride = self.random.choice((0, 1, 3, 1 << 40, 1 << 62))
            return tensor.as_strided((0, *(2,) * dims, *shape), (stride,) * (dims + 1 + len(shape)))
        if choice == 11:
            with torch.inference_mode():
                return tensor.clone()
        if choice == 12:
            return torch.nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
        return tensor.detach().conj() if tensor.is_complex() else tensor.unsqueeze(0)


def describe(value: object) -> str:
    """An argument in a line."""
    if not isinstance(value, Tensor):
        return repr(value)
    parts = [str(value.dtype), str(value.layout), value.device.type]
    try:
        parts += [f"size {tuple(value.shape)}", f"stride {value.stride()}"]
        parts.append(f"offset {value.storage_offset()} of {value.untyped_storage().nbytes()} bytes")
    except (RuntimeError, NotImplementedError):
        parts.append("of a kind without strides or storage")
    return f"Tensor({', '.join(parts)}, requires_grad={value.requires_grad})"


def backward(result: object) -> None:
    """The gradients of what a call returned, where it has some."""
    outputs = result if isinstance(result, tuple) else (result,)
    roots = [t for t in outputs if isinstance(t, Tensor) and t.requires_grad and t.numel()]
    if roots:
        torch.autograd.backward(roots, [torch.ones_like(t) for t in roots])


def call(op: torch._ops.OpOverload, arguments: list[object], gradients: bool) -> str:
    """Make a call, maybe with gradients, and say how it ended; raise what is a finding."""
    tensors = [a for a in arguments if isinstance(a, Tensor)]
    before = [contents(t) for t in tensors]
    try:
        result = op(*arguments)
        if gradients:
            backward(result)
    except KINDS as error:
        text = str(error).partition("\n")[0]
        if not MESSAGES.match(text):
            raise AssertionError(f"a message that is not in the contract: {text}") from error
        return type(error).__name__
    if [contents(t) for t in tensors] != before:
        raise AssertionError("an argument was changed")
    return "returned"


def contents(tensor: Tensor) -> bytes | None:
    """All the bytes of a tensor's storage, those around the tensor as well."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_nested:
        return None
    if tensor.is_quantized or tensor._is_zerotensor():
        return None
    storage = tensor.untyped_storage()
    return ctypes.string_at(storage.data_ptr(), storage.nbytes())


def child(seed: int, calls: range, progress: Path, gibibytes: int) -> None:
    """Those calls, each noted in the file before it is made."""
    warnings.simplefilter("ignore")  # of prototype and deprecated kinds of tensors
    if gibibytes:  # huge outputs are not to fill the machine
        resource.setrlimit(resource.RLIMIT_AS, (gibibytes << 30, gibibytes << 30))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    torch.set_num_threads(2)
    found = ops()
    names = list(found)
    outcomes: Counter[tuple[str, str]] = Counter()
    with open(progress, "r+b") as file, mmap.mmap(file.fileno(), 8) as memory:
        for index in calls:
            memory[:] = index.to_bytes(8, "little")
            drawn = Arguments(seed, index)
            name = drawn.random.choice(names)
            arguments = [drawn.of(a) for a in found[name]._schema.arguments]
            if len(calls) == 1:
                print(name, *map(describe, arguments), sep="\n  ", flush=True)
            try:
                outcomes[name, call(found[name], arguments, drawn.random.random() < 0.2)] += 1
            except BaseException as error:
                said = f"{type(error).__name__}: {error}"
                raise SystemExit(
                    f"call {index}, {name}\n  " + "\n  ".join([*map(describe, arguments), said])
                ) from error
    for (name, outcome), count in outcomes.items():
        print(name, outcome, count)


def run(seed: int, calls: range, gibibytes: int) -> subprocess.CompletedProcess[str]:
    """Those calls in a process of their own. Its output counts how they ended."""
    with tempfile.NamedTemporaryFile() as progress:
        progress.write(bytes(8))
        progress.flush()
        command = [sys.executable, __file__, "--seed", str(seed), "--child", progress.name]
        command += [str(calls.start), str(calls.stop), "--address-space", str(gibibytes)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            index = int.from_bytes(Path(progress.name).read_bytes(), "little")
            how = f"signal {-done.returncode}" if done.returncode < 0 else "a finding"
            done.stderr += (
                f"\n{how} in call {index} of seed {seed}; to repeat it:\n"
                f"    python tests/{os.path.basename(__file__)} --seed {seed} --only {index}\n"
            )
    return done


def fuzz(seed: int, calls: int, jobs: int, gibibytes: int) -> int:
    """All calls, in so many processes. Returns the exit status."""
    step = -(-calls // jobs)
    parts = [range(first, min(first + step, calls)) for first in range(0, calls, step)]
    with ThreadPoolExecutor(jobs) as pool:
        ended = list(pool.map(lambda part: run(seed, part, gibibytes), parts))
    failed = [done for done in ended if done.returncode]
    for done in failed:
        print(done.stdout, done.stderr, file=sys.stderr)
    if failed:
        return 1
    outcomes: Counter[tuple[str, str]] = Counter()
    for line in "".join(done.stdout for done in ended).splitlines():
        name, outcome, count = line.split()
        outcomes[name, outcome] += int(count)
    for (name, outcome), count in sorted(outcomes.items()):
        print(f"{name:40} {outcome:20} {count}")
    for name in ops():
        ways = [outcome for of, outcome in outcomes if of == name]
        if "returned" not in ways or len(ways) < 2:
            print(f"{name}: expected some calls to return and some to raise", file=sys.stderr)
            return 1
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--address-space", type=int, default=24, help="GiB; 0: no limit")
    parser.add_argument("--only", type=int, help="the number of the one call to make")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        progress, first, last = options.child
        calls = range(int(first), int(last))
        child(options.seed, calls, Path(progress), options.address_space)
        return 0
    if options.only is None:
        return fuzz(options.seed, options.calls, options.jobs, options.address_space)
    done = run(options.seed, range(options.only, options.only + 1), options.address_space)
    print(done.stdout, done.stderr)
    return 1 if done.returncode else 0


if __name__ == "__main__":
    sys.exit(main())
