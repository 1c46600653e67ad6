"""What other clients call our fields: one table of foreign spellings, none of which is ever a 400 for being present.

A foreign field that means something here is honoured where the native one is absent; one that does not, or whose
value cannot be honoured, is ignored and named in `x-ignored-fields`, so that a typo can be found.
"""

import re
from collections.abc import Mapping
from typing import Any

from pipelines.fields import ImageSize, Integer, Invalid
from pipelines.request import PARAM_TYPES, CommonParams, for_model, param_type_of
from server.translation.model_names import HOSTED_DIALECT, IMAGE_TO_IMAGE, Dialect, params_of
from server.translation.translated_request import MAX_NAME, TranslatedRequest
from weights.checkpoints import HOSTED_MODEL

RESPONSE_FORMATS = ("url", "b64_json")
MAX_PARTIAL = 3  # previews of an image
SIDES = re.compile(r"0*([1-9]\d{0,4})[xX]0*([1-9]\d{0,4})", re.ASCII)
ALIASES: Mapping[str, str] = {
    "n": "num_images",
    "size": "image_size",
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "cfg": "guidance_scale",
    "image": "image_url",
    "prompt_strength": "strength",
    "denoising_strength": "strength",
}


def translate(body: Mapping[str, Any], dialect: Dialect = HOSTED_DIALECT, *, edit: bool = False) -> TranslatedRequest:
    """Native fields pass as they are, to be validated strictly for the loaded model; null means absent.

    An `edit` begins at a picture, whichever name it is asked by; without a name it means the loaded model.
    """
    fields = lift_extra_body(body)
    namesake = dialect.namesake(fields.get("model"))
    take_model(fields, dialect, edit)
    params = for_model(dialect.served, params_of(fields.get("model")))
    native = ("model", *params.model_fields)
    translated = TranslatedRequest({name: fields.pop(name) for name in native if name in fields})
    take_response_format(fields, translated, namesake.response_format if namesake else dialect.response_format)
    if namesake:
        translated.detailed = namesake.detailed
        translated.native.setdefault("output_format", namesake.output_format)
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
    translated.ignore(fields)
    size = translated.native.get("image_size")
    if isinstance(size, dict):
        sides = {name: size[name] for name in ("width", "height") if name in size}
        translated.native["image_size"] = sides
        translated.ignore(f"image_size.{name[:MAX_NAME]}" for name in size if name not in sides)
    return translated


def lift_extra_body(body: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are not null; those of a literal `extra_body`, as one client sends it, where none is outside."""
    fields = {name: value for name, value in body.items() if value is not None}
    extra = fields.get("extra_body")
    if not isinstance(extra, dict):
        return fields
    del fields["extra_body"]
    return {name: value for name, value in extra.items() if value is not None} | fields


def take_model(fields: dict[str, Any], dialect: Dialect, edit: bool) -> None:
    """Resolve the model's name. One that is not served stays as it was sent, for the error that names it."""
    model = fields.get("model", HOSTED_MODEL if edit else None)
    if isinstance(model, str):
        resolved = dialect.resolve(model)
        if edit and resolved in (HOSTED_MODEL, dialect.served):
            resolved += IMAGE_TO_IMAGE
        fields["model"] = resolved


def take_response_format(fields: dict[str, Any], translated: TranslatedRequest, default: str) -> None:
    named = None
    if translated.native.get("output_format") in RESPONSE_FORMATS:  # one client sends it there
        named = translated.native.pop("output_format")
    if fields.get("response_format") in RESPONSE_FORMATS:
        named = fields.pop("response_format")
    if named is None and default == "b64_json" and translated.native.get("sync_mode") is True:
        named = "url"  # the caller looks for a data URI there
    translated.response_format = named or default


def honour(foreign: str, native: str, value: Any, translated: TranslatedRequest, params: type[CommonParams]) -> None:
    """Take `value` for the native field if that is absent and the value is one it accepts, or near to one."""
    kind = param_type_of(params.model_fields[native])
    exact = value
    sides = SIDES.fullmatch(value) if foreign == "size" and isinstance(value, str) else None
    if sides:
        exact = {"width": int(sides[1]), "height": int(sides[2])}
    taken = exact
    if isinstance(kind, ImageSize) and sides:
        taken = kind.nearest(**exact)._asdict()
    elif isinstance(kind, Integer) and foreign == "n" and is_more(value, kind.high):
        taken = kind.high
    try:
        kind.parse(taken)
    except Invalid:
        translated.ignore([foreign])
        return
    if native in translated.native or taken != exact:
        translated.ignore([foreign])
    translated.native.setdefault(native, taken)


def is_more(value: Any, most: int | None) -> bool:
    """Whether an integral number is above what is allowed."""
    integral = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return most is not None and integral and value > most


def take_sides(fields: dict[str, Any], translated: TranslatedRequest) -> None:
    """`width` and `height` at top level, together or alone."""
    sides = {name: fields[name] for name in ("width", "height") if name in fields}
    if not sides or "image_size" in translated.native:
        return  # left in `fields`, so they are listed as ignored
    for name, value in sides.items():
        try:
            PARAM_TYPES["image_size"].parse({name: value})
        except Invalid:
            continue
        del fields[name]
        translated.native.setdefault("image_size", {})[name] = value
