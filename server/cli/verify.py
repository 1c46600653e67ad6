"""`srpo verify`: reads back what an image file says about where it comes from."""

import argparse
import io
import sys
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from server.cli.parsing import told
from server.images.metadata import Marks, read_marks
from server.images.signing import Signature, read_signature


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="srpo verify",
        description="Read image files' marks and signatures. Metadata is easily removed: a file without may still come "
        "from a model.",
        epilog="Exit code: 0 if every file says that a model made it, and no signature is broken; else 1; 2 if a file "
        "cannot be read.",
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--trust", type=Path, metavar="PEM", help="certificates of signers to trust; others then fail")
    options = parser.parse_args(arguments)
    if options.trust and b"-----BEGIN CERTIFICATE-----" not in read(options.trust, parser):
        parser.error(f"--trust: {options.trust} holds no certificate in PEM")
    return max(verify(file, options.trust) for file in options.files)


def read(file: Path, parser: argparse.ArgumentParser) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        parser.error(f"--trust: {told(error)}")


def verify(file: Path, trust: Path | None) -> int:
    """Print one file's marks; returns its exit code."""
    try:
        data = file.read_bytes()
        with Image.open(io.BytesIO(data)) as picture:
            signature = read_signature(data, Image.MIME[picture.format or ""], trust)
            if signature is None or signature.state != "Invalid":
                picture.load()
            marks = read_marks(picture)
    except UnidentifiedImageError:
        print(f"srpo verify: {file}: not an image that can be read", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"srpo verify: {file}: {error.strerror or error}", file=sys.stderr)
        return 2
    except (ValueError, SyntaxError, KeyError, Image.DecompressionBombError) as error:
        print(f"srpo verify: {file}: {error}", file=sys.stderr)
        return 2
    print(f"{file}\n{report(marks, signature)}")
    good = ("Trusted",) if trust else ("Trusted", "Valid")
    believed = signature.state in good if signature else trust is None
    return 0 if marks.says_ai and believed else 1


def report(marks: Marks, signature: Signature | None) -> str:
    if marks.says_ai:
        source = "made by a generative model (IPTC DigitalSourceType trainedAlgorithmicMedia)"
    else:
        source = f"not marked as made by a model (IPTC DigitalSourceType: {marks.source_type or 'none'})"
    lines = ["source: " + source, "signature: " + describe(signature)]
    for number, line in enumerate((marks.parameters or "none").splitlines()):
        lines.append(("parameters: " if number == 0 else " " * 12) + line)
    return "\n".join("  " + printable(line) for line in lines)


def describe(signature: Signature | None) -> str:
    if signature is None:
        return "none (C2PA)"
    meaning = {
        "Invalid": "broken: the file is not what was signed",
        "Valid": f"unbroken, by {signature.issuer}, who is not known here (--trust)",
        "Trusted": f"unbroken, by {signature.issuer}, who is trusted",
    }
    return f"{meaning[signature.state]} (C2PA)"


def printable(text: str) -> str:
    """A stranger's file must not steer the terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
