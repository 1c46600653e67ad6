"""The requests of `srpo generate`, from prompts or a JSONL file, and the folder that their image files get into.

Every finished request is written to `requests.jsonl` beside the images, with the seed that was used, so that the same
command continues where it stopped, and another prompt gets a number that no image has yet.
"""

import json
import re
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Annotated, Any

from PIL import Image
from pydantic import AliasChoices, Field, create_model
from pydantic_settings import CliPositionalArg

from pipelines.fields import Boolean
from pipelines.image_formats import IMAGE_FORMATS, TITLES
from pipelines.request import OUTPUT_FORMATS, PARAM_TYPES, GenerationParams, ImageToImageParams
from pipelines.safety.guard import InspectedResult
from server.batch.items import BatchItem, make_item
from server.batch.lines import CannotGenerate, has_source_image, read_lines, to_native
from server.cluster.settings import EngineCount
from server.images.signing import FileSigner
from server.settings.engine import EngineSettings
from server.settings.storage import BucketSettings
from server.settings.types import Metavar
from weights.checkpoints import choose_checkpoint
from weights.durable_file import ORDINARY, append_durably, write_durably

SUFFIXES = {suffix: name for name in OUTPUT_FORMATS for suffix in IMAGE_FORMATS[name].suffixes}
RECORD = "requests.jsonl"
NUMBERED = re.compile(r"\d{4,}(-\d+)?")
BUCKET = "s3://"
NOT_FLAGS = ("prompt", "sync_mode", "output_format", "image_url")
PARAMETERS = GenerationParams.model_fields | {
    name: field for name, field in ImageToImageParams.model_fields.items() if name not in GenerationParams.model_fields
}


class GenerateSettings(EngineSettings, EngineCount, BucketSettings):
    """Draw images without a server."""

    prompts: CliPositionalArg[list[str]] = Field([], description="what to draw; several prompts make several images")
    target: str = Field(
        ".",
        validation_alias=AliasChoices("o", "output"),
        description="a file (its suffix chooses the format), a folder, or with --ray s3://BUCKET/PREFIX",
    )
    jsonl: Path | None = Field(None, description="a file with one request a line, in the API's own fields")
    image: Path | None = Field(None, description=f"begin at this picture ({TITLES}) and keep its size")
    format: str | None = Field(None, description=f"format of images in a folder: {', '.join(OUTPUT_FORMATS)}")
    as_json: bool = Field(
        False, validation_alias=AliasChoices("json", "as_json"), description="print one JSON object for each request"
    )
    ray: bool = Field(
        False,
        description="draw the lines of --jsonl with --engines engines of Ray into a bucket (docs/cluster.md)",
    )
    preview: bool = Field(False, description="show the images on their way, in a terminal that can (24-bit colour)")

    @property
    def output(self) -> Path:
        return Path(self.target)


def add_parameter_flags() -> type[GenerateSettings]:
    """The settings with every generation parameter as a flag; its value is validated as in the API."""
    fields: dict[str, Any] = {
        name: (
            Annotated[str, Metavar("true|false")] | None if isinstance(PARAM_TYPES[name], Boolean) else str | None,
            Field(None, description=f"{info.description} ({PARAM_TYPES[name].expected})"),
        )
        for name, info in PARAMETERS.items()
        if name not in NOT_FLAGS
    }
    return create_model("GenerateSettings", __base__=GenerateSettings, **fields)


@dataclass(frozen=True, slots=True)
class Output:
    """Where the images of a batch get to: a folder, and the record of what is finished, where there is one."""

    folder: Path
    record: Path | None

    def files(self, item: BatchItem) -> list[Path]:
        return [self.folder / name for name in item.names]

    def save(
        self, item: BatchItem, inspected: InspectedResult, settings: EngineSettings, signer: FileSigner | None
    ) -> None:
        """Write the images, then their line in `requests.jsonl`, each on the disk before the next."""
        for name, image in item.encode(inspected, settings, signer):
            write_durably(self.folder / name, image.data, ORDINARY)
        if self.record is not None:
            append_durably(self.record, (json.dumps(item.record()) + "\n").encode())

    def read_finished(self) -> set[tuple[int, str]]:
        """(number, request) of every line in the record whose files are still there, and are no later line's.

        Raises `CannotGenerate` where the file is no such record: ours would spoil it.
        """
        if self.record is None or not self.record.exists():
            return set()
        lines: list[tuple[str, list[str]]] = []
        for text in self.record.read_text().splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                continue  # the last line of an interrupted run
            if not is_record(line):
                raise CannotGenerate(
                    f"{self.record} is not the record that srpo generate keeps in a folder, which has this name: give "
                    "another folder as --output, or the file another name"
                )
            lines.append((write_request(line["request"]), line["files"]))
        last = {name: place for place, (_, names) in enumerate(lines) for name in names}
        return {
            (find_number(names[0]), request)
            for place, (request, names) in enumerate(lines)
            if all(last[name] == place and (self.folder / name).exists() for name in names)
        }

    def find_taken(self) -> set[int]:
        """The numbers that some image in the folder has."""
        names = (path.stem for path in self.folder.iterdir() if path.suffix in SUFFIXES)
        return {find_number(name) for name in names if NUMBERED.fullmatch(name)}


