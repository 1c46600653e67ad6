"""`srpo verify`: reads what an image file says about its origin."""

import io
from pathlib import Path

from PIL import Image, UnidentifiedImageError
from pydantic import Field
from pydantic_settings import CliPositionalArg

from server.cli.terminal.failure import CommandFailed, format_error
from server.cli.terminal.parsing import Arguments, parse
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
            raise CommandFailed(f"--trust: {settings.trust} holds no certificate in PEM")
    except OSError as error:
        raise CommandFailed(f"--trust: {format_error(error)}") from error
    accepted = True
    problems: list[str] = []
    for file in settings.files:
        try:
            accepted &= verify_file(file, settings.trust)
        except CommandFailed as failure:
            problems.extend(failure.problems)
    if problems:
        raise CommandFailed(*problems)
    return 0 if accepted else 1


def verify_file(file: Path, trust: Path | None) -> bool:
    """Print one file's marks. Returns whether they say that a model made it. Raises `CommandFailed`."""
    try:
        data = file.read_bytes()
        with Image.open(io.BytesIO(data)) as picture:
            signature = read_signature(data, Image.MIME[picture.format or ""], trust)
            if signature is None or signature.state != "Invalid":
                picture.load()
            marks = read_marks(picture)
    except UnidentifiedImageError as error:
        raise CommandFailed(f"{file}: not an image that can be read") from error
    except OSError as error:
        raise CommandFailed(f"{file}: {error.strerror or error}") from error
    except (ValueError, SyntaxError, KeyError, Image.DecompressionBombError) as error:
        raise CommandFailed(f"{file}: {error}") from error
    print(f"{file}\n{format_marks(marks, signature)}")
    accepted = ("Trusted",) if trust else ("Trusted", "Valid")
    is_accepted = signature.state in accepted if signature else trust is None
    return marks.says_ai and is_accepted


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
