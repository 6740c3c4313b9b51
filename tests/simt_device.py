"""The CUDA kernels on the emulator of tests/simt: builds it, and calls it with tensors.

Tensors go in with their storage as it is, so that any strides and offsets can be tried; results
start out as NaN, so that what was not written shows. The memory checker is always on.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "simt"
SCHEDULES = ("forward", "reverse", "random", "greedy")

# What a few generations have, for Simt.set_card(): Hopper (H100), Ampere (A100), Ada (L4).
CARDS = {
    "sm_90": {"clusters": True, "shared_memory_kib": 227},
    "sm_80": {"clusters": False, "shared_memory_kib": 163},
    "sm_89": {"clusters": False, "shared_memory_kib": 99},
}

MAX_DIMS = 64  # kMaxDims of csrc/include/coreai_torch/rms_norm.h
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)  # in the order of DType


class Shape(ctypes.Structure):
    """RmsNormShape."""

    _fields_ = [
        ("input_dtype", ctypes.c_int32),
        ("scale_dtype", ctypes.c_int32),
        ("rows", ctypes.c_int64),
        ("dim", ctypes.c_int64),
        ("groups", ctypes.c_int64),
        ("inner", ctypes.c_int64),
        ("eps", ctypes.c_double),
        ("row_ndim", ctypes.c_int),
        ("row_sizes", ctypes.c_int64 * MAX_DIMS),
    ]


class Forward(ctypes.Structure):
    """RmsNormForward."""

    _fields_ = [
        ("shape", Shape),
        ("input", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
        ("input_strides", ctypes.c_int64 * MAX_DIMS),
        ("output_strides", ctypes.c_int64 * MAX_DIMS),
    ]


class Backward(ctypes.Structure):
    """RmsNormBackward."""

    _fields_ = [
        ("shape", Shape),
        ("grad_output", ctypes.c_void_p),
        ("input", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("grad_input", ctypes.c_void_p),
        ("grad_scale", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
        ("grad_output_strides", ctypes.c_int64 * MAX_DIMS),
        ("input_strides", ctypes.c_int64 * MAX_DIMS),
        ("grad_input_strides", ctypes.c_int64 * MAX_DIMS),
    ]


class AddForward(Forward):
    """AddRmsNormForward."""

    _fields_ = [
        ("residual", ctypes.c_void_p),
        ("new_residual", ctypes.c_void_p),
        ("residual_strides", ctypes.c_int64 * MAX_DIMS),
        ("new_residual_strides", ctypes.c_int64 * MAX_DIMS),
    ]


class AddBackward(Backward):
    """AddRmsNormBackward."""

    _fields_ = [
        ("grad_new_residual", ctypes.c_void_p),
        ("grad_new_residual_strides", ctypes.c_int64 * MAX_DIMS),
    ]


class SimtError(Exception):
    """What the emulator or its checker reports of a kernel."""


@dataclass
class Traffic:
    """Bytes that a kernel moved to or from one buffer."""

    read: int
    written: int
    read_wide: int  # those of them that moved in accesses of 16 bytes
    written_wide: int


class Buffer:
    """Memory of the emulated card: a tensor's storage, or so many bytes of NaN."""

    def __init__(self, simt: Simt, name: str, like: Tensor, *, filled: bool) -> None:
        self.simt = simt
        self.like = like
        self.bytes = like.untyped_storage().nbytes()
        self.base = simt.library.simt_allocate(self.bytes, name.encode())
        self.pointer = self.base + like.storage_offset() * like.element_size()
        if filled and self.bytes:
            simt.library.simt_copy_to_device(
                self.base, like.data_ptr() - (self.pointer - self.base), self.bytes
            )

    def _contents(self) -> Tensor:
        contents = bytearray(ctypes.string_at(self.base, self.bytes))
        return torch.tensor(contents, dtype=torch.uint8)

    def tensor(self) -> Tensor:
        """The contents, in the layout of the tensor that it was made for."""
        result = self._contents()
        return result.view(self.like.dtype).as_strided(
            self.like.size(), self.like.stride(), self.like.storage_offset()
        )

    def gaps_are_untouched(self) -> bool:
        """Is all that does not belong to the tensor still as it was allocated?"""
        gaps = torch.ones(self.bytes // self.like.element_size(), dtype=torch.bool)
        gaps.as_strided(self.like.size(), self.like.stride(), self.like.storage_offset()).fill_(
            False
        )
        contents = self._contents().view(-1, self.like.element_size())
        return bool((contents[gaps] == 0xFF).all())

    def traffic(self) -> Traffic:
        """What kernels moved since the buffer was made."""
        counts = (ctypes.c_uint64 * 4)()
        self.simt.library.simt_traffic(self.base, counts)
        return Traffic(*counts)

    def __del__(self) -> None:
        self.simt.library.simt_free(self.base)


class Simt:
    """An emulated card, with the kernels of one library."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.library = ctypes.CDLL(str(path))
        self.library.simt_allocate.restype = ctypes.c_void_p
        self.library.simt_allocate.argtypes = [ctypes.c_size_t, ctypes.c_char_p]
        self.library.simt_free.argtypes = [ctypes.c_void_p]
        self.library.simt_copy_to_device.argtypes = [
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_size_t,
        ]
        self.library.simt_traffic.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        self.library.simt_last_error.restype = ctypes.c_char_p
        self.library.simt_rms_norm_backward_workspace.restype = ctypes.c_int64
        self.library.simt_add_rms_norm_backward_workspace.restype = ctypes.c_int64
        self.library.simt_set_schedule.argtypes = [ctypes.c_int, ctypes.c_uint64]
        self.set_schedule("forward")
        self.set_card()

    def set_schedule(self, name: str, seed: int = 1) -> None:
        """In which order threads run between barriers."""
        self.library.simt_set_schedule(SCHEDULES.index(name), seed)

    def set_card(
        self, multiprocessors: int = 3, *, clusters: bool = True, shared_memory_kib: int = 227
    ) -> None:
        """What the pretended card has; shared memory: the most for a block, 99 to 227 KiB."""
        self.library.simt_set_card(multiprocessors, int(clusters), 1024 * shared_memory_kib)

    @property
    def launches(self) -> int:
        """Kernels launched so far."""
        return self.library.simt_launches()

    def forward(
        self,
        input: Tensor,
        scale: Tensor,
        eps: float = 1e-5,
        *,
        output: Tensor | None = None,
        residual: Tensor | None = None,
        new_residual: Tensor | None = None,
    ) -> Call:
        """Runs the forward kernels, of the residual add where there is a residual; `output` and
        `new_residual` are tensors of the layouts that these get."""
        if output is None:
            output = torch.empty(input.shape, dtype=output_dtype(input, scale))
        x = Buffer(self, "input", input, filled=True)
        w = Buffer(self, "scale", scale, filled=True)
        y = Buffer(self, "output", output, filled=False)
        kind = Forward if residual is None else AddForward
        args = kind(describe(input, scale, eps), x.pointer, w.pointer, y.pointer)
        fill(args.input_strides, input)
        fill(args.output_strides, output)
        buffers = {"input": x, "scale": w, "output": y}
        if residual is None:
            self._check(self.library.simt_rms_norm_forward(ctypes.byref(args)))
            return Call(buffers)
        if new_residual is None:
            new_residual = torch.empty(input.shape, dtype=input.dtype)
        buffers["residual"] = Buffer(self, "residual", residual, filled=True)
        buffers["new_residual"] = Buffer(self, "new_residual", new_residual, filled=False)
        args.residual = buffers["residual"].pointer
        args.new_residual = buffers["new_residual"].pointer
        fill(args.residual_strides, residual)
        fill(args.new_residual_strides, new_residual)
        self._check(self.library.simt_add_rms_norm_forward(ctypes.byref(args)))
        return Call(buffers)

    def backward(
        self,
        grad_output: Tensor,
        input: Tensor,
        scale: Tensor,
        eps: float = 1e-5,
        *,
        grad_input: Tensor | None = None,
        output_mask: tuple[bool, bool] = (True, True),
        grad_new_residual: Tensor | None = None,
    ) -> Call:
        """Runs the backward kernels, of the residual add where there is a grad_new_residual;
        `grad_input` is a tensor of the layout that it gets."""
        if grad_input is None:
            grad_input = torch.empty(input.shape, dtype=input.dtype)
        dy = Buffer(self, "grad_output", grad_output, filled=True)
        x = Buffer(self, "input", input, filled=True)
        w = Buffer(self, "scale", scale, filled=True)
        dx = Buffer(self, "grad_input", grad_input, filled=False)
        dw = Buffer(self, "grad_scale", torch.empty_like(scale), filled=False)
        op = "rms_norm" if grad_new_residual is None else "add_rms_norm"
        kind = Backward if grad_new_residual is None else AddBackward
        args = kind(describe(input, scale, eps), dy.pointer, x.pointer, w.pointer)
        args.grad_input = dx.pointer if output_mask[0] else None
        args.grad_scale = dw.pointer if output_mask[1] else None
        fill(args.grad_output_strides, grad_output)
        fill(args.input_strides, input)
        fill(args.grad_input_strides, grad_input)
        buffers = {
            "grad_output": dy,
            "input": x,
            "scale": w,
            "grad_input": dx,
            "grad_scale": dw,
        }
        if grad_new_residual is not None:
            dh = Buffer(self, "grad_new_residual", grad_new_residual, filled=True)
            args.grad_new_residual = dh.pointer
            fill(args.grad_new_residual_strides, grad_new_residual)
            buffers["grad_new_residual"] = dh
        bytes_of = getattr(self.library, f"simt_{op}_backward_workspace")
        workspace = torch.empty(bytes_of(ctypes.byref(args)), dtype=torch.uint8)
        ws = Buffer(self, "workspace", workspace, filled=False)
        args.workspace = ws.pointer
        buffers["workspace"] = ws
        self._check(getattr(self.library, f"simt_{op}_backward")(ctypes.byref(args)))
        return Call(buffers)

    def _check(self, error: int) -> None:
        if error:
            text = self.library.simt_last_error().decode()
            raise SimtError(re.sub(r"pc (0x[0-9a-f]+)", self._line_of, text) or f"error {error}")

    def _line_of(self, match: re.Match[str]) -> str:
        found = subprocess.run(
            ["addr2line", "-e", str(self.path), match[1]], capture_output=True, text=True
        )
        return found.stdout.strip() or match[0]


@dataclass
class Call:
    """The buffers of a call that was made."""

    buffers: dict[str, Buffer]

    def __getitem__(self, name: str) -> Tensor:
        return self.buffers[name].tensor()

    def traffic(self, name: str) -> Traffic:
        """Bytes that moved to or from one of them."""
        return self.buffers[name].traffic()


def output_dtype(input: Tensor, scale: Tensor) -> torch.dtype:
    """As the dtype rule has it."""
    if scale.dtype in (input.dtype, torch.float32) or input.dtype == torch.float64:
        return input.dtype
    return torch.promote_types(input.dtype, scale.dtype)


def describe(input: Tensor, scale: Tensor, eps: float) -> Shape:
    """The shape of a call. The scale is (dim,), or spans one of the input's row dimensions."""
    rows = input.shape[:-1]
    shape = Shape(DTYPES.index(input.dtype), DTYPES.index(scale.dtype))
    shape.rows = rows.numel()
    shape.dim = input.shape[-1]
    shape.groups = scale.shape[:-1].numel()
    shape.inner = 1
    for d in range(2, scale.dim() + 1):
        if scale.shape[-d] != 1:
            break
        shape.inner *= input.shape[-d]
    if shape.groups == 1:
        shape.inner = 1
    shape.eps = eps
    shape.row_ndim = max(len(rows), 1)
    shape.row_sizes[0] = 1
    for d, size in enumerate(rows):
        shape.row_sizes[d] = size
    return shape


def fill(strides: ctypes.Array[ctypes.c_int64], tensor: Tensor) -> None:
    """The strides of the row dimensions."""
    for d, stride in enumerate(tensor.stride()[:-1]):
        strides[d] = stride


# ---- building ------------------------------------------------------------------------------------


@functools.cache
def build() -> Path:
    """The emulated kernels, compiled if they are not up to date."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of the workers of pytest-xdist, one builds
        options = ("SIMT=ON", "TESTS=OFF", "WERROR=ON")
        commands = (
            ["cmake", "-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja"],
            ["cmake", "--build", str(BUILD), "--target", "simt"],
        )
        commands[0].extend(f"-DCOREAI_TORCH_{option}" for option in options)
        for command in commands:
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
    return BUILD / "tests" / "simt" / "libsimt.so"


def build_changed(
    folder: Path, file: str, change: Callable[[str], str], entry_file: str = "rms_norm_bfloat16.cu"
) -> Path:
    """The kernels of bfloat16, without the residual add or with it, with a change in one file of
    csrc/cuda; the others as they are."""
    build()
    kernels = folder / "cuda"
    shutil.copytree(ROOT / "csrc" / "cuda", kernels)
    (kernels / file).write_text(change((kernels / file).read_text()))
    pairs = kernels / "rms_norm_dtype_impl.cuh"  # one pair of dtypes is enough, and compiles faster
    text, count = re.subn(
        r"(bool kIs(Add)?Pair =)[^;]*;", r"\1 kIsSame<Input, Scale>;", pairs.read_text()
    )
    assert count == 2
    pairs.write_text(text)
    source = ROOT / "csrc" / "cuda" / entry_file
    entry, objects = None, []
    for each in json.loads((BUILD / "compile_commands.json").read_text()):
        arguments = shlex.split(each["command"])
        output = arguments[arguments.index("-o") + 1]
        if Path(each["file"]) == source:
            entry = each
        elif output.startswith("tests/simt/"):
            objects.append(str(Path(each["directory"], output)))
    assert entry is not None
    changed = folder / "changed.o"
    command = entry["command"].replace(str(ROOT / "csrc" / "cuda"), str(kernels))
    arguments = shlex.split(command)
    arguments[arguments.index("-o") + 1] = str(changed)
    subprocess.run(arguments, cwd=entry["directory"], check=True, capture_output=True)
    library = folder / "libchanged.so"
    subprocess.run(
        [arguments[0], "-shared", "-o", str(library), str(changed), *objects], check=True
    )
    return library
