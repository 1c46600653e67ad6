"""What the host queues on the device without waiting for it, and how far it runs ahead.

CUDA carries out what the host has queued, about a thousand kernels at most; a compiled step has nearly as many. Where
the device is the CPU itself nothing is queued, and all of this does nothing.
"""

import torch


def copy_to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on the device. The host does not wait for the copy, as it would for one from pageable memory."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def read_memory(device: torch.device) -> dict[str, int]:
    """Bytes as torch's allocator counts them, without waiting for the device; nothing on a CPU."""
    if device.type != "cuda":
        return {}
    return {
        "allocated": torch.cuda.memory_allocated(device),
        "reserved": torch.cuda.memory_reserved(device),
        "peak": torch.cuda.max_memory_allocated(device),
    }


class Pacer:
    """Lets the host queue one step while the device carries out the one before, and no more.

    So a cancelled job ends within one step, the time of a step is that of the device, and the device is never idle.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._newest: torch.cuda.Event | None = None

    def after_step(self) -> None:
        """Wait for the step before the one that was just queued."""
        if self._device.type != "cpu":
            before, self._newest = self._newest, self._record()
            if before is not None:
                before.synchronize()

    def drain(self) -> None:
        """Wait for everything that was queued: what follows is another stage."""
        if self._device.type != "cpu":
            self._newest = None
            self._record().synchronize()

    def _record(self) -> torch.cuda.Event:
        # Its wait leaves the core to others; that of `torch.Event` does not.
        event: torch.cuda.Event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event
