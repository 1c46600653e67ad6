"""The requests of `srpo generate`, from prompts or a JSONL file, and the image files that they become.

Every finished request is written to `requests.jsonl` beside the images, with the seed that was used, so that the same
command continues where it stopped.
"""

import asyncio
import json
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import AliasChoices, Field, ValidationError, create_model
from pydantic_settings import CliPositionalArg

from pipelines.request import OUTPUT_FORMATS, GenerationParams, ImageRequest, ImageToImageParams, for_model
from pipelines.safety.guard import InspectedResult
from server.aliases import IMAGE_TO_IMAGE, param_type, translate
from server.images.decoding import UnusableImage
from server.images.encoding import encode_one
from server.images.signing import FileSigner
from server.images.source import Sources
from server.jobs.spec import PLACEHOLDER_URL
from server.schema import issues_of
from server.settings.engine import EngineSettings
from weights.checkpoints import choose_checkpoint
from weights.durable_file import ORDINARY, append_durably, write_durably

SUFFIXES = {".jpg": "jpeg", ".jpeg": "jpeg", ".png": "png", ".webp": "webp"}
RECORD = "requests.jsonl"
NOT_FLAGS = ("prompt", "sync_mode", "output_format", "image_url")
PARAMETERS = GenerationParams.model_fields | {
    name: field for name, field in ImageToImageParams.model_fields.items() if name not in GenerationParams.model_fields
}


Params = GenerationParams | ImageToImageParams


class CannotGenerate(Exception):
    """Nothing can be drawn as the command stands; the message tells the person who typed it why."""


class GenerateSettings(EngineSettings):
    """Draw images without a server."""

    prompts: CliPositionalArg[list[str]] = Field([], description="what to draw; several prompts make several images")
    output: Path = Field(
        Path(),
        validation_alias=AliasChoices("o", "output"),
        description="a file (its suffix chooses the format) or a folder",
    )
    jsonl: Path | None = Field(None, description="a file with one request a line, in the API's own fields")
    image: Path | None = Field(None, description="begin at this picture (PNG, JPEG, WebP) and keep its size")
    format: str | None = Field(None, description=f"format of images in a folder: {', '.join(OUTPUT_FORMATS)}")
    as_json: bool = Field(
        False, validation_alias=AliasChoices("json", "as_json"), description="print one JSON object for each request"
    )
    preview: bool = Field(False, description="show the images on their way, in a terminal that can (24-bit colour)")


def add_parameter_flags() -> type[GenerateSettings]:
    """The settings with every generation parameter as a flag; its value is validated as in the API."""
    fields: dict[str, Any] = {
        name: (str | None, Field(None, description=f"{info.description} ({param_type(name).expected})"))
        for name, info in PARAMETERS.items()
        if name not in NOT_FLAGS
    }
    return create_model("GenerateSettings", __base__=GenerateSettings, **fields)


class BatchItem:
    """One request, and the files that its images are written to."""

    def __init__(self, params: Params, files: list[Path], record: Path | None, line: dict[str, Any]) -> None:
        self.params = params
        self.files = files
        self.record = record
        self.line = line

    async def request(self, model: str, sources: Sources) -> ImageRequest:
        """The request for the engine, with its source picture read. Raises `UnusableImage`."""
        if isinstance(self.params, GenerationParams):
            return self.params.to_request(model)
        file = self.line.get("image")
        try:
            picture = self.params.image_url if file is None else await asyncio.to_thread(Path(file).read_bytes)
        except OSError as error:
            raise UnusableImage(f"{file}: {error.strerror}") from error
        size, pixels = await sources.load(picture)
        return self.params.to_request(model, size, pixels)

    def save(self, inspected: InspectedResult, settings: EngineSettings, signer: FileSigner | None) -> None:
        """Write the images, then their line in `requests.jsonl`, each on the disk before the next."""
        for index, file in enumerate(self.files):
            image = encode_one(inspected, index, self.params.output_format, settings, signer)
            write_durably(file, image.data, ORDINARY)
        if self.record is not None:
            done = {"request": self.line, "seed": self.params.seed, "files": [file.name for file in self.files]}
            append_durably(self.record, (json.dumps(done) + "\n").encode())


