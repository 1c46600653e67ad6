"""An engine without torch for the pool's tests: it does what the prompt says.

Up to `limit` samples of one size share a step. `die` ends the process in the first step, `die-once FILE` only if FILE
does not exist yet, `lose` fails so that only a new process helps, `hang` never finishes a step, `raise`, `oom` and
`raise at STEP` fail, `crowd-oom` fails in company only, `slow` takes 50 ms a step; `gated FOLDER` adds a byte to
FOLDER/begun at each step and waits until FOLDER/allowed is as long. Pixels are the seed's last byte, or the source's
own. The fingerprint is SCRIPTED_FINGERPRINT.
"""

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipelines.engine.base import EngineConfig, EngineInfo, EngineStatistics, Pixels, Report, StartAgain, Thumbnail
from pipelines.errors import OutOfMemory
from pipelines.request import ImageRequest


class DeviceLost(Exception):
    """As CUDA's errors after which the process can use the device no more."""


@dataclass(eq=False)
class Sample:
    request: ImageRequest
    seed: int
    left: int


class ScriptedEngine:
    def __init__(self, limit: int = 1, device: str = "none") -> None:
        fingerprint = os.environ.get("SCRIPTED_FINGERPRINT", device[0] * 32)
        limited = os.environ.get("SCRIPTED_MAX_PIXELS")
        self.info = EngineInfo("scripted", device, "uint8", fingerprint, max_pixels=int(limited) if limited else None)
        self.limit = limit
        self.passes: list[list[int]] = []  # the seeds of each step that was taken

    def prepare(self, request: ImageRequest) -> list[Sample]:
        return [Sample(request, seed, request.steps) for seed in request.seeds]

    def step(self, samples: Sequence[Sample]) -> None:
        for sample in samples:
            match sample.request.prompt.split():
                case ["die"]:
                    os.kill(os.getpid(), signal.SIGKILL)
                case ["die-once", marker] if not Path(marker).exists():
                    Path(marker).touch()
                    os.kill(os.getpid(), signal.SIGKILL)
                case ["lose"]:
                    raise DeviceLost
                case ["hang"]:
                    time.sleep(3600)
                case ["raise"]:
                    raise RuntimeError("a bug")
                case ["raise", "at", step] if sample.left == sample.request.num_inference_steps - int(step):
                    raise RuntimeError("a bug")
                case ["crowd-oom"] if len(samples) > 1:
                    raise OutOfMemory
                case ["oom"]:
                    raise OutOfMemory
                case ["gated", folder]:
                    begun, allowed = Path(folder, "begun"), Path(folder, "allowed")
                    with begun.open("ab") as file:
                        file.write(b".")
                    while allowed.stat().st_size < begun.stat().st_size:
                        time.sleep(0.005)
                case ["slow"]:
                    time.sleep(0.05)
        self.passes.append([sample.seed for sample in samples])
        for sample in samples:
            sample.left -= 1

    def batch_limit(self, request: ImageRequest) -> int:
        return self.limit

    def select_batch(self, candidates: Sequence[Sample]) -> list[Sample]:
        return list(candidates[: self.limit])

    def steps_left(self, sample: Sample) -> int:
        return sample.left

    def preview(self, sample: Sample, side: int) -> Thumbnail:
        return Thumbnail(side, side, bytes([sample.seed % 256]) * (side * side * 3))

    def finish(self, sample: Sample) -> Pixels:
        if sample.request.source is not None:
            return Pixels(sample.request.source.pixels)
        return Pixels(bytes([sample.seed % 256]) * (sample.request.width * sample.request.height * 3))

    def statistics(self) -> EngineStatistics:
        return EngineStatistics({}, {})

    def failure(self, error: Exception) -> str | None:
        return None if isinstance(error, DeviceLost) else "GenerationFailed"


def load(config: EngineConfig, report: Report) -> ScriptedEngine:
    if config.model == "broken":
        raise FileNotFoundError("weights.safetensors is missing")
    if config.model == "breaking" and not (begun := Path(config.models_dir) / "begun").exists():
        begun.touch()
        raise StartAgain("an optimization broke the device")
    if config.model == "waiting":  # until somebody lets it
        folder = Path(config.models_dir)
        (folder / "begun").touch()
        while not (folder / "go").exists():
            time.sleep(0.01)
    if config.model == "dying" and (Path(config.models_dir) / "die").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    if config.device == "broken":
        raise RuntimeError("no such device")
    report("reading", 0.5)
    if config.model == "gated":
        while not Path(config.models_dir, "loaded").exists():
            time.sleep(0.005)
    engine = ScriptedEngine(device=config.device)
    if config.model == "placed":  # `auto` means what the file says; the name of the card is in the other one
        device = config.device if config.device != "auto" else Path(config.models_dir, "auto").read_text()
        name = f"{device}, {Path(config.models_dir, 'card').read_text()}"
        engine.info = replace(engine.info, device=name, device_type=device)
    return engine
