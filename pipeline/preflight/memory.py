"""How much memory this process has, has used at most, and may still take."""

import contextlib
import os
from pathlib import Path

import psutil
import torch

__all__ = ["core_count", "free_bytes", "peak_bytes", "reset_peak"]

CGROUP = Path("/sys/fs/cgroup")
MEBI = 1 << 20


def reset_peak(device: torch.device) -> None:
    """Begin a new peak: of the accelerator's memory, and where Linux lets us of the process's."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> tuple[int, int | None]:
    """The most that the process had in memory since `reset_peak`, and the most that it had on an accelerator."""
    resident = psutil.Process().memory_info().rss
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/self/status").read_text().splitlines()
        resident = max(resident, 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]))
    return resident, torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None


def free_bytes(device: torch.device) -> int:
    """What may still be allocated: on the accelerator, else in the machine's memory and the container's."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError):
        limit = int((CGROUP / "memory.max").read_text())
        free = min(free, limit - int((CGROUP / "memory.current").read_text()))
    return int(max(free, MEBI))


def core_count() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))
