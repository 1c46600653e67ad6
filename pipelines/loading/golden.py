"""The golden self-check: before an engine is ready it draws two small fixed requests, one exact, one accelerated.

The digests of their pixels are stored under the engine's fingerprint. The same fingerprint promises the same bytes.
Pictures that differ from the stored ones mean a change that the fingerprint does not cover: a fault of the device or
its memory, a weight that changed after it was read, another kernel. Such an engine does not serve.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

from pipelines.engine.base import Engine
from pipelines.fields import Size
from pipelines.optimize.tuning_cache import TuningCache
from pipelines.request import ImageRequest, make_probe

SECTION = "golden"
PROMPT = "a red apple on a wooden table, morning light"
GOLDEN: Mapping[str, ImageRequest] = {
    "exact": make_probe(Size(256, 256), 4, "none", prompt=PROMPT),
    "accelerated": make_probe(Size(256, 256), 12, "high", prompt=PROMPT, seed=2),
}


class SelfCheckFailed(Exception):
    """The engine draws other pictures than it did before under the same fingerprint."""

    def __init__(self, fingerprint: str, cache: TuningCache, names: list[str]) -> None:
        super().__init__(
            f"the self-check's {' and '.join(names)} pictures differ from those kept in {cache.path} under the same "
            f"fingerprint {fingerprint}: the device, its memory or the software on it is not what it was. "
            "If you know why and accept the new pictures: srpo selfcheck --renew"
        )


def check_golden_images(engine: Engine[Any], cache: TuningCache) -> None:
    """Raises `SelfCheckFailed`. Under a new fingerprint the pictures are stored; there is nothing to compare."""
    digests = {name: digest_pixels(engine, request) for name, request in GOLDEN.items()}
    expected = cache.remember(SECTION, engine.info.fingerprint, lambda: digests)
    if differing := [name for name in GOLDEN if expected.get(name) != digests[name]]:
        raise SelfCheckFailed(engine.info.fingerprint, cache, differing)


def digest_pixels(engine: Engine[Any], request: ImageRequest) -> str:
    """SHA-256 of the request's pixels."""
    sha = hashlib.sha256()
    for sample in engine.prepare(request):
        while engine.steps_left(sample):
            engine.step([sample])
        sha.update(engine.finish(sample).data)
    return sha.hexdigest()
