"""The machine's NVIDIA cards and who holds their memory, as the driver's own library (NVML) tells. No torch."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

DRIVERS = {13: 580, 12: 525}  # the oldest driver for each major version of CUDA, by NVIDIA's compatibility guide
CAPABILITY = (8, 0)  # the oldest with bfloat16 in hardware; below it attention is computed without a fused kernel


class Card(NamedTuple):
    """A GPU. Memory in bytes. `cuda` is the newest version of CUDA that the driver runs: 12040 is 12.4.

    `capability` is the compute capability, major and minor.
    """

    name: str
    total: int
    free: int
    driver: str = ""
    cuda: int = 0
    capability: tuple[int, int] = CAPABILITY


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
        driver, cuda = nvml.nvmlSystemGetDriverVersion(), nvml.nvmlSystemGetCudaDriverVersion()
        return [read_card(nvml, handle, driver, cuda) for handle in iterate_handles(nvml)]


def read_card(nvml: Any, handle: Any, driver: str, cuda: int) -> Card:
    memory, capability = nvml.nvmlDeviceGetMemoryInfo(handle), nvml.nvmlDeviceGetCudaComputeCapability(handle)
    return Card(nvml.nvmlDeviceGetName(handle), memory.total, memory.free, driver, cuda, tuple(capability))


def explain_too_old(name: str, capability: tuple[int, int]) -> str | None:
    """Why a card of this compute capability is refused; None if it is new enough."""
    if capability >= CAPABILITY:
        return None
    own, oldest = (".".join(map(str, version)) for version in (capability, CAPABILITY))
    return f"{name} has compute capability {own}, and {oldest} or newer is needed: use another card, or --devices cpu"


def explain_unusable(card: Card, built: str | None, torch_version: str) -> str | None:
    """Why this torch cannot use the card; None if nothing is known against it.

    `built` is the version of CUDA that torch is built for (`torch.version.cuda`). A driver runs every minor version of
    the major version of CUDA that it knows.
    """
    if built is None:
        return f"this torch is built for CPUs (torch {torch_version})"
    major = int(built.partition(".")[0])
    if card.cuda // 1000 >= major:
        return None
    needed = f"driver {DRIVERS[major]} or newer" if major in DRIVERS else "a newer driver"
    return (
        f"driver {card.driver} runs CUDA up to {card.cuda // 1000}.{card.cuda % 1000 // 10}, but torch {torch_version} "
        f"is built for CUDA {built}: install {needed}, or a torch that is built for CUDA {card.cuda // 1000}"
    )


def read_driver_version() -> str | None:
    """The NVIDIA driver's version; None where none answers."""
    try:
        with open_driver() as nvml:
            return str(nvml.nvmlSystemGetDriverVersion())
    except DriverUnavailable:
        return None


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
