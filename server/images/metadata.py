"""The marks in an image file: always that a model made it, and its parameters if the operator allows it.

The first mark is IPTC's DigitalSourceType in XMP, which search engines and social networks read
(https://cv.iptc.org/newscodes/digitalsourcetype/). The second is the text `parameters` that other image tools write
and read: a text chunk in PNG files, EXIF's UserComment elsewhere. Neither holds a time or an
id: the same request gives the same bytes.
"""

import json
import re
import struct
from dataclasses import dataclass
from functools import cache
from typing import Any

from PIL import Image, PngImagePlugin

from pipelines.image_formats import ImageFormat
from pipelines.request import ImageRequest
from weights.version import read_version

SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
SOURCE_TYPE_IN_XMP = re.compile(r"DigitalSourceType\s*(?:=\s*[\"']|(?:\s[^>]*)?>\s*)([^\"'<\s]+)")
XMP = f"""<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/">
<Iptc4xmpExt:DigitalSourceType>{SOURCE_TYPE}</Iptc4xmpExt:DigitalSourceType>
</rdf:Description></rdf:RDF></x:xmpmeta>
<?xpacket end="r"?>"""
XMP_CHUNK = "XML:com.adobe.xmp"  # PNG's keyword for XMP (XMP specification, part 3)
TEXT_CHUNK = "parameters"
EXIF_IFD, USER_COMMENT, UNICODE = 0x8769, 0x9286, b"UNICODE\0"  # EXIF 2.3, 4.6.5
WITHHELD = "withheld by the safety checker"


@dataclass(frozen=True, slots=True)
class Marks:
    """The marks that were found in a file; None for a mark that is missing."""

    source_type: str | None
    parameters: str | None

    @property
    def says_ai(self) -> bool:
        return self.source_type == SOURCE_TYPE


@cache
def get_software() -> str:
    return f"srpo-server {read_version()}"


def format_parameters(request: ImageRequest, index: int) -> str:
    """The common `parameters` text of one image: the prompt, then a line of names and values.

    Image `index` is written with its own seed, like a request for that single image.
    """
    facts: dict[str, object] = {
        "Steps": request.num_inference_steps,
        "CFG scale": 1,  # FLUX.1 [dev]'s guidance is distilled; this is how other tools tell the two apart
        "Distilled CFG Scale": f"{request.guidance_scale:g}",
        "Seed": request.seeds[index],
        "Size": f"{request.width}x{request.height}",
        "Model": request.model,
        "Version": get_software(),
    }
    if request.source is not None:
        facts["Denoising strength"] = f"{request.source.strength:g}"
    return f"{request.prompt}\n" + ", ".join(f"{name}: {quote_value(str(value))}" for name, value in facts.items())


def quote_value(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if set(value) & set(',:"\n') else value


def make_save_options(format: ImageFormat, parameters: str | None) -> dict[str, Any]:
    """The options that make Pillow's `save` write the marks into a file of this format."""
    if format.text_chunks:
        chunks = PngImagePlugin.PngInfo()
        chunks.add_itxt(XMP_CHUNK, XMP)
        if parameters is not None:
            chunks.add_text(TEXT_CHUNK, parameters)
        return {"pnginfo": chunks}
    options: dict[str, Any] = {"xmp": XMP.encode()}
    if parameters is not None:
        options["exif"] = build_exif(UNICODE + parameters.encode("utf-16-be"))
    return options


def build_exif(comment: bytes) -> bytes:
    """EXIF with only a UserComment, big-endian. Pillow's writer would give the tag a wrong type."""
    long, undefined, end = 4, 7, 0
    first = struct.pack(">HHHIII", 1, EXIF_IFD, long, 1, 26, end)  # at 8, the only entry points to 26
    second = struct.pack(">HHHIII", 1, USER_COMMENT, undefined, len(comment), 44, end)
    return b"Exif\0\0" + struct.pack(">2sHI", b"MM", 42, 8) + first + second + comment


def read_marks(picture: Image.Image) -> Marks:
    """The marks of a picture that was opened and loaded, also if another tool wrote them."""
    found = picture.info.get("xmp") or picture.info.get(XMP_CHUNK) or b""
    xmp = found.decode("utf-8", "replace") if isinstance(found, bytes) else str(found)
    source = SOURCE_TYPE_IN_XMP.search(xmp)
    text = picture.info.get(TEXT_CHUNK)
    if text is None:
        exif = picture.getexif()
        comment = exif.get_ifd(EXIF_IFD).get(USER_COMMENT, b"")
        if isinstance(comment, bytes) and comment.startswith(UNICODE):
            big = exif.endian == ">"
            text = comment[len(UNICODE) :].decode("utf-16-be" if big else "utf-16-le", "replace")
    return Marks(source[1] if source else None, text if isinstance(text, str) else None)
