"""The stages, in the order of what one wants to know first: what each does, and how long it may take."""

from collections.abc import Mapping
from typing import NamedTuple


class Stage(NamedTuple):
    """`function` is `module:function`, from a `Setup` to figures by name. `minutes` are those of an H100."""

    description: str
    minutes: float
    function: str


HERE = "bench.gpu"
STAGES: Mapping[str, Stage] = {
    "card": Stage("driver and versions, ceilings, the kernel of native attention", 1, f"{HERE}.card:measure"),
    "tiny": Stage("`tiny` checks itself; its compile cache is wiped; the same bytes?", 3, f"{HERE}.repeat:start_twice"),
    "bf16": Stage("bfloat16: each stage, whole requests, a profile, who waits", 5, f"{HERE}.speed:measure_default"),
    "fp8": Stage("float8: the same", 3, f"{HERE}.speed:measure_fp8"),
    "variants": Stage("a computed step with one choice changed at a time", 3.4, f"{HERE}.variants:measure"),
    "sizes": Stage("twelve new sizes after the warm-up: what runs eagerly, first calls", 2, f"{HERE}.sizes:measure"),
    "pixels": Stage("the same pixels in two processes; exact batches", 3, f"{HERE}.repeat:draw_twice"),
    "memory": Stage("peaks at 1536x1536 and with 16 jobs; out of memory on purpose", 2, f"{HERE}.memory:measure"),
    "server": Stage(
        "loading, the real server's timings, a cancellation, a killed worker", 2.5, f"{HERE}.served:measure"
    ),
}
