"""How many seconds each part of a request takes on a device: measured, or a goal."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import log
from pathlib import Path
from typing import NamedTuple

from pipelines.acceleration import PRESETS
from pipelines.request import SKIPPED_STEP, GenerationParams, ImageRequest

PROMPT = "a red apple on a wooden table, morning light"
KIND = re.compile(r"(\w+):(\d+)x(\d+):(\d+)(?:=([\d.]+))?(?:@([\d.]+))?")
# Goals for one card, not results: none has been measured.
GOALS = "high:1440x512:28=2@0.747,high:1024x1024:28=1@1.0,regular:1440x512:28=1@0.95"
FORM = "PRESET:WIDTHxHEIGHT:STEPS[=SHARE][@SECONDS]"


class Stages(NamedTuple):
    """Seconds of an image's stages at one size; a computed step, and a skipped one."""

    text: float
    step: float
    skipped_step: float
    decode: float

    def scale(self, factor: float) -> "Stages":
        return Stages(self.text, self.step * factor, self.skipped_step * factor, self.decode * factor)


# Of what a card is expected to take for an image, the parts that are no step: bench/LOG.md, 2026-11-24. An estimate.
ESTIMATE = Stages(text=0.02, step=0.0675, skipped_step=0.0015, decode=0.025)


@dataclass(frozen=True)
class Plan:
    """Seconds on a device for each image of a request, in order; `text` is once for all of them."""

    text: float
    steps: tuple[float, ...]
    decode: float

    @property
    def seconds(self) -> float:
        """Of a request for one image."""
        return self.text + sum(self.steps) + self.decode

    def scale_to(self, seconds: float) -> "Plan":
        factor = seconds / self.seconds
        return Plan(self.text * factor, tuple(step * factor for step in self.steps), self.decode * factor)


@dataclass(frozen=True)
class Kind:
    """One kind of request, its share of all, and its plan."""

    request: ImageRequest
    share: float
    plan: Plan

    @property
    def name(self) -> str:
        request = self.request
        return f"{request.acceleration} {request.width}x{request.height}, {request.steps} steps"

    @property
    def body(self) -> dict[str, object]:
        """The request as a client sends it."""
        request = self.request
        return {
            "model": "flux/srpo", "prompt": PROMPT, "acceleration": request.acceleration, "seed": request.seeds[0],
            "image_size": {"width": request.width, "height": request.height},
            "num_inference_steps": request.num_inference_steps,
        }  # fmt: skip

    def scaled(self, factor: float) -> "Kind":
        return replace(self, plan=self.plan.scale_to(self.plan.seconds * factor))


def make_plan(request: ImageRequest, stages: Stages) -> Plan:
    mask = PRESETS[request.acceleration](request.steps)
    steps = tuple(stages.step if compute else stages.skipped_step for compute in mask)
    return Plan(stages.text, steps, stages.decode)


def plan_from_timings(request: ImageRequest, timings: Mapping[str, float]) -> Plan:
    """The plan of a request that took these seconds, as a reply has them."""
    step = timings["denoise"] / (request.cost / (request.pixels / 2**20))
    return make_plan(request, Stages(timings["text"], step, SKIPPED_STEP * step, timings["decode"]))


def parse_mix(text: str, measured: Mapping[tuple[int, int], Stages]) -> Sequence[Kind]:
    """Kinds of requests, separated by commas, each `FORM`. Raises `ValueError`.

    One with SECONDS takes that long; another takes what was `measured` at its size, or at the nearest.
    """
    kinds = []
    for part in text.split(","):
        found = KIND.fullmatch(part.strip())
        if not found or found[1] not in PRESETS:
            raise ValueError(f"{part.strip()!r} is not {FORM}, with a preset of {', '.join(PRESETS)}")
        preset, width, height, steps, share, seconds = found.groups()
        body = {"image_size": {"width": int(width), "height": int(height)}, "num_inference_steps": int(steps)}
        try:
            params = GenerationParams.model_validate({"prompt": PROMPT, "acceleration": preset, "seed": 7, **body})
        except ValueError as error:
            raise ValueError(f"{part.strip()!r}: a size or number of steps that the API refuses") from error
        request = params.to_request("flux/srpo")
        if not seconds and not measured:
            raise ValueError(f"{part.strip()!r} says no seconds (@0.75), and no --times are given")
        plan = make_plan(request, find_stages(request, measured or {(1440, 512): ESTIMATE}))
        kinds.append(Kind(request, float(share or 1), plan.scale_to(float(seconds)) if seconds else plan))
    if not all(kind.share > 0 and kind.plan.seconds > 0 for kind in kinds):
        raise ValueError("shares and seconds are positive numbers")
    return kinds


def find_stages(request: ImageRequest, measured: Mapping[tuple[int, int], Stages]) -> Stages:
    """Those of the request's size, or of the nearest one, scaled by pixels."""
    width, height = min(measured, key=lambda size: abs(log(size[0] * size[1] / request.pixels)))
    return measured[width, height].scale(request.pixels / (width * height))


def read_times(file: Path) -> dict[tuple[int, int], Stages]:
    """What `srpo bench engine --json` has written of each size. Raises `ValueError` or `OSError`."""
    try:
        stages = json.loads(file.read_text())["stages"]
        return {
            (int(size.partition("x")[0]), int(size.partition("x")[2])): Stages(
                row["text"], row["step"], row["skipped_step"] or SKIPPED_STEP * row["step"], row["decode"]
            )
            for size, row in stages.items()
        }
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{file} is not what `srpo bench engine --json` writes") from error
