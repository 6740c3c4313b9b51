"""Hours of service in a minute: many threads at once, forks, reloads, the end of the process while
threads run, and memory that does not grow."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cases import with_gradients
from torch.utils.data import DataLoader, Dataset

from coreai_torch import ops
from coreai_torch.backends import cpu
from coreai_torch.composite_ops import RMSNorm

pytestmark = pytest.mark.slow

SECONDS = float(
    os.environ.get("COREAI_TORCH_SOAK_SECONDS", "10")
)  # for each of the tests with time
CALLS = 100_000
PAGES_OF = os.sysconf("SC_PAGE_SIZE")


def resident_bytes() -> int:
    """Memory of this process that is in use."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGES_OF


def in_a_new_process(code: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout, check=False
    )


PROBLEMS = [
    ((400, 96), (96,), torch.float32, torch.float32),
    ((2, 6, 50, 64), (6, 1, 64), torch.bfloat16, torch.float32),
    ((33, 4096), (4096,), torch.float16, torch.float16),
    ((1, 4096), (4096,), torch.float32, torch.bfloat16),
    ((3, 5, 17), (3, 5, 17), torch.float64, torch.float32),
    ((3, 1, 5, 17), (17,), torch.float32, torch.float64),  # in PyTorch operations
]


def test_many_threads() -> None:
    """Forward and backward in eight threads while others change the number of threads of PyTorch
    and the SIMD level: every result has the bits of the first."""
    problems = []
    for shape, scale, input_dtype, scale_dtype in PROBLEMS:
        x, g = torch.randn(shape).to(input_dtype), torch.randn(shape)
        w = torch.randn(scale).to(scale_dtype)
        problems.append((x, w, g, with_gradients(ops.rms_norm, x, w, g, 1e-5)))
    end = time.monotonic() + SECONDS
    failures: list[str] = []
    calls = [0] * 8

    def work(number: int) -> None:
        k = number
        while time.monotonic() < end and not failures:
            k += 1
            x, w, g, expected = problems[k % len(problems)]
            ours = with_gradients(ops.rms_norm, x, w, g, 1e-5)
            same = [torch.equal(a, b) for a, b in zip(ours, expected, strict=True)]
            if not all(same):
                failures.append(f"{x.shape}: output, grad_input, grad_scale equal: {same}")
            calls[number] += 1

    def disturb() -> None:
        k = 0
        while time.monotonic() < end and not failures:
            k += 1
            torch.set_num_threads(1 + k % 5)
            cpu.set_level(cpu.supported_levels()[k % len(cpu.supported_levels())])
            time.sleep(0.001)

    def guarded(function: Callable[..., None], *arguments: int) -> threading.Thread:
        def run() -> None:
            try:
                function(*arguments)
            except Exception as error:
                failures.append(repr(error))

        return threading.Thread(target=run)

    before = torch.get_num_threads()
    workers = [guarded(work, i) for i in range(len(calls))] + [guarded(disturb)]
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        torch.set_num_threads(before)
        cpu.set_level(None)
    assert not failures
    assert min(calls) > 0


def test_one_graph_shared_by_many_threads() -> None:
    """One module, its weight's gradient summed up by backward calls from eight threads."""
    norm, lock = RMSNorm(64, dtype=torch.float64), threading.Lock()
    inputs = [torch.randn(20, 64, dtype=torch.float64) for _ in range(8)]
    grads: list[torch.Tensor] = []

    def work(x: torch.Tensor) -> None:
        for _ in range(50):
            (grad,) = torch.autograd.grad(norm(x).sum(), norm.weight)
            with lock:
                grads.append(grad)

    workers = [threading.Thread(target=work, args=(x,)) for x in inputs]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    expected = [torch.autograd.grad(norm(x).sum(), norm.weight)[0] for x in inputs]
    assert len(grads) == 400
    torch.testing.assert_close(sum(grads), 50 * sum(expected))


