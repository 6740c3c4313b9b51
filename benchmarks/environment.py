"""Where and with what the figures were taken."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from coreai_torch import _C
from coreai_torch.backends import cpu

# With these, glibc keeps freed memory in the process. Without, each large output is mapped afresh
# and the page faults cost as much as the kernel.
WARM_TUNABLES = "glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=8589934592"

# What changes the figures, from the environment.
VARIABLES = (
    *("LD_PRELOAD", "MALLOC_CONF", "THP_MEM_ALLOC_ENABLE"),
    *("OMP_NUM_THREADS", "OMP_PROC_BIND", "KMP_BLOCKTIME", "GOMP_CPU_AFFINITY"),
    *("ATEN_CPU_CAPABILITY", "COREAI_TORCH_CPU_LEVEL"),
)
LIBRARIES = ("coreai-torch", "liger-kernel", "quack-kernels", "apex", "transformer-engine")
LIBRARIES += ("flashinfer-python", "triton")


def read_or(path: str | Path, default: str = "") -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return default


def processor() -> str:
    match = re.search(r"^model name\s*: (.*)$", read_or("/proc/cpuinfo"), re.MULTILINE)
    return match[1].strip() if match else platform.processor()


def memory_gib() -> float | None:
    match = re.search(r"^MemTotal: *(\d+) kB$", read_or("/proc/meminfo"), re.MULTILINE)
    return round(int(match[1]) / 2**20, 1) if match else None


def git(*arguments: str) -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None


def commit() -> dict[str, Any]:
    """What was measured, and was it changed since? Earlier results don't count."""
    head = git("rev-parse", "HEAD")
    but_results = (":(top)", ":(top,exclude)benchmarks/results")
    changes = git("status", "--porcelain", "--untracked-files=no", "--", *but_results)
    return {"commit": head.strip() if head else None, "dirty": bool(changes)}


def installed(names: tuple[str, ...]) -> dict[str, str]:
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def cache_folders() -> list[Path]:
    return sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"))


def largest_cache() -> int:
    """Its size in bytes; 64 MiB where the system does not tell."""
    sizes = [re.fullmatch(r"(\d+)K", read_or(folder / "size")) for folder in cache_folders()]
    return max((int(size[1]) * 1024 for size in sizes if size), default=64 * 2**20)


def environment(device: str = "cpu") -> dict[str, Any]:
    caches = [
        f"L{read_or(index / 'level')} {read_or(index / 'type')} {read_or(index / 'size')}"
        for index in cache_folders()
    ]
    record: dict[str, Any] = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "caches": caches,
        "memory_gib": memory_gib(),
        "huge_pages": read_or("/sys/kernel/mm/transparent_hugepage/enabled"),
        "system": platform.platform(),
        "kernel_level": cpu.get_level(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "libraries": installed(LIBRARIES),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        **commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    return record | card() if device == "cuda" else record


def card() -> dict[str, Any]:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    found = subprocess.run(query, capture_output=True, text=True)
    properties = torch.cuda.get_device_properties(0)
    return {
        "card": torch.cuda.get_device_name(),
        "multiprocessors": properties.multi_processor_count,
        "l2_mib": properties.L2_cache_size / 2**20,
        "driver": found.stdout.strip(),
        "cuda": torch.version.cuda,
        "cuda_build": dict(_C.build_info()),
    }


def allocator(mode: str) -> str:
    if mode == "cuda":
        return "PyTorch's caching allocator"
    if mode == "warm":
        return f"freed memory is kept by GLIBC_TUNABLES={WARM_TUNABLES}"
    return "as the user has it"


def enter_warm_mode() -> None:
    """Start this program anew with the tunables, which glibc reads once, unless they are set."""
    if platform.libc_ver()[0] != "glibc":
        sys.exit("The warm mode needs glibc; use --mode default.")
    present = os.environ.get("GLIBC_TUNABLES", "")
    if WARM_TUNABLES in present:
        return
    tunables = f"{present}:{WARM_TUNABLES}" if present else WARM_TUNABLES
    environ = os.environ | {"GLIBC_TUNABLES": tunables}
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environ)
