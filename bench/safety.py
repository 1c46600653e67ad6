"""Which of your harmless pictures a safety checker flags, and what it takes an image.

    srpo bench safety FOLDER ... [--checker embedded] [--json FILE]

Every picture below the folders that Pillow reads is scored as a finished image is. Choose the threshold by it: whatever
is flagged here would have been withheld wrongly. It says nothing about recall.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, UnidentifiedImageError
from rich.console import Console
from rich.table import Table

from pipelines.safety.checkers import load

SHOWN = 10  # of the highest scores
THRESHOLDS = (0.1, 0.2, 0.5, 0.8, 0.85)


def pictures(folders: list[Path]) -> Iterator[tuple[str, Image.Image]]:
    for folder in folders:
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            try:
                yield str(file.relative_to(folder)), Image.open(file).convert("RGB")
            except (UnidentifiedImageError, OSError, ValueError):
                continue  # not a picture


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "srpo bench safety", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--checker", default="embedded")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    try:
        checker = load(options.checker)
    except ValueError as error:
        parser.error(f"--checker: {error}")
    if checker is None:
        parser.error("--checker: none scores nothing")
    checker.self_test()
    scores, seconds = {}, []
    for name, picture in pictures(options.folders):
        start = time.perf_counter()
        scores[name] = checker.score(picture)
        seconds.append(time.perf_counter() - start)
    if not scores:
        parser.error("no pictures were found there")
    milliseconds = 1000 * statistics.median(seconds)
    highest = sorted(scores.items(), key=lambda item: -item[1])
    table = Table("picture", "score", title=f"{checker.name}: {len(scores)} pictures, {milliseconds:.1f} ms each")
    for name, score in highest[:SHOWN]:
        table.add_row(name, f"{score:.3f}")
    console = Console()
    console.print(table)
    flagged = {threshold: sum(score >= threshold for score in scores.values()) for threshold in THRESHOLDS}
    console.print("flagged at " + ", ".join(f"{threshold}: {count}" for threshold, count in flagged.items()))
    if options.json:
        options.json.write_text(json.dumps({"ms": milliseconds, "scores": dict(highest)}, indent=2) + "\n")
    return 0
