"""The errors between a validated request and its pixels.

    PipelineError
    ├── ImageTooLarge        this device has no memory for images of that size; refused before any work
    ├── QueueFull            refused before any work; says when to come back
    ├── NotReady             the model is loading, restarting or has failed to load; says how far it is
    ├── WorkersSuspended     workers have died again and again; one is tried only now and then
    ├── WorkersBusy          workers cannot sleep while there are jobs
    ├── CannotSleep          engines that are not this server's own do not sleep
    ├── Draining             the server is going down and takes no new work
    ├── DeadlineExceeded     the request's time is over
    ├── Cancelled            the caller went away or asked to stop
    ├── SafetyUnavailable    the checker is missing or failed: nothing is shown unchecked
    ├── PromptRefused        the operator's list or moderation service does not allow this prompt
    ├── ContentWithheld      every image was flagged, and the operator wants an error then
    └── GenerationFailed     the engine could not draw this request
        ├── OutOfMemory      it does not fit the device
        ├── NonFinitePixels  the numbers blew up; never shown as a black picture
        ├── ConstantImage    an image all of one colour, where the operator wants none
        └── WorkerCrashed    it took its worker down twice

Messages are for the client that sent the request: they hold nothing internal and no prompt.
"""

from math import ceil

from pipelines.fields import Size


class PipelineError(Exception):
    """Base of all errors of this package."""


class ImageTooLarge(PipelineError):
    def __init__(self, width: int, height: int, max_pixels: int) -> None:
        square = Size.largest_square(max_pixels)
        super().__init__(
            f"{width}x{height} does not fit this server's device: it has memory for images of up to {max_pixels} "
            f"pixels, such as {square.width}x{square.height}. Ask for a smaller size."
        )


class QueueFull(PipelineError):
    def __init__(self, waiting: int, running: int, retry_after: float) -> None:
        self.waiting = waiting
        self.retry_after = max(1.0, retry_after)
        super().__init__(
            f"The queue is full: {waiting} requests are waiting and {running} are running. "
            f"Try again in {ceil(self.retry_after)} s."
        )


class NotReady(PipelineError):
    def __init__(self, stage: str, progress: float, eta: float) -> None:
        super().__init__(f"The model is not ready yet: {stage}, {progress:.0%} done. Try again in {eta:.0f} s.")
        self.stage = stage
        self.progress = progress
        self.retry_after = eta


class WorkersSuspended(PipelineError):
    def __init__(self, eta: float) -> None:
        super().__init__(f"The model's workers have failed again and again. The next try is in {eta:.0f} s.")
        self.retry_after = eta


class WorkersBusy(PipelineError):
    def __init__(self) -> None:
        super().__init__("There are unfinished requests. Try again when they have ended.")


class CannotSleep(PipelineError):
    def __init__(self) -> None:
        super().__init__("The engines of a cluster do not sleep. Stop the cluster to free their devices.")


class Draining(PipelineError):
    def __init__(self) -> None:
        super().__init__("The server is shutting down and takes no new requests.")
        self.retry_after = 5.0


class DeadlineExceeded(PipelineError):
    def __init__(self, seconds: float) -> None:
        super().__init__(f"The request did not finish within {seconds:.0f} s and was stopped.")


class Cancelled(PipelineError):
    def __init__(self) -> None:
        super().__init__("The request was cancelled.")


class SafetyUnavailable(PipelineError):
    def __init__(self, cause: str) -> None:
        super().__init__("The safety checker is not available, so no image can be shown.")
        self.cause = cause
        self.retry_after = 5.0


class PromptRefused(PipelineError):
    def __init__(self, reason: str) -> None:
        super().__init__("The operator of this server does not allow this prompt.")
        self.reason = reason


class ContentWithheld(PipelineError):
    def __init__(self) -> None:
        super().__init__("The safety checker flagged every image of this request.")


class GenerationFailed(PipelineError):
    def __init__(self, message: str = "The image could not be generated. The server's log has the cause.") -> None:
        super().__init__(message)


class OutOfMemory(GenerationFailed):
    def __init__(self) -> None:
        super().__init__("The request does not fit the device's memory. Ask for a smaller size or fewer images.")


class NonFinitePixels(GenerationFailed):
    def __init__(self) -> None:
        super().__init__("The model produced non-finite numbers for this request. Another seed may work.")


class ConstantImage(GenerationFailed):
    def __init__(self) -> None:
        super().__init__("The model drew an image all of one colour. Another seed or prompt may work.")


class WorkerCrashed(GenerationFailed):
    def __init__(self) -> None:
        super().__init__("The request took its worker process down twice and was given up.")


FAILURES = {error.__name__: error for error in (GenerationFailed, OutOfMemory, NonFinitePixels, WorkerCrashed)}
