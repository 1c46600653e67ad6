"""A request between its validation and its admission, and how it becomes work for the engine."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, BinaryIO, Self

from pipelines.fields import Size
from pipelines.request import PARAM_TYPES, ImageRequest
from server.errors import invalid_request
from server.images.decoding import UnusableImage
from server.schema import Body, GenerationBody, read_body
from server.security.callers import Caller
from server.state import AppState
from server.translation.translated_request import EVENTS, TranslatedRequest

PLACEHOLDER_URL = "data:,"  # the `image_url` of a request whose picture is a file, uploaded or local


@dataclass(frozen=True, slots=True)
class EventForm:
    """What a request says of how its events look.

    It can be read of any job: `JobSpec.from_json` validates for the model that is served now, which may be another one.
    """

    events: str  # begins their types
    num_images: int
    output_format: str

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        spoken, native = data["spoken"], data["spoken"]["native"]
        return cls(spoken.get("events", EVENTS), native["num_images"], native["output_format"])


@dataclass(slots=True)
class JobSpec:
    """A validated request with its seed, where its image URLs begin, and which engine was there when it came.

    It lives as long as its request: its source picture is released before, and what is ignored of it is added.
    """

    translated: TranslatedRequest
    body: Body
    base_url: str
    upload: BinaryIO | None = None  # the source picture, where it came with the request
    fingerprint: str | None = None
    webhook: tuple[str, str] | None = None  # where its end is told, and the host of that; kept apart from the request
    trace: Mapping[str, str] = field(default_factory=dict)  # the headers of the trace that it belongs to

    @property
    def has_source(self) -> bool:
        """Whether it begins at a picture, which may have to be fetched."""
        return not isinstance(self.body, GenerationBody)

    async def build_request(self, state: AppState, caller: Caller) -> ImageRequest:
        """What is to be drawn; a source picture is fetched and decoded.

        Raises `InvalidRequest` if it cannot be used, and before a picture is fetched what the pool would raise, and
        `KeyLimitReached`.
        """
        if isinstance(self.body, GenerationBody):
            return self.body.to_request(state.served)
        state.pool.check_capacity()
        try:
            with state.limits.loading(caller):
                size, pixels = await state.sources.load(self.body.image_url if self.upload is None else self.upload)
        except UnusableImage as error:
            raise invalid_request(
                f"the picture cannot be used: {error}",
                path=("image_url" if self.upload is None else "image",),
                code="unusable_image",
                expected=PARAM_TYPES["image_url"].expected,
                received=str(error),
            ) from error
        return self.body.to_request(state.served, size, pixels)

    @property
    def form(self) -> EventForm:
        return EventForm(self.translated.events, self.body.num_images, self.body.output_format)

    def release_source(self) -> None:
        """Forget the source picture, which is large, and is not needed once the request is built. Again: nothing."""
        if self.upload is not None:
            self.upload.close()
            self.upload = None
        if not isinstance(self.body, GenerationBody):
            self.translated.native["image_url"] = PLACEHOLDER_URL
            self.body = self.body.model_copy(update={"image_url": PLACEHOLDER_URL})

    def to_json(self, request: ImageRequest) -> dict[str, Any]:
        """All but the source's pixels, for which there is a better place."""
        fields = self.body.model_dump(mode="json", exclude={"image_size"})
        if request.source is not None:
            fields["image_url"] = PLACEHOLDER_URL
        fields["image_size"] = {"width": request.width, "height": request.height}
        translated = asdict(replace(self.translated, native=fields))
        stored = {"spoken": translated, "base_url": self.base_url, "fingerprint": self.fingerprint}
        return stored | ({"trace": dict(self.trace)} if self.trace else {})

    @classmethod
    def from_json(cls, data: dict[str, Any], served: str) -> "JobSpec":
        """Raises `InvalidRequest` where the model that is served does not take it."""
        translated = TranslatedRequest.from_json(data["spoken"])
        body, trace = read_body(translated.native, served), data.get("trace", {})
        return cls(translated, body, data["base_url"], fingerprint=data.get("fingerprint"), trace=trace)

    def rebuild_request(self, served: str, pixels: bytes) -> ImageRequest:
        """The same work, of a spec that was read back; `pixels` are the source's, or none."""
        if isinstance(self.body, GenerationBody):
            return self.body.to_request(served)
        return self.body.to_request(served, Size(**self.translated.native["image_size"]), pixels)
