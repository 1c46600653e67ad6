"""Image-to-image over HTTP: a picture, a request that begins at it, and what comes back."""

import base64
import io
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image
from support.pictures import file_of
from support.server import START_LIMIT

PATH = "/v1/images/generations"


MODEL = "flux/srpo/image-to-image"


PIXELS = np.random.default_rng(3).integers(0, 256, (512, 544, 3), dtype=np.uint8)


PICTURE = Image.fromarray(PIXELS)


FILE = file_of(PICTURE)


def uri(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


BODY: dict[str, Any] = {
    "model": MODEL, "prompt": "quick", "image_url": uri(FILE), "num_inference_steps": 4, "seed": 7,
    "output_format": "png", "response_format": "b64_json", "enable_safety_checker": False,
}  # fmt: skip


def post(server: Any, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
    """`None` takes a field out."""
    body = {name: value for name, value in (BODY | fields).items() if value is not None}
    return httpx.post(server.url + PATH, json=body, headers=headers, timeout=START_LIMIT)


def picture(reply: httpx.Response) -> Image.Image:
    assert reply.status_code == 201, reply.text
    return Image.open(io.BytesIO(base64.b64decode(reply.json()["data"][0]["b64_json"])))


def peak(pid: int) -> int:
    """The most memory that a process has had since it was last asked to forget, in bytes."""
    [line] = [text for text in Path(f"/proc/{pid}/status").read_text().splitlines() if text.startswith("VmHWM")]
    return int(line.split()[1]) * 1024
