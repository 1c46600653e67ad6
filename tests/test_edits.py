"""POST /v1/images/edits as OpenAI's real SDKs send `images.edit`: the same as image-to-image, of an uploaded file."""

import base64
import contextlib
import io
import random
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from PIL import Image
from support.img2img import FILE, PIXELS, peak, picture, post, uri
from support.jobs import PREFER, ended
from support.node import ask
from support.pictures import file_of
from support.scripted_server import Scripted
from support.server import START_LIMIT, LiveServer

from server.images.metadata import read_marks

FIELDS: dict[str, Any] = {
    "model": "flux/srpo", "prompt": "quick", "output_format": "png", "response_format": "b64_json",
}  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scripted]:
    """Its engine returns the source picture as it came."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        with Scripted(
            tmp_path_factory.mktemp("edits"), safety_checker="none", max_body=2**21, max_upload=2**22
        ) as scripted:
            yield scripted


def edit(server: Scripted, headers: dict[str, str] | None = None, files: Any = None, **fields: Any) -> httpx.Response:
    form = {name: value for name, value in (FIELDS | fields).items() if value is not None}
    files = {"image": FILE} if files is None else files
    return httpx.post(f"{server.url}/v1/images/edits", data=form, files=files, headers=headers, timeout=START_LIMIT)


def refused(reply: httpx.Response, param: str, code: str, status: int = 400) -> str:
    error = reply.json()["error"]
    assert (reply.status_code, error["param"], error["code"]) == (status, param, code), reply.text
    return str(error["message"])


def pixels(b64: str) -> bytes:
    return Image.open(io.BytesIO(base64.b64decode(b64))).tobytes()


@pytest.mark.parametrize("listed", [False, True])
def test_the_python_sdk(server: Scripted, listed: bool) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused") as client:
        image: Any = ("picture.png", FILE, "image/png")
        reply = client.images.edit(
            **FIELDS, image=[image] if listed else image, n=2, size="1024x1024", quality="high", user="me",
            extra_body={"strength": 0.5, "num_inference_steps": 8, "enable_safety_checker": False, "seed": 7},
        )  # fmt: skip
    assert reply.data is not None
    made = [Image.open(io.BytesIO(base64.b64decode(item.b64_json or ""))) for item in reply.data]
    assert [image.tobytes() for image in made] == [PIXELS.tobytes()] * 2
    parameters = read_marks(made[1]).parameters or ""
    assert {"Steps: 8", "Denoising strength: 0.5", "Seed: 8"} <= set(parameters.split("\n")[1].split(", "))


def test_the_python_sdk_streams(server: Scripted) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused") as client:
        events = list(client.images.edit(**FIELDS, image=("picture.png", FILE), stream=True, partial_images=1))
    assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]
    assert pixels(events[-1].b64_json) == PIXELS.tobytes()
    assert isinstance(events[-1], openai.types.ImageEditCompletedEvent)


@pytest.mark.parametrize("stream", [False, True])
def test_the_node_sdk(server: Scripted, clients: str, tmp_path: Path, stream: bool) -> None:
    file = tmp_path / "picture.png"
    file.write_bytes(FILE)
    fields = {**FIELDS, "file": str(file), "strength": 0.5, "stream": stream}
    shown = ask(clients, "edit", f"{server.url}/v1", **fields)
    assert pixels(shown["images"][-1]["b64"]) == PIXELS.tobytes()
    assert [image.get("type") for image in shown["images"]] == (["image_edit.completed"] if stream else [None])


def test_a_form_and_json_draw_the_same(server: Scripted) -> None:
    form = edit(server, seed="7", strength="0.5", enable_safety_checker="false", num_inference_steps="4")
    json = post(server, strength=0.5)
    assert form.json()["data"] == json.json()["data"]
    assert "x-ignored-fields" not in form.headers
    link = edit(server, image_url=uri(FILE), files={"nothing": ("", b"")}, seed="7")
    assert picture(link).tobytes() == PIXELS.tobytes()


def test_a_picture_may_be_named_by_its_address(server: Scripted) -> None:
    reply = httpx.post(
        f"{server.url}/images/edits/",
        files={name: (None, value) for name, value in {**FIELDS, "image": uri(FILE)}.items()},
        timeout=START_LIMIT,
    )
    assert picture(reply).tobytes() == PIXELS.tobytes()


@pytest.mark.parametrize(
    ("pictures", "ignored"),
    [
        ({"images": [{"image_url": uri(FILE), "file_id": None}]}, None),
        ({"images": [{"image_url": None, "url": uri(FILE)}]}, None),
        ({"images": [{"image_url": uri(FILE), "file_id": "file-1"}]}, None),
        ({"images": [{"image_url": uri(FILE)}, {"file_id": "file-1"}]}, "image.1"),
        ({"extra_body": {"image": uri(FILE)}}, None),
    ],
)
def test_a_json_picture_is_found_beside_members_that_say_nothing(
    server: Scripted, pictures: dict[str, Any], ignored: str | None
) -> None:
    body = FIELDS | {"enable_safety_checker": False} | pictures
    reply = httpx.post(f"{server.url}/v1/images/edits", json=body, timeout=START_LIMIT)
    assert picture(reply).tobytes() == PIXELS.tobytes()
    assert reply.headers.get("x-ignored-fields") == ignored


def test_a_form_says_in_text_what_json_says_in_numbers_and_nulls(server: Scripted) -> None:
    usual = edit(server, strength="0.5", seed="7").json()["data"]
    spellings: list[dict[str, Any]]
    spellings = [{"strength": ".5"}, {"strength": "5e-1"}, {"strength": "0.5", "model": "", "guidance_scale": ""}]
    for fields in spellings:
        reply = edit(server, **{"seed": "7", **fields})
        assert reply.status_code == 201, reply.text
        assert reply.json()["data"] == usual
    assert edit(server, seed="").status_code == 201


@pytest.mark.parametrize(
    ("files", "fields", "param", "code", "words"),
    [
        ({"image": FILE, "mask": FILE}, {}, "mask", "unsupported", "leave the mask out"),
        ({"image": FILE, "style": b"x"}, {}, "style", "unsupported", "only one file"),
        ({"image": b""}, {}, "image", "unusable_image", "not a PNG"),
        ({"image": FILE[:-900]}, {}, "image", "unusable_image", "damaged"),
        ({"image": file_of(Image.new("RGB", (600, 600)), "GIF")}, {}, "image", "unusable_image", "not a PNG"),
        (None, {"prompt": None}, "prompt", "required", "received nothing"),
        (None, {"model": "dall-e-2"}, "model", "model_not_found", "flux/srpo"),
        (None, {"strength": "much"}, "strength", "invalid_number", "received 'much'"),
        (None, {"strength": "1.5"}, "strength", "invalid_number", "received 1.5"),
        (None, {"num_inference_steps": "9" * 5000}, "num_inference_steps", "invalid_integer", "5000 characters"),
        (None, {"seed": "[" * 100_000}, "seed", "invalid_integer", "100000 characters"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(
    server: Scripted, files: Any, fields: dict[str, Any], param: str, code: str, words: str
) -> None:
    assert words in refused(edit(server, files=files, **fields), param, code)


def test_a_body_that_is_no_form_is_said(server: Scripted) -> None:
    url = f"{server.url}/v1/images/edits"
    refused(httpx.post(url, json=FIELDS), "image", "required")
    plain = httpx.post(url, content=b"a picture", headers={"content-type": "text/plain"})
    assert (plain.status_code, plain.json()["error"]["code"]) == (400, "invalid_content_type")
    for kind in ("multipart/form-data", "multipart/form-data; boundary=x"):
        reply = httpx.post(url, content=b"\r\n--y\r\nnonsense", headers={"content-type": kind})
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, "invalid_form")
    field = b'--x\r\ncontent-disposition: form-data; name="prompt"\r\n\r\n!\r\n--x--\r\n'
    for charset, code in (("punycode", "invalid_form"), ("unicode_escape", "invalid_form"), ("UTF-8", "required")):
        kind = f"multipart/form-data; boundary=x; charset={charset}"
        reply = httpx.post(url, content=field, headers={"content-type": kind})
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, code)
    refused(httpx.post(url, files={"prompt": (None, "x")}), "image", "required")
    many = {f"field{number}": (None, "x") for number in range(101)}
    assert httpx.post(url, files=many).json()["error"]["code"] == "invalid_form"


def test_a_picture_may_be_larger_than_any_other_body(server: Scripted) -> None:
    noise = Image.frombytes("RGB", (1024, 1024), random.Random(1).randbytes(3 * 2**20))
    file = file_of(noise)
    assert 2**21 < len(file) < 2**22
    assert picture(edit(server, files={"image": file})).tobytes() == noise.tobytes()


@pytest.mark.parametrize(
    ("size", "fields", "words"),
    [
        (2**22 + 1, {}, "The picture is larger than 4,194,304 bytes."),
        (2**22 + 2**21, {}, "with a picture of at most 4,194,304 bytes, is larger than 6,291,456"),
        (2**26, {}, "with a picture of at most 4,194,304 bytes, is larger than 6,291,456"),
        (9, {"a": "x" * 2**20, "b": "x" * 2**20, "c": "x"}, "The form's text is larger than 2,097,152 bytes."),
        (9, {"a": "x" * (2**21 + 1)}, "The form's text is larger than 2,097,152 bytes."),
    ],
)
def test_what_is_too_large_names_its_limit(server: Scripted, size: int, fields: dict[str, Any], words: str) -> None:
    reply = edit(server, files={"image": bytes(size)}, **fields)
    assert (reply.status_code, reply.json()["error"]["code"]) == (413, "body_too_large")
    assert words in reply.json()["message"]


def test_uploads_wait_on_the_disk_and_leave_nothing_there(live: LiveServer) -> None:
    """Six pictures of 30 MiB that have not ended: 180 MiB, of which the server holds next to nothing in memory."""
    head = b'--x\r\ncontent-disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
    asking = (
        f"POST /v1/images/edits HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: {2**25}\r\n"
        "content-type: multipart/form-data; boundary=x\r\n\r\n"
    )
    Path(f"/proc/{live.process.pid}/clear_refs").write_text("5")
    before = peak(live.process.pid)
    with ExitStack() as stack:
        for _ in range(6):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", live.port)))
            connection.sendall(asking.encode() + head + bytes(30 * 2**20))
        Scripted.until(lambda: spooled(live.process.pid) >= 6 * (30 * 2**20 - 2**18))
        assert peak(live.process.pid) < before + 2**26
    Scripted.until(lambda: spooled(live.process.pid) == 0)


def spooled(pid: int) -> int:
    """The bytes of nameless files on the disk that a process has open."""
    total = 0
    for file in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed since it was listed
            name = str(file.readlink())
            total += file.stat().st_size if name.endswith("(deleted)") and not name.startswith("/memfd:") else 0
    return total


def test_a_key_of_one_route_is_another_request_on_the_other(server: Scripted) -> None:
    body = FIELDS | {"image_url": uri(FILE)}
    headers = {"idempotency-key": f"both-{random.random()}"}
    drawn, edited = (
        httpx.post(f"{server.url}/v1/images/{route}", json=body, headers=headers, timeout=START_LIMIT)
        for route in ("generations", "edits")
    )
    assert drawn.status_code == 201
    assert (edited.status_code, edited.json()["error"]["code"]) == (409, "idempotency_key_reused")


def test_an_edit_may_be_a_job_and_is_replayed_under_its_key(server: Scripted) -> None:
    job = edit(server, PREFER).json()
    assert ended(server, job["id"])["status"] == "succeeded"
    first, second, other = (
        edit(server, {"idempotency-key": "edit"}, files={"image": data}) for data in (FILE, FILE, FILE + b"x")
    )
    assert (first.status_code, second.content, other.status_code) == (201, first.content, 409)
