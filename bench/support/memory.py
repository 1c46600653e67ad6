"""The memory of processes and of CUDA devices, in bytes (Linux)."""

from pathlib import Path

import torch

MIB = 2**20
GIB = 2**30


def read_memory(name: str, pid: int | str = "self") -> int:
    """A line of /proc/PID/status: `VmRSS` (resident), `VmHWM` (its peak) or `RssAnon` (without mapped files)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


class PeakMemory:
    """The most memory held since this object was made: of a CUDA device, or else of this process."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak of the resident set

    def gib(self) -> float:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / GIB
        return read_memory("VmHWM") / GIB
