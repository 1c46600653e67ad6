"""Which of your harmless pictures a safety checker flags, and how long it takes for each image.

    srpo bench safety FOLDER ... [--checker embedded] [--json FILE]

Every picture in the folders that Pillow can read is scored as a finished image would be. Choose the threshold by these
scores: a harmless picture that is flagged here would be withheld. They say nothing about recall.
"""

import statistics
import time
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from bench.support.report import make_parser, print_table, write_json
from pipelines.safety.checkers import load_checker

SHOWN = 10  # of the highest scores
THRESHOLDS = (0.1, 0.2, 0.5, 0.8, 0.85)


def read_pictures(folders: list[Path]) -> Iterator[tuple[str, Image.Image]]:
    for folder in folders:
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            try:
                yield str(file.relative_to(folder)), Image.open(file).convert("RGB")
            except (UnidentifiedImageError, OSError, ValueError):
                continue  # not a picture


def main(arguments: list[str]) -> int:
    parser = make_parser("safety", __doc__)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--checker", default="embedded")
    options = parser.parse_args(arguments)
    try:
        checker = load_checker(options.checker)
    except ValueError as error:
        parser.error(f"--checker: {error}")
    if checker is None:
        parser.error("--checker: none scores nothing")
    checker.self_test()
    scores, seconds = {}, []
    for name, picture in read_pictures(options.folders):
        start = time.perf_counter()
        scores[name] = checker.score(picture)
        seconds.append(time.perf_counter() - start)
    if not scores:
        parser.error("no pictures were found there")
    milliseconds = 1000 * statistics.median(seconds)
    highest = sorted(scores.items(), key=lambda item: -item[1])
    title = f"{checker.name}: {len(scores)} pictures, {milliseconds:.1f} ms each"
    print_table(title, ("picture", "score"), [(name, f"{score:.3f}") for name, score in highest[:SHOWN]])
    flagged = {threshold: sum(score >= threshold for score in scores.values()) for threshold in THRESHOLDS}
    print("flagged at " + ", ".join(f"{threshold}: {count}" for threshold, count in flagged.items()))
    write_json({"ms": milliseconds, "scores": dict(highest)}, options.json)
    return 0