def plan_batch(settings: GenerateSettings) -> list[BatchItem]:
    """The requests that are not drawn yet. Raises `CannotGenerate`."""
    lines = read_requests(settings)
    if not lines:
        raise CannotGenerate("nothing to draw: give a prompt or --jsonl FILE (see srpo generate --help)")
    suffix = settings.output.suffix.lower()
    one_file = suffix in SUFFIXES
    if not one_file and suffix in Image.registered_extensions() and not settings.output.is_dir():
        raise CannotGenerate(f"--output: a file must end in one of {', '.join(SUFFIXES)}, not in {suffix}")
    if one_file and len(lines) > 1:
        raise CannotGenerate(f"{len(lines)} requests do not fit one file; give a folder as --output")
    folder = settings.output.parent if one_file else settings.output
    folder.mkdir(parents=True, exist_ok=True)
    record = None if one_file else folder / RECORD
    done, model = read_finished(record), choose_checkpoint(settings.model, settings.models_dir).id
    return [
        make_item(number, line, model, settings.output if one_file else None, folder, record)
        for number, line in enumerate(lines, 1)
        if (number, json.dumps(line, sort_keys=True)) not in done
    ]


def read_requests(settings: GenerateSettings) -> list[dict[str, Any]]:
    """Every request in the API's own fields. Flags are the defaults of each request."""
    given = {name: getattr(settings, name) for name in PARAMETERS if name not in NOT_FLAGS}
    shared = {name: parse_flag(value) for name, value in given.items() if value is not None}
    if settings.output.suffix.lower() in SUFFIXES:
        shared["output_format"] = SUFFIXES[settings.output.suffix.lower()]
    elif settings.format is not None:
        shared["output_format"] = settings.format
    lines = [{"prompt": prompt} for prompt in settings.prompts]
    if settings.jsonl is not None:
        lines += read_jsonl(settings.jsonl)
    if settings.image is not None:
        lines = [{"image": str(settings.image)} | line for line in lines]
    if "strength" in shared and not all(has_source_image(line) for line in lines):
        raise CannotGenerate("--strength needs a picture to begin with: --image FILE")
    return [to_native(shared | line) for line in lines]


def has_source_image(line: dict[str, Any]) -> bool:
    return "image" in line or "image_url" in line


def to_native(line: dict[str, Any]) -> dict[str, Any]:
    """A line in the API's native fields, and `image`, which names a local file."""
    native = translate({**line, "model": IMAGE_TO_IMAGE if has_source_image(line) else "", "image": None}).native
    del native["model"]
    return native | ({"image": line["image"]} if "image" in line else {})


def parse_flag(text: str) -> Any:
    """A flag's value: a size if it reads like 512x768, JSON if it is JSON (28, true), else the text itself."""
    width, x, height = text.partition("x")
    if x and width.isdigit() and height.isdigit():
        return {"width": int(width), "height": int(height)}
    try:
        return json.loads(text)
    except ValueError:
        return text


def read_jsonl(file: Path) -> list[dict[str, Any]]:
    lines = []
    for number, text in enumerate(file.read_text().splitlines(), 1):
        if text.strip():
            try:
                line = json.loads(text)
            except ValueError as error:
                raise CannotGenerate(f"{file}, line {number}: not JSON: {error}") from error
            if not isinstance(line, dict):
                raise CannotGenerate(f"{file}, line {number}: expected a JSON object")
            lines.append(line)
    return lines


def read_finished(record: Path | None) -> set[tuple[int, str]]:
    """(number, request) of every line in the record whose files still exist."""
    if record is None or not record.exists():
        return set()
    done = set()
    for text in record.read_text().splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue  # the last line of an interrupted run
        if all((record.parent / name).exists() for name in line["files"]):
            number = int(line["files"][0].split("-")[0].split(".")[0])
            done.add((number, json.dumps(line["request"], sort_keys=True)))
    return done


def make_item(
    number: int, line: dict[str, Any], model: str, file: Path | None, folder: Path, record: Path | None
) -> BatchItem:
    if "image" in line and not Path(str(line["image"])).is_file():
        raise CannotGenerate(f"request {number}: image: there is no file {line['image']}")
    try:
        if has_source_image(line):
            params: Params = for_model(model, ImageToImageParams).model_validate({"image_url": PLACEHOLDER_URL, **line})
        else:
            params = for_model(model, GenerationParams).model_validate(line)
    except ValidationError as error:
        issues = [issue for detail in error.errors(include_url=False) for issue in issues_of(detail)]
        listed = "; ".join(f"{'.'.join(map(str, issue['path']))}: {issue['message']}" for issue in issues)
        raise CannotGenerate(f"request {number}: {listed}") from error
    stem, suffix = (file.stem, file.suffix) if file else (f"{number:04d}", f".{params.output_format}")
    count = params.num_images
    names = [f"{stem}{suffix}"] if count == 1 else [f"{stem}-{index}{suffix}" for index in range(1, count + 1)]
    return BatchItem(params, [folder / name for name in names], record, line)
