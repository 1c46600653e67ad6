"""An event sink that records what a worker sends."""

from typing import Any


class Told:
    """An outlet that keeps what it is sent: the steps, the pictures and the ends of each job."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, int, int]] = []
        self.pictures: dict[tuple[str, int], bytes] = {}
        self.ends: dict[str, str] = {}
        self.remaining_fractions: dict[str, list[float]] = {}
        self.timings: dict[str, dict[str, float]] = {}

    def send(self, event: str, payload: bytes = b"", **header: Any) -> None:
        job = header["job"]
        assert job not in self.ends, "a job that has ended is not heard of again"
        match event:
            case "step":
                self.remaining_fractions.setdefault(job, []).append(header["remaining_fraction"])
                if header["stage"] == "denoise":
                    self.steps.append((job, header["image"], header["step"]))
            case "image":
                self.pictures[job, header["image"]] = payload
            case "done":
                self.ends[job] = "done"
                self.timings[job] = header["timings"]
            case "failed":
                self.ends[job] = header["error"]
