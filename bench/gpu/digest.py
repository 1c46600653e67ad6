"""A process that draws a few pictures and prints their SHA-256: `python -m bench.gpu.digest load|draw CONFIG`.

`load` starts an engine as a worker does, its self-check included; `draw` takes the bench's model of FLUX.1's shapes.
"""

import json
import sys
from pathlib import Path
from typing import Any

from bench.gpu.setup import Setup
from bench.support.comparison import make_request
from pipelines.engine.base import EngineConfig
from pipelines.loading.golden import GOLDEN, digest_pixels
from pipelines.optimize.context import OptimizationContext
from pipelines.optimize.tuning_cache import TuningCache


def load(config: dict[str, Any]) -> dict[str, Any]:
    engine = EngineConfig(**config).build(lambda *_: None)
    digests = {name: digest_pixels(engine, request) for name, request in GOLDEN.items()}
    return {"digests": digests, "fingerprint": engine.info.fingerprint, "optimizations": engine.info.optimizations}


def draw(config: dict[str, Any]) -> dict[str, Any]:
    setup = Setup(Path(config["folder"]), config["rehearse"])
    cache = TuningCache(Path(config["kept"]))
    context = OptimizationContext(remember=lambda section, measure: str(cache.remember(section, "pixels", measure)))
    engine = setup.compare(context=context).engine
    requests = {
        f"{preset} {width}x{height}": make_request(width, height, setup.steps, preset)
        for width, height in setup.sizes
        for preset in ("none", "high")
    }
    return {"digests": {name: digest_pixels(engine, request) for name, request in requests.items()}}


if __name__ == "__main__":
    print(json.dumps({"load": load, "draw": draw}[sys.argv[1]](json.loads(sys.argv[2]))))
