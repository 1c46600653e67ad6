"""What other clients call our fields: one table of foreign spellings, none of which is ever a 400 for being present.

A foreign field that means something here is honoured where the native one is absent; one that does not, or whose
value cannot be honoured, is ignored and named in `x-ignored-fields`, so that a typo can be found.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from pipelines.fields import Invalid, ParamType
from pipelines.request import CommonParams, GenerationParams, ImageToImageParams, for_model
from weights.checkpoints import HOSTED_MODEL

IMAGE_TO_IMAGE = "/image-to-image"  # after the name of a model
RESPONSE_FORMATS = ("url", "b64_json")
MAX_LISTED, MAX_NAME = 20, 64
MAX_PARTIAL = 3  # previews of an image


PARAM_TYPES: Mapping[str, ParamType] = {
    name: part
    for name, field in (GenerationParams.model_fields | ImageToImageParams.model_fields).items()
    for part in field.metadata
    if isinstance(part, ParamType)
}


def param_type(name: str) -> ParamType:
    """The kind a generation parameter is declared with."""
    return PARAM_TYPES[name]


def params_of(model: object) -> type[CommonParams]:
    """The parameters of the model that a request names; what is no name has those of text-to-image."""
    sourced = isinstance(model, str) and model.endswith(IMAGE_TO_IMAGE)
    return ImageToImageParams if sourced else GenerationParams


ALIASES: Mapping[str, str] = {
    "n": "num_images",
    "size": "image_size",
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "image": "image_url",
    "prompt_strength": "strength",
    "denoising_strength": "strength",
}


@dataclass
class TranslatedRequest:
    """A body in native fields, how its images are to be returned, and the names of fields that were ignored."""

    native: dict[str, Any]
    response_format: str | None = None
    stream: bool = False
    partial_images: int = 0
    events: str = "image_generation"  # what the names of a stream's events begin with
    ignored: list[str] = field(default_factory=list)


def translate(body: Mapping[str, Any], served: str = HOSTED_MODEL) -> TranslatedRequest:
    """Native fields pass as they are, to be validated strictly for the loaded model; null means absent."""
    fields = {name: value for name, value in body.items() if value is not None}
    extra = fields.get("extra_body")
    if isinstance(extra, dict):  # one client sends its extra fields inside a literal `extra_body`
        del fields["extra_body"]
        fields = {name: value for name, value in extra.items() if value is not None} | fields
    params = for_model(served, params_of(fields.get("model")))
    native = ("model", *params.model_fields)
    translated = TranslatedRequest({name: fields.pop(name) for name in native if name in fields})
    take_response_format(fields, translated)
    for foreign, name in ALIASES.items():
        if foreign in fields and name in native:
            honour(foreign, name, fields.pop(foreign), translated, params)
    if "image_size" in native:
        take_sides(fields, translated)
    stream = fields.get("stream")
    if isinstance(stream, bool):
        translated.stream = fields.pop("stream")
    partial_images = fields.get("partial_images")
    if partial_images in range(MAX_PARTIAL + 1) and not isinstance(partial_images, bool):
        translated.partial_images = int(fields.pop("partial_images"))
    translated.ignored += fields
    size = translated.native.get("image_size")
    if isinstance(size, dict):
        translated.ignored += [f"image_size.{name}" for name in size if name not in ("width", "height")]
    return translated


def take_response_format(fields: dict[str, Any], translated: TranslatedRequest) -> None:
    if translated.native.get("output_format") in RESPONSE_FORMATS:  # one client sends it there
        translated.response_format = translated.native.pop("output_format")
    if fields.get("response_format") in RESPONSE_FORMATS:
        translated.response_format = fields.pop("response_format")


def honour(foreign: str, native: str, value: Any, translated: TranslatedRequest, params: type[CommonParams]) -> None:
    """Take `value` for the native field if that is absent and the value is one it accepts."""
    sides = re.fullmatch(r"(\d{1,5})[xX](\d{1,5})", value) if foreign == "size" and isinstance(value, str) else None
    if sides:
        value = {"width": int(sides[1]), "height": int(sides[2])}
    try:
        next(part for part in params.model_fields[native].metadata if isinstance(part, ParamType)).parse(value)
    except Invalid:
        translated.ignored.append(foreign)
        return
    if native in translated.native:
        translated.ignored.append(foreign)
    else:
        translated.native[native] = value


def take_sides(fields: dict[str, Any], translated: TranslatedRequest) -> None:
    """`width` and `height` at top level, together or alone."""
    sides = {name: fields[name] for name in ("width", "height") if name in fields}
    if not sides or "image_size" in translated.native:
        return  # left in `fields`, so they are listed as ignored
    for name, value in sides.items():
        try:
            param_type("image_size").parse({name: value})
        except Invalid:
            continue
        del fields[name]
        translated.native.setdefault("image_size", {})[name] = value


def header_of(names: Iterable[str]) -> str:
    """The value of `x-ignored-fields`: percent-encoded outside `A-Za-z0-9_.-`, at most 20 names of 64 characters."""
    listed = [name for name in dict.fromkeys(names) if name]  # a space at the end would cost the whole reply
    quoted = (quote(name, safe="").replace("~", "%7E")[:MAX_NAME] for name in listed[:MAX_LISTED])
    shown = [re.sub("%.?$", "", name) for name in quoted]  # no half of an escape
    more = [f"+{len(listed) - MAX_LISTED}"] if len(listed) > MAX_LISTED else []
    return ", ".join(shown + more)
