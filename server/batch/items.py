"""One request of a batch, validated, and the image files that it becomes."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipelines.request import GenerationParams, ImageRequest, ImageToImageParams, for_model
from pipelines.safety.guard import InspectedResult
from server.batch.lines import CannotGenerate, has_source_image
from server.images.decoding import UnusableImage
from server.images.encoding import EncodedImage, encode_one
from server.images.signing import FileSigner
from server.images.source import Sources
from server.jobs.spec import PLACEHOLDER_URL
from server.process.threads import ThreadPools
from server.schema import issues_of
from server.settings.engine import EngineSettings

Params = GenerationParams | ImageToImageParams


@dataclass(frozen=True, slots=True)
class BatchItem:
    """A request and the names of its files. `line` is what it was made from."""

    params: Params
    names: tuple[str, ...]
    line: dict[str, Any]

    async def request(self, model: str, sources: Sources, threads: ThreadPools) -> ImageRequest:
        """The request for the engine, with its source picture read. Raises `UnusableImage`."""
        if isinstance(self.params, GenerationParams):
            return self.params.to_request(model)
        file = self.line.get("image")
        try:
            picture = self.params.image_url if file is None else await threads.run("files", Path(file).read_bytes)
        except OSError as error:
            raise UnusableImage(f"{file}: {error.strerror}") from error
        size, pixels = await sources.load(picture)
        return self.params.to_request(model, size, pixels)

    def encode(
        self, inspected: InspectedResult, settings: EngineSettings, signer: FileSigner | None
    ) -> Iterator[tuple[str, EncodedImage]]:
        """The files, by their names."""
        for index, name in enumerate(self.names):
            yield name, encode_one(inspected, index, self.params.output_format, settings, signer)

    def record(self) -> dict[str, Any]:
        """What is written down of it once its files are there."""
        return {"request": self.line, "seed": self.params.seed, "files": list(self.names)}


def make_item(
    number: int, line: dict[str, Any], model: str, name: Path | None = None, chosen: Mapping[str, Any] | None = None
) -> BatchItem:
    """Validate a request. Its files are called by its number, unless `name` says how (without a suffix: the format's).

    `chosen` are more fields than the line's.

    Raises `CannotGenerate`.
    """
    fields = {**line, **(chosen or {})}
    if has_source_image(line):
        fields = {"image_url": PLACEHOLDER_URL} | fields
    if not isinstance(file := line.get("image", ""), str) or "\0" in file:
        raise CannotGenerate(f"request {number}: image: expected the path of a file")
    kind: type[Params] = ImageToImageParams if has_source_image(line) else GenerationParams
    try:
        params = for_model(model, kind).model_validate(fields)
    except ValidationError as error:
        issues = [issue for detail in error.errors(include_url=False) for issue in issues_of(detail)]
        listed = "; ".join(f"{'.'.join(map(str, issue['path']))}: {issue['message']}" for issue in issues)
        raise CannotGenerate(f"request {number}: {listed}") from error
    stem, suffix = (name.stem, name.suffix) if name else (f"{number:04d}", "")
    suffix = suffix or f".{params.output_format}"
    count = params.num_images
    names = [f"{stem}{suffix}"] if count == 1 else [f"{stem}-{index}{suffix}" for index in range(1, count + 1)]
    return BatchItem(params, tuple(names), line)
