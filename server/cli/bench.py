"""`srpo bench`: the measurements of a checkout, one row each. The installed package does not carry them."""

import importlib
import sys
from collections.abc import Mapping

BENCHES: Mapping[str, str] = {
    "engine": "the engine beside FluxPipeline, at every size and preset, and under mixed load",
    "levers": "each lever of the engine alone and all together, at every size; goes on where it was stopped",
    "quality": "what the presets do to the pictures of a model, with a contact sheet",
    "safety": "which of your harmless pictures a safety checker flags, and its milliseconds",
    "page": "seconds from opening the playground to a first image, in Chromium",
    "previews": "what previews add to a request",
    "start": "seconds and peak memory of loading a model, beside the size of its files",
    "readers": "100 streams of which 60 hang or are left: the others' latency, and memory",
}


def main(arguments: list[str]) -> int:
    name, *rest = arguments or ["--help"]
    if name not in BENCHES:
        rows = "\n".join(f"  {key:<10} {text}" for key, text in BENCHES.items())
        usage = f"usage: srpo bench NAME [options]\n\nmeasurements:\n{rows}"
        if name in ("-h", "--help"):
            print(usage)
            return 0
        print(f"srpo bench: there is no measurement {name!r}\n\n{usage}", file=sys.stderr)
        return 2
    try:
        module = importlib.import_module(f"bench.{name}")
    except ModuleNotFoundError as error:
        if error.name != "bench":
            raise
        print("srpo bench: run it from a checkout of the project, where the bench folder is", file=sys.stderr)
        return 2
    code: int = module.main(rest)
    return code
