"""A driver without a card: in the place of `pynvml`."""

from types import ModuleType, SimpleNamespace

import pynvml


class FakeNvml(ModuleType):
    """In the place of `pynvml`, on a machine with a driver: `cards` and, on the first of them, `processes`."""

    NVMLError = pynvml.NVMLError

    def __init__(self, cards: list[tuple[str, int, int]], processes: list[tuple[int, int | None]]) -> None:
        super().__init__("pynvml")
        self.capability = [9, 0]
        self.cards, self.processes, self.open = cards, processes, False

    def nvmlInit(self) -> None:  # noqa: N802 - NVML's own names
        self.open = True

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.open = False

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802
        return "570.1"

    def nvmlSystemGetCudaDriverVersion(self) -> int:  # noqa: N802
        return 12080

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetName(self, handle: int) -> str:  # noqa: N802
        return self.cards[handle][0]

    def nvmlDeviceGetCudaComputeCapability(self, handle: int) -> list[int]:  # noqa: N802
        return self.capability

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(total=self.cards[handle][1], free=self.cards[handle][2])

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[SimpleNamespace]:  # noqa: N802
        found = [] if handle else self.processes
        return [SimpleNamespace(pid=pid, usedGpuMemory=held) for pid, held in found]

    def nvmlSystemGetProcessName(self, pid: int) -> str:  # noqa: N802
        if pid == 18:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return "python"
