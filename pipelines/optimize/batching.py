"""Which numbers of samples may share a forward pass: those that were shown to change no bit on this device.

A matrix product of more rows may be computed in another order and then round differently (measured on CPUs: float32
does, bfloat16 does not). So nothing is assumed: for each size and number of samples, different samples take the first
steps of every preset together and one by one, and all their tensors must be equal bit for bit. Only numbers that pass
are batched. Batching pays for small images only (about 0.5 megapixels), so only a few sizes are tried. What is to be
compiled is tried before, so that nothing is compiled in vain, and once more after it, since compiled code rounds anew.
"""

from collections.abc import Sequence

import torch

from pipelines.acceleration import PRESETS
from pipelines.engine.base import Report
from pipelines.engine.failures import is_out_of_memory
from pipelines.engine.flux import FluxEngine
from pipelines.engine.sample import Sample
from pipelines.fields import Size
from pipelines.request import ImageRequest, make_probe

COUNTS = (2, 4)
STEPS = 28  # enough for the presets to differ
PROMPTS = ("a red apple", "", "two boats on a lake, seen from above", "7")


def find_exact_batches(
    engine: FluxEngine, size: Size, candidates: Sequence[int] = COUNTS, report: Report = lambda *_: None
) -> list[int]:
    """Those of the numbers of samples that may share a forward pass at a size. Each try is reported: 12B parameters
    take minutes for it on a CPU."""
    return [count for count in candidates if is_exact(engine, size, count, report)]


@torch.inference_mode()
def is_exact(engine: FluxEngine, size: Size, count: int, report: Report) -> bool:
    """Whether `count` samples of one size take steps together as each does alone. False if they do not fit."""
    for preset in PRESETS:
        report(f"trying batches: {count} of {size.width}x{size.height}, {preset}", 0.96)
        try:
            if not compare_steps(engine, size, count, preset):
                return False
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return False
    return True


def compare_steps(engine: FluxEngine, size: Size, count: int, preset: str) -> bool:
    """Whether the steps up to and including the first skipped one are equal, for different prompts and guidances."""
    alone, together = (
        [engine.prepare(make_request(size, number, preset))[0] for number in range(count)]
        for _ in ("alone", "together")
    )
    until = alone[0].computed.index(False) + 1 if not all(alone[0].computed) else 2
    for _ in range(until):
        for sample in alone:
            engine.step([sample])
        engine.step(together)
        if not all(have_same_bits(one, other) for one, other in zip(alone, together, strict=True)):
            return False
    return True


def make_request(size: Size, number: int, preset: str) -> ImageRequest:
    prompt = PROMPTS[number % len(PROMPTS)]
    return make_probe(size, STEPS, preset, prompt=prompt, guidance_scale=1.0 + 2.5 * number, seed=number + 1)


def have_same_bits(one: Sample, other: Sample) -> bool:
    """Whether everything that the steps have made is equal; NaN equals nothing."""
    return all(torch.equal(left, right) for left, right in zip(one.tensors(), other.tensors(), strict=True))