def is_record(line: Any) -> bool:
    """Whether a line of JSON is one that `Output.save` writes."""
    names = line.get("files") if isinstance(line, dict) and "request" in line else None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        return False
    return NUMBERED.fullmatch(Path(names[0]).stem) is not None


def find_number(name: str) -> int:
    return int(name.partition(".")[0].partition("-")[0])


def write_request(line: dict[str, Any]) -> str:
    """A request as text, which is the same for the same request."""
    return json.dumps(line, sort_keys=True)


def plan_batch(settings: GenerateSettings) -> tuple[list[BatchItem], Output]:
    """The requests that are not drawn yet, and where their images get to. Raises `CannotGenerate`."""
    if settings.jsonl is not None and settings.jsonl.resolve() == (settings.output / RECORD).resolve():
        raise CannotGenerate(
            f"--jsonl: {settings.jsonl} is where the record of what is drawn in this folder is kept: give another "
            "folder as --output, or the file another name"
        )
    lines = read_requests(settings)
    if not lines:
        raise CannotGenerate("nothing to draw: give a prompt or --jsonl FILE (see srpo generate --help)")
    if settings.target.startswith(BUCKET):
        raise CannotGenerate("--output: only --ray draws into a bucket")
    suffix = settings.output.suffix.lower()
    one_file = suffix in SUFFIXES
    if not one_file and suffix in Image.registered_extensions() and not settings.output.is_dir():
        raise CannotGenerate(f"--output: a file must end in one of {', '.join(SUFFIXES)}, not in {suffix}")
    if one_file and len(lines) > 1:
        raise CannotGenerate(f"{len(lines)} requests do not fit one file; give a folder as --output")
    folder = settings.output.parent if one_file else settings.output
    folder.mkdir(parents=True, exist_ok=True)
    output = Output(folder, None if one_file else folder / RECORD)
    done, model = output.read_finished(), choose_checkpoint(settings.model, settings.models_dir).id
    requests = [write_request(line) for line in lines]
    # The number of a line of a file is where it stands, so that a line that was changed is drawn in its place.
    is_file = one_file or settings.jsonl is not None
    numbers = range(1, len(lines) + 1) if is_file else number_prompts(requests, done, output.find_taken())
    work = []
    for place, (line, request, number) in enumerate(zip(lines, requests, numbers, strict=True), 1):
        if (number, request) not in done:
            if "image" in line and not Path(str(line["image"])).is_file():
                raise CannotGenerate(f"request {place}: image: there is no file {line['image']}")
            work.append(make_item(place, line, model, settings.output if one_file else Path(f"{number:04d}")))
    return work, output


def number_prompts(requests: list[str], done: set[tuple[int, str]], taken: set[int]) -> list[int]:
    """The number of each request's files: its own where it is drawn already, else one that no image has yet."""
    own: dict[str, list[int]] = {}
    for number, request in sorted(done, reverse=True):
        own.setdefault(request, []).append(number)
    taken, numbers = set(taken), []
    for place, request in enumerate(requests, 1):
        numbers.append(own[request].pop() if own.get(request) else next(n for n in count(place) if n not in taken))
        taken.add(numbers[-1])
    return numbers


def read_requests(settings: GenerateSettings) -> list[dict[str, Any]]:
    """Every request in the API's own fields. Flags are the defaults of each request."""
    shared = read_shared(settings)
    lines = [{"prompt": prompt} for prompt in settings.prompts]
    if settings.jsonl is not None:
        lines += read_jsonl(settings.jsonl)
    if settings.image is not None:
        lines = [{"image": str(settings.image)} | line for line in lines]
    if "strength" in shared and not all(has_source_image(line) for line in lines):
        raise CannotGenerate("--strength needs a picture to begin with: --image FILE")
    return [to_native(shared | line) for line in lines]


def read_shared(settings: GenerateSettings) -> dict[str, Any]:
    """The fields that flags give to every request."""
    given = {name: getattr(settings, name) for name in PARAMETERS if name not in NOT_FLAGS}
    shared = {name: parse_flag(value) for name, value in given.items() if value is not None}
    if settings.output.suffix.lower() in SUFFIXES:
        shared["output_format"] = SUFFIXES[settings.output.suffix.lower()]
    elif settings.format is not None:
        shared["output_format"] = settings.format
    return shared


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
    """All lines. The first wrong one ends the command before anything is drawn: raises `CannotGenerate`."""
    lines = list(read_lines(file))
    for line in lines:
        if line.fault is not None:
            raise CannotGenerate(f"{file}, {line.fault}")
    return [line.fields for line in lines]
