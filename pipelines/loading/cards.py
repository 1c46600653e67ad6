"""The machine's NVIDIA cards and who holds their memory, as the driver's own library (NVML) tells. No torch."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple


class Card(NamedTuple):
    """A GPU. Memory in bytes."""

    name: str
    total: int
    free: int
    driver: str = ""


class Holder(NamedTuple):
    """A process that holds memory of a GPU, in bytes; 0 where the driver does not know how much."""

    pid: str
    name: str
    held: int


class DriverUnavailable(Exception):
    """No NVIDIA driver answers; the message is NVML's."""


@contextmanager
def open_driver() -> Iterator[Any]:
    """NVML, initialised. Raises `DriverUnavailable`, also for what fails inside."""
    import pynvml  # only those who ask for cards pay for it

    try:
        pynvml.nvmlInit()
        try:
            yield pynvml
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        raise DriverUnavailable(str(error)) from error


def list_cards() -> list[Card]:
    """All cards of the machine. Raises `DriverUnavailable`."""
    with open_driver() as nvml:
        driver = nvml.nvmlSystemGetDriverVersion()
        memory = [(handle, nvml.nvmlDeviceGetMemoryInfo(handle)) for handle in iterate_handles(nvml)]
        return [Card(nvml.nvmlDeviceGetName(handle), info.total, info.free, driver) for handle, info in memory]


def list_holders() -> list[Holder]:
    """The processes that hold memory of any card, the largest first; none where no driver answers."""
    try:
        with open_driver() as nvml:
            found = [
                Holder(str(process.pid), find_process_name(nvml, process.pid), process.usedGpuMemory or 0)
                for handle in iterate_handles(nvml)
                for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle)
            ]
    except DriverUnavailable:
        return []
    return sorted(found, key=lambda holder: -holder.held)


def iterate_handles(nvml: Any) -> Iterator[Any]:
    return (nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount()))


def find_process_name(nvml: Any, pid: int) -> str:
    """A process of another container has none here."""
    try:
        return str(nvml.nvmlSystemGetProcessName(pid))
    except nvml.NVMLError:
        return "unknown"
