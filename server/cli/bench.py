"""`srpo bench`: the measurements of a checkout, one row each. The installed package does not carry them."""

import sys
from collections.abc import Mapping

from server.cli.parsing import Command, run

BENCHES: Mapping[str, Command] = {
    "engine": Command(
        "the engine beside FluxPipeline, at every size and preset, and under mixed load", "bench.engine:main"
    ),
    "levers": Command(
        "each lever of the engine alone and all together, at every size; goes on where it was stopped",
        "bench.levers:main",
    ),
    "quality": Command("what the presets do to the pictures of a model, with a contact sheet", "bench.quality:main"),
    "safety": Command(
        "which of your harmless pictures a safety checker flags, and its milliseconds", "bench.safety:main"
    ),
    "page": Command("seconds from opening the playground to a first image, in Chromium", "bench.page:main"),
    "previews": Command("what previews add to a request", "bench.previews:main"),
    "start": Command("seconds and peak memory of loading a model, beside the size of its files", "bench.start:main"),
    "readers": Command(
        "100 streams of which 60 hang or are left: the others' latency, and memory", "bench.readers:main"
    ),
}


def main(arguments: list[str]) -> int:
    try:
        return run("srpo bench", BENCHES, arguments)
    except ModuleNotFoundError as error:
        if error.name != "bench":
            raise
        print("srpo bench: run it from a checkout of the project, where the bench folder is", file=sys.stderr)
        return 2
