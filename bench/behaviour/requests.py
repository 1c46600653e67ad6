"""The requests and command lines of `bench.behaviour`, as tables: their names, and what is sent."""

import base64
import io
from collections.abc import Mapping
from typing import Any

from PIL import Image

PROMPT = "a red apple"
BASE: Mapping[str, Any] = {
    "model": "flux/srpo", "prompt": PROMPT, "image_size": "square", "num_inference_steps": 1, "seed": 7,
}  # fmt: skip
LARGE: dict[str, Any] = {
    "image_size": {"width": 1536, "height": 1536},
    "num_inference_steps": 50,
    "num_images": 4,
}  # a minute of work
SIZES = ("square_hd", "square", "portrait_4_3", "portrait_16_9", "landscape_4_3", "landscape_16_9")


def picture(width: int, height: int, mode: str = "RGB", format: str = "PNG", **options: Any) -> bytes:
    """A file with a gradient."""
    image = Image.merge("RGB", [Image.linear_gradient("L").rotate(90 * turn) for turn in range(3)])
    with io.BytesIO() as file:
        image.resize((width, height)).convert(mode).save(file, format, **options)
        return file.getvalue()


def data_uri(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    return picture(640, 320, format="JPEG", exif=exif.tobytes())


SOURCED: dict[str, Any] = {
    "model": "flux/srpo/image-to-image", "image_size": None, "image_url": data_uri(picture(600, 520)),
    "num_inference_steps": 4,
}  # fmt: skip

IMAGES: dict[str, dict[str, Any]] = {  # what is added to BASE
    **{f"{preset} of {steps}": {"acceleration": preset, "num_inference_steps": steps}
       for preset in ("none", "regular", "high") for steps in (1, 4, 28)},
    **{f"size {size}": {"image_size": size} for size in SIZES},
    "source picture": SOURCED,
    "source picture, strength 0.3": SOURCED | {"strength": 0.3, "acceleration": "none"},
    "two images": {"num_images": 2, "num_inference_steps": 4},
    "guidance 12": {"guidance_scale": 12, "num_inference_steps": 4},
}  # fmt: skip
MORE_IMAGES: dict[str, dict[str, Any]] = {
    "size as sides": {"image_size": {"width": 1440, "height": 512}},
    "size by its width": {"image_size": {"width": 512, "depth": 3}},
    "four images": {"num_images": 4},
    "defaults": {"image_size": None, "num_inference_steps": None},
    "second image alone": {"num_images": 1, "seed": 8, "num_inference_steps": 4},
    "50 steps": {"num_inference_steps": 50, "acceleration": "high"},
    "png": {"output_format": "png"},
    "webp": {"output_format": "webp"},
    "sync_mode": {"sync_mode": True},
    "b64_json": {"response_format": "b64_json"},
    "b64_json and sync_mode": {"response_format": "b64_json", "sync_mode": True},
    "b64_json as output_format": {"output_format": "b64_json"},
    "url as output_format": {"output_format": "url", "response_format": "url"},
    "unchecked": {"enable_safety_checker": False},
    "largest seed": {"seed": 2**63 - 1},
    "seed as float": {"seed": 7.0, "num_images": 1.0},
    "other letters": {"prompt": "ein Ärger 🦖 \n\t苹果"},
    "longest prompt": {"prompt": "apple " * 666 + "pear"},
    "the model's own name": {"model": "tiny"},
    "OpenAI's spellings": {
        "image_size": None, "n": 2, "size": "1024x768", "quality": "hd", "style": "vivid", "user": "me",
        "background": "auto", "moderation": "low", "output_compression": 3, "stream": False, "partial_images": 2,
    },
    "OpenAI's spellings that cannot be honoured": {"image_size": None, "n": 9, "size": "256x256", "steps": 900},
    "OpenAI's spellings beside native fields": {"num_images": 1, "n": 2, "size": "1024x768", "steps": 3},
    "other spellings": {
        "image_size": None, "num_inference_steps": None, "width": 640, "height": 512, "steps": 3, "guidance": 2,
    },
    "one side": {"image_size": None, "width": 576, "height": 100},
    "extra_body": {"extra_body": {"num_images": 2, "seed": 99, "unknown": 1}},
    "ignored fields": {"sede": 3, "negative_prompt": "x", "ü y": 1, "a~b\r\n": 2, "z" * 80: 1},
    "many ignored fields": {f"field_{number}": number for number in range(25)},
    "nulls": {"guidance_scale": None, "output_format": None, "acceleration": None, "strength": None},
    "source picture, all of it": SOURCED | {"strength": 1},
    "source picture, nothing of it": SOURCED | {"strength": 0},
    "source picture, other spellings": SOURCED | {
        "image_url": None, "image": data_uri(picture(512, 512)), "denoising_strength": 0.5, "size": "1024x1024",
    },
    "source picture, the model's own name": SOURCED | {"model": "tiny/image-to-image", "num_images": 2},
    "source picture, long": SOURCED | {"image_url": data_uri(picture(1600, 200, format="WEBP"), "image/webp")},
    "source picture, transparent": SOURCED | {"image_url": data_uri(picture(300, 300, "RGBA"))},
    "source picture, turned": SOURCED | {"image_url": data_uri(rotated(), "image/jpeg")},
}  # fmt: skip

REFUSED: dict[str, dict[str, Any]] = {
    "no model": {"model": None},
    "no prompt": {"prompt": None},
    "empty prompt": {"prompt": ""},
    "long prompt": {"prompt": "a" * 4001},
    "prompt of another type": {"prompt": ["a"]},
    "unknown model": {"model": "dall-e-3"},
    "model that is not loaded": {"model": "flux/dev"},
    "model of another type": {"model": 3},
    "unknown size": {"image_size": "huge"},
    "width between": {"image_size": {"width": 1000, "height": 512}},
    "height too small": {"image_size": {"height": 480}},
    "size of another type": {"image_size": [512, 512]},
    "no steps": {"num_inference_steps": 0},
    "steps as text": {"num_inference_steps": "28"},
    "steps as switch": {"num_inference_steps": True},
    "half a step": {"num_inference_steps": 1.5},
    "guidance too high": {"guidance_scale": 20.5},
    "five images": {"num_images": 5},
    "seed 0": {"seed": 0},
    "seed too large": {"seed": 2**63},
    "sync_mode as text": {"sync_mode": "yes"},
    "unknown format": {"output_format": "gif"},
    "unknown preset": {"acceleration": "turbo"},
    "several": {"prompt": None, "seed": -1, "image_size": {"width": 1, "height": 2}, "output_format": 3},
    "no source picture": SOURCED | {"image_url": None},
    "source picture of this machine": SOURCED | {"image_url": "http://127.0.0.1:9/a.png"},
    "source picture by file": SOURCED | {"image_url": "file:///etc/passwd"},
    "source picture that is none": SOURCED | {"image_url": data_uri(b"no picture")},
    "source picture in another format": SOURCED | {"image_url": data_uri(picture(8, 8, format="BMP"))},
    "strength 2": SOURCED | {"strength": 2},
}
JSON = {"content-type": "application/json"}
REFUSED_BODIES: dict[str, tuple[bytes, dict[str, str]]] = {
    "empty body": (b"", JSON),
    "broken JSON": (b'{"model": ', JSON),
    "array": (b"[]", JSON),
    "NaN": (b'{"seed": NaN}', JSON),
    "huge number": (b'{"seed": 1e999}', JSON),
    "lone surrogate": (b'{"prompt": "\\ud800"}', JSON),
    "other encoding": (b'{"prompt": "\xff"}', JSON),
    "deep nesting": (b"[" * 100_000, JSON),
    "another content type": (b"a=b", {"content-type": "application/x-www-form-urlencoded"}),
    "no content type": (b"{}", {}),
    "bad idempotency key": (b'{"model": "flux/srpo", "prompt": "a"}', JSON | {"idempotency-key": "k" * 256}),
}
PNG = ("a.png", picture(520, 520), "image/png")
EDIT = {"model": "flux/srpo", "prompt": PROMPT, "num_inference_steps": "2", "seed": "7", "strength": "0.8"}
EDITS: dict[str, dict[str, Any]] = {
    "edit": {"data": EDIT, "files": {"image": PNG}},
    "edit, several as b64_json": {"data": EDIT | {"n": "2", "response_format": "b64_json"}, "files": {"image[]": PNG}},
    "edit as stream": {"data": EDIT | {"stream": "true", "partial_images": "1"}, "files": {"image": PNG}},
    "edit by address": {"data": EDIT | {"image_url": SOURCED["image_url"]}, "files": {"": ("", b"")}},
    "edit with mask": {"data": EDIT, "files": {"image": PNG, "mask": PNG}},
    "edit with other file": {"data": EDIT, "files": {"image": PNG, "paper": PNG}},
    "edit of two pictures": {"data": EDIT, "files": [("image", PNG), ("image", PNG)]},
    "edit without picture": {"data": EDIT, "files": {"nothing": (None, "1")}},
    "edit with bad fields": {"data": EDIT | {"seed": "x", "n": "0"}, "files": {"image": PNG}},
    "edit of no picture": {"data": EDIT, "files": {"image": ("a.png", b"no picture", "image/png")}},
    "edit as JSON": {"json": EDIT},
    "edit, broken form": {"content": b"xx", "headers": {"content-type": "multipart/form-data; boundary=b"}},
}

OWN, FOREIGN = "http://localhost:{port}", "https://elsewhere.example"
PREFLIGHT = {"access-control-request-method": "POST", "access-control-request-headers": "x-stainless-os, authorization"}
OTHERS: dict[str, tuple[str, str, dict[str, str]]] = {
    "health, HEAD": ("HEAD", "/health", {}),
    "ready": ("GET", "/ready", {}),
    "models": ("GET", "/v1/models", {}),
    "models, short path": ("GET", "/models", {}),
    "a model": ("GET", "/v1/models/flux/srpo/image-to-image", {}),
    "its own name": ("GET", "/models/tiny", {}),
    "no such model": ("GET", "/v1/models/flux/none", {}),
    "openapi": ("GET", "/openapi.json", {}),
    "no such path": ("GET", "/v1/nothing", {}),
    "no such page": ("GET", "/playground/../secret.js", {}),
    "generations, GET": ("GET", "/v1/images/generations", {}),
    "health, DELETE": ("DELETE", "/health", {}),
    "job, PUT": ("PUT", "/v1/jobs/x", {}),
    "preflight": ("OPTIONS", "/v1/images/generations", PREFLIGHT),
    "preflight from elsewhere": ("OPTIONS", "/v1/images/generations", PREFLIGHT | {"origin": FOREIGN}),
    "read from elsewhere": ("GET", "/v1/models", {"origin": FOREIGN}),
    "post from elsewhere": ("POST", "/v1/images/generations", {"origin": FOREIGN}),
    "foreign host": ("GET", "/health", {"host": "evil.example"}),
    "forged host": ("GET", "/health", {"host": "127.0.0.1:80@elsewhere"}),
    "client id": ("GET", "/ready", {"x-client-request-id": "mine-1.2:3"}),
    "bad client id": ("GET", "/ready", {"x-client-request-id": "a b"}),
    "no such file": ("GET", "/files/" + "A" * 32 + ".png", {}),
    "file of no name": ("GET", "/files/passwd", {}),
    "no such job": ("GET", "/v1/jobs/job_x", {}),
    "no such job's events": ("GET", "/v1/jobs/job_x/events", {}),
    "no such job to cancel": ("DELETE", "/v1/jobs/job_x", {}),
    "jobs, limit 0": ("GET", "/v1/jobs?limit=0", {}),
    "jobs, unknown status": ("GET", "/v1/jobs?status=lost", {}),
    "jobs after none": ("GET", "/v1/jobs?after=job_x", {}),
}
FILES: dict[str, tuple[str, dict[str, str]]] = {
    "file": ("GET", {}),
    "file, HEAD": ("HEAD", {}),
    "file, first bytes": ("GET", {"range": "bytes=0-9"}),
    "file, last bytes": ("GET", {"range": "bytes=-5"}),
    "file, from a byte on": ("GET", {"range": "bytes=100-"}),
    "file, two ranges": ("GET", {"range": "bytes=0-1,3-4"}),
    "file, no range": ("GET", {"range": "bytes=9-3"}),
    "file, range outside": ("GET", {"range": "bytes=99999999-"}),
    "file, range of another": ("GET", {"range": "bytes=0-9", "if-range": '"other"'}),
    "file, known": ("GET", {"if-none-match": "*"}),
    "file from elsewhere": ("GET", {"origin": FOREIGN}),
    "file, DELETE": ("DELETE", {}),
}
MODULES = ("app", "client", "docs", "form", "gallery", "history", "snippets", "source", "state")
PAGES = (
    "/", "/docs", *(f"/playground/{name}.js" for name in MODULES), "/playground/icon.svg", "/playground/style.css",
    "/docs/swagger-ui-bundle.js", "/docs/swagger-ui.css",
)  # fmt: skip

COMMANDS: dict[str, tuple[list[str], dict[str, str]]] = {
    "no command": ([], {}),
    "unknown command": (["paint"], {}),
    "unknown weights command": (["weights", "paint"], {}),
    "unknown measurement": (["bench", "paint"], {}),
    "serve: unknown flag": (["serve", "--paint"], {}),
    "serve: unknown model": (["serve", "--model", "flux/none"], {}),
    "serve: unknown model in the environment": (["serve"], {"model": "flux/none"}),
    "serve: model without files": (["serve", "--model", "flux/dev", "--port", "0"], {}),
    "serve: port of another type": (["serve", "--port", "many"], {}),
    "serve: port out of range": (["serve"], {"port": "70000"}),
    "serve: open to the network": (["serve", "--host", "0.0.0.0"], {}),
    "serve: short key": (["serve"], {"api_keys": "short"}),
    "serve: no such key file": (["serve"], {"api_keys_file": "none.txt"}),
    "serve: bad success status": (["serve"], {"success_status": "202"}),
    "serve: bad public url": (["serve"], {"public_url": "ftp://x"}),
    "serve: unknown optimization": (["serve"], {"optimizations": "warp"}),
    "serve: optimizations that exclude each other": (["serve", "--optimizations", "none,rotary"], {}),
    "serve: unknown device": (["serve", "--model", "tiny", "--devices", "tpu", "--port", "0"], {}),
    "serve: unknown checker": (["serve", "--safety-checker", "magic"], {}),
    "serve: checker without files": (["serve", "--safety-checker", "folder:/none", "--model", "tiny"], {}),
    "serve: bad batch size": (["serve", "--batch-sizes", "500x500"], {}),
    "serve: half a certificate": (["serve"], {"c2pa_key": "key.pem"}),
    "serve: no such prompt list": (["serve", "--model", "tiny", "--prompt-list", "none.txt"], {}),
    "serve: no such LoRA": (["serve", "--model", "tiny", "--lora", "none.safetensors", "--port", "0"], {}),
    "serve: several problems": (["serve", "--port", "-1"], {"max_body": "12", "log_format": "xml"}),
    "generate: nothing": (["generate"], {}),
    "generate: bad parameter": (["generate", "x", "--num-inference-steps", "0", "-o", "x.png"], {"model": "tiny"}),
    "generate: no such JSONL": (["generate", "--jsonl", "none.jsonl", "-o", "out"], {"model": "tiny"}),
    "jobs: no data": (["jobs", "--data-dir", "none"], {}),
    "jobs: unknown state": (["jobs", "--state", "lost"], {}),
    "jobs: unknown verb": (["jobs", "paint"], {}),
    "verify: no such file": (["verify", "none.png"], {}),
    "weights inspect: no such file": (["weights", "inspect", "none.safetensors"], {}),
    "weights pull: unknown model": (["weights", "pull", "flux/none"], {}),
    "weights pull: licence": (["weights", "pull", "flux/srpo", "--models-dir", "models"], {}),
    "weights verify: nothing": (["weights", "verify", "flux/srpo", "--models-dir", "models"], {}),
    "keys": (["keys", "extra"], {}),
    "doctor": (["doctor", "--model", "flux/dev", "--models-dir", "models", "--port", "0"], {}),
}
