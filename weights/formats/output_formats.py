"""The formats that `srpo weights convert` writes, by name. No torch: a writer is imported when it is asked for."""

from collections.abc import Mapping
from typing import NamedTuple


class OutputFormat(NamedTuple):
    """A format: what writes it ("module:name"), and what it is, in the words of the command's help."""

    writer: str
    description: str = ""


OUTPUT_FORMATS: Mapping[str, OutputFormat] = {
    "bf16": OutputFormat("weights.formats.write:BF16_WRITER"),
    "fp8": OutputFormat("weights.formats.write:FP8_WRITER", "a scale a row; half of bf16's size"),
    "q4": OutputFormat("weights.formats.write:Q4_WRITER", "GGUF, Q4_0"),
}