class Normalized(Dataset):
    """Data that its workers normalize, with gradients."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> torch.Tensor:
        x = torch.full((600, 128), float(index + 1)).requires_grad_()
        y = RMSNorm(128, eps=0.0)(x)
        y.sum().backward()
        return y.detach() + x.grad


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_data_loader_workers(start: str) -> None:
    """Forked after the kernels ran on several threads here, too."""
    ops.rms_norm(torch.randn(4096, 1024), torch.ones(1024))
    loader = DataLoader(Normalized(), batch_size=3, num_workers=2, multiprocessing_context=start)
    for batch in loader:
        torch.testing.assert_close(batch, torch.ones(3, 600, 128))


def test_a_forked_child_runs_on_one_thread() -> None:
    """GNU OpenMP's threads do not survive a fork: a child has to do as DataLoader's workers do, for
    any of PyTorch's operations."""
    done = in_a_new_process(
        "import os, torch\n"
        "from coreai_torch import ops\n"
        "x, w = torch.randn(4096, 1024), torch.ones(1024)\n"
        "expected = ops.rms_norm(x, w)\n"
        "for _ in range(20):\n"
        "    pid = os.fork()\n"
        "    if pid == 0:\n"
        "        torch.set_num_threads(1)\n"
        "        os._exit(0 if torch.equal(ops.rms_norm(x, w), expected) else 1)\n"
        "    assert os.waitpid(pid, 0)[1] == 0\n"
    )
    assert done.returncode == 0, done.stderr


def test_imported_again() -> None:
    """A module that registers ops can be registered once; imports that come later find it."""
    done = in_a_new_process(
        "import importlib, sys, torch, coreai_torch\n"
        "from coreai_torch import ops\n"
        "x, w = torch.randn(3, 8), torch.ones(8)\n"
        "expected = ops.rms_norm(x, w)\n"
        "for _ in range(20):\n"
        "    importlib.reload(coreai_torch)\n"
        "    importlib.reload(coreai_torch.composite_ops)\n"
        "    importlib.reload(coreai_torch.reference)\n"
        "    assert torch.equal(coreai_torch.composite_ops.RMSNormImpl()(x, w), expected)\n"
        "del sys.modules['coreai_torch._C']\n"
        "import coreai_torch._C\n"
        "assert torch.equal(ops.rms_norm(x, w), expected)\n"
    )
    assert done.returncode == 0, done.stderr


def test_the_process_ends_while_threads_run() -> None:
    """No crash, no deadlock. (Daemon threads are another matter: Python 3.11 stops these in the
    middle of C++ code, and then PyTorch ends with an abort, whatever module they run.)"""
    code = (
        "import atexit, threading, time, torch\n"
        "from coreai_torch.composite_ops import RMSNorm\n"
        "end = time.monotonic() + 0.5\n"
        "norm = RMSNorm(256)\n"
        "def once():\n"
        "    norm(torch.randn(200, 256, requires_grad=True)).sum().backward()\n"
        "def work():\n"
        "    while time.monotonic() < end:\n"
        "        once()\n"
        "for _ in range(4):\n"
        "    threading.Thread(target=work).start()\n"
        "atexit.register(once)\n"
    )
    for _ in range(3):
        done = in_a_new_process(code)
        assert done.returncode == 0, (done.returncode, done.stderr)


def grown(call: Callable[[int], object], calls: int) -> int:
    """Bytes that a process has grown by over so many calls, once it is warm."""
    for k in range(calls // 10):
        call(k)
    gc.collect()
    before = resident_bytes()
    for k in range(calls):
        call(k)
    gc.collect()
    return resident_bytes() - before


def test_memory_does_not_grow() -> None:
    """Over 100,000 calls, of which a tenth are mistakes. A byte lost in each would not show, a
    tensor's bookkeeping would: 100,000 times 100 bytes are 10 MB."""
    norm, heads = RMSNorm(32), RMSNorm(32, n_heads=3)
    x, q = torch.randn(4, 32), torch.randn(2, 3, 5, 32)
    wrong = torch.ones(5)

    def call(k: int) -> None:
        kind = k % 10
        if kind == 0:
            with pytest.raises(RuntimeError):
                ops.rms_norm(x, wrong)
        elif kind < 4:
            norm(x)
        elif kind < 8:
            norm(x).sum().backward()
            norm.weight.grad = None
        else:
            heads(q.transpose(2, 3).contiguous().transpose(2, 3)).sum().backward()
            heads.weight.grad = None

    assert grown(call, CALLS) < 8 << 20


def test_memory_does_not_grow_with_the_shape() -> None:
    """Nothing is kept for each shape that was seen."""

    def call(k: int) -> None:
        dim = 1 + k % 5000
        x = torch.ones(2, dim, requires_grad=True)
        ops.rms_norm(x, torch.ones(dim)).sum().backward()

    assert grown(call, 20_000) < 8 << 20
