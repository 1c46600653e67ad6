"""An event sink that records what a worker sends."""

from pipelines.request import Timings
from pipelines.workers.protocol import ImageReady, JobDone, JobEvent, JobFailed, StepDone


class Told:
    """An outlet that keeps what it is sent: the steps, the pictures and the ends of each job."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, int, int]] = []
        self.pictures: dict[tuple[str, int], bytes] = {}
        self.ends: dict[str, str] = {}
        self.remaining_fractions: dict[str, list[float]] = {}
        self.timings: dict[str, Timings] = {}

    def send_event(self, event: JobEvent) -> None:
        assert event.job not in self.ends, "a job that has ended is not heard of again"
        match event:
            case StepDone():
                self.remaining_fractions.setdefault(event.job, []).append(event.remaining_fraction)
                if event.stage == "denoise":
                    self.steps.append((event.job, event.image, event.step))
            case ImageReady():
                self.pictures[event.job, event.image] = event.pixels
            case JobDone():
                self.ends[event.job] = "done"
                self.timings[event.job] = event.timings
            case JobFailed():
                self.ends[event.job] = event.error
