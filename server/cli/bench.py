"""`srpo bench`: measurements that need a checkout, one row of `BENCHES` each. They are not part of the wheel."""

from collections.abc import Mapping

from server.cli.terminal.failure import CommandFailed
from server.cli.terminal.parsing import Command, run

BENCHES: Mapping[str, Command] = {
    name: Command(text, f"bench.{name}:main")
    for name, text in {
        "engine": "the engine compared with FluxPipeline, at every size and preset, and under mixed load",
        "optimizations": "each optimization alone and all together, at every size; continues an interrupted run",
        "load": "what our part of a request costs, one by one and with many clients at once",
        "api": "requests a second that one API process carries, and CPU time by part, without an engine",
        "capacity": "latencies, refusals and costs with so many cards, simulated; or held against a real server",
        "quality": "what the presets do to the pictures of a model, with a contact sheet",
        "safety": "which of your harmless pictures a safety checker flags, and its milliseconds",
        "page": "seconds from opening the playground to a first image, in Chromium",
        "previews": "what previews add to a request",
        "start": "seconds and peak memory of loading a model",
        "host": "what Python does in a step of FLUX.1, without a GPU",
        "convert": "seconds and peak memory of inspecting and converting weights",
        "readers": "latency and memory of 100 streams, of which 60 hang or are left",
    }.items()
}


def main(arguments: list[str]) -> int:
    try:
        return run("srpo bench", BENCHES, arguments)
    except ModuleNotFoundError as error:
        if error.name != "bench":
            raise
        raise CommandFailed("run it from a checkout of the project, where the bench folder is") from error
