"""Batches over Ray for `make ray`: `python -m support.ray_batch memory LINES`, or `draw ARGUMENTS`.

`memory` draws so many lines with engines that answer at once, and prints the most memory that the driver had, in MiB.
`draw` is `srpo generate` with engines that do what the prompt says.
"""

import json
import resource
import sys
import tempfile
from pathlib import Path
from typing import Any

from server.batch.lines import Line, read_lines
from server.cli.generate.batch import add_parameter_flags
from server.cli.generate.offline import draw_file
from server.cli.terminal.parsing import parse
from server.cluster.session import TOKEN_FILE, secure_ray
from server.cluster.settings import EngineCount

FACTORY = "support.scripted_engine:load"


class InstantEngine:
    async def load(self) -> str:
        return "f" * 32

    async def draw(self, lines: tuple[Line, ...]) -> list[dict[str, Any]]:
        return [{"line": line.number, "seed": 1, "files": [f"{line.number:04d}.jpeg"], "new": True} for line in lines]


def draw_at_once(count: int) -> int:
    """How many lines were drawn."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "requests.jsonl")
        with file.open("w") as opened:
            for number in range(count):
                opened.write(json.dumps({"prompt": f"a red apple, number {number}, on a table " * 4}) + "\n")
        secure_ray(Path(folder, TOKEN_FILE))
        import ray

        from server.cluster.offline import draw_batch, running_ray

        with running_ray(EngineCount(engines=2, engine_gpus=0)):
            build = ray.remote(InstantEngine).options(num_cpus=0).remote
            return sum("new" in outcome for outcome in draw_batch(read_lines(file), 2, build))


def main(verb: str, *arguments: str) -> int:
    if verb == "draw":
        return draw_file(parse(add_parameter_flags(), "generate", [*arguments]), FACTORY)
    drawn = draw_at_once(int(arguments[0]))
    print(drawn, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2**10)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
