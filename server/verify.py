"""`srpo verify`: reads back what an image file says about where it comes from."""

import sys
from pathlib import Path

from PIL import Image

from server.provenance import Marks, read_marks

USAGE = """usage: srpo verify [-h] FILE ...

Reads each file's marks. Exit code: 0 if every file says that a model made it, 1 if one does not, 2 if one cannot be
read. Metadata is easily removed: a file without marks may still come from a model."""


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    return max(verify(Path(name)) for name in arguments)


def verify(file: Path) -> int:
    """Print one file's marks; returns its exit code."""
    try:
        with Image.open(file) as picture:
            picture.load()
            marks = read_marks(picture)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        print(f"srpo verify: {file}: {error}", file=sys.stderr)
        return 2
    print(f"{file}\n{report(marks)}")
    return 0 if marks.says_ai else 1


def report(marks: Marks) -> str:
    if marks.says_ai:
        source = "made by a generative model (IPTC DigitalSourceType trainedAlgorithmicMedia)"
    else:
        source = f"not marked as made by a model (IPTC DigitalSourceType: {marks.source_type or 'none'})"
    lines = ["source: " + source]
    for number, line in enumerate((marks.parameters or "none").splitlines()):
        lines.append(("parameters: " if number == 0 else " " * 12) + line)
    return "\n".join("  " + printable(line) for line in lines)


def printable(text: str) -> str:
    """A stranger's file must not steer the terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
