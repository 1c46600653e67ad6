"""`srpo verify`: reads what an image file says about its origin."""

import io
import sys
from pathlib import Path

from PIL import Image, UnidentifiedImageError
from pydantic import Field
from pydantic_settings import CliPositionalArg

from server.cli.terminal.parsing import Arguments, format_error, parse
from server.cli.terminal.text import escape
from server.images.metadata import Marks, read_marks
from server.images.signing import Signature, read_signature


class VerifySettings(Arguments):
    """Read image files' marks and signatures.

    Metadata is easily removed: a file without it may still come from a model.
    Exit code: 0 if every file says that a model made it, and no signature is broken;
    else 1; 2 if a file cannot be read.
    """

    files: CliPositionalArg[list[Path]] = Field(description="image files", min_length=1)
    trust: Path | None = Field(
        None, description="PEM file with the certificates of signers to trust; files of others then fail"
    )


def main(arguments: list[str]) -> int:
    settings = parse(VerifySettings, "verify", arguments)
    try:
        if settings.trust and b"-----BEGIN CERTIFICATE-----" not in settings.trust.read_bytes():
            print(f"srpo verify: --trust: {settings.trust} holds no certificate in PEM", file=sys.stderr)
            return 2
    except OSError as error:
        print(f"srpo verify: --trust: {format_error(error)}", file=sys.stderr)
        return 2
    return max(verify_file(file, settings.trust) for file in settings.files)


def verify_file(file: Path, trust: Path | None) -> int:
    """Print one file's marks. Returns its exit code."""
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
    print(f"{file}\n{format_marks(marks, signature)}")
    accepted = ("Trusted",) if trust else ("Trusted", "Valid")
    is_accepted = signature.state in accepted if signature else trust is None
    return 0 if marks.says_ai and is_accepted else 1


def format_marks(marks: Marks, signature: Signature | None) -> str:
    if marks.says_ai:
        source = "made by a generative model (IPTC DigitalSourceType trainedAlgorithmicMedia)"
    else:
        source = f"not marked as made by a model (IPTC DigitalSourceType: {marks.source_type or 'none'})"
    lines = ["source: " + source, "signature: " + format_signature(signature)]
    for number, line in enumerate((marks.parameters or "none").splitlines()):
        lines.append(("parameters: " if number == 0 else " " * 12) + line)
    return "\n".join("  " + escape(line) for line in lines)


def format_signature(signature: Signature | None) -> str:
    if signature is None:
        return "none (C2PA)"
    meaning = {
        "Invalid": "broken: the file is not what was signed",
        "Valid": f"unbroken, by {signature.issuer}, who is not known here (--trust)",
        "Trusted": f"unbroken, by {signature.issuer}, who is trusted",
    }
    return f"{meaning[signature.state]} (C2PA)"
