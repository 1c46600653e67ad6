"""TLS in front of one server: Caddy and nginx with the files of deploy/, as they are but for addresses."""

import io
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from support.nginx import find_nginx, write_configuration
from support.scripted_server import Gate, Scripted
from support.server import free_port
from support.tls import HOST, answers, make_certificate, running_caddy, trusting
from support.waiting import LIMIT, within

pytestmark = pytest.mark.operate
PATH = "/v1/images/generations"
BODY: dict[str, Any] = {"model": "flux/srpo", "prompt": "x", "image_size": "square", "num_inference_steps": 2}
MIB = 2**20


@contextmanager
def running_nginx(folder: Path, port: int, server: int) -> Iterator[Path]:
    """The example's nginx on `port`, with the TLS that its comment names. Its certificate."""
    certificate, key = make_certificate(folder)
    command = write_configuration(folder, port, [server])
    file = folder / "srpo.conf"
    listen = f"listen {HOST}:{port};"
    secured = f"listen {HOST}:{port} ssl; ssl_certificate {certificate}; ssl_certificate_key {key};"
    assert listen in file.read_text()
    file.write_text(file.read_text().replace(listen, secured))
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        assert within(LIMIT, lambda: answers(port, certificate)), (folder / "error.log").read_text()
        yield certificate
    finally:
        process.terminate()
        process.wait(LIMIT)


@contextmanager
def open_folder() -> Iterator[Path]:
    """One that nginx' workers, who are another user, can write below. pytest closes its own to them at each start."""
    with tempfile.TemporaryDirectory(prefix="srpo-proxy-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


PROXIES = {"caddy": running_caddy, "nginx": running_nginx}


@pytest.fixture(params=PROXIES)
def proxied(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[httpx.Client]:
    """A client of a scripted server, through a proxy with TLS."""
    if not (shutil.which("caddy") if request.param == "caddy" else find_nginx()):
        pytest.skip(f"no {request.param} (apt-get install {request.param})")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    port = free_port()
    url = f"https://{HOST}:{port}"
    with (
        open_folder() as folder,
        Scripted(tmp_path / "data", public_url=url) as server,
        PROXIES[request.param](folder, port, server.port) as certificate,
        httpx.Client(base_url=url, verify=trusting(certificate), timeout=LIMIT) as client,
    ):
        yield client


def test_image_addresses_lead_through_the_proxy(proxied: httpx.Client) -> None:
    reply = proxied.post(PATH, json=BODY)
    assert reply.status_code == 201
    address = reply.json()["data"][0]["url"]
    assert address.startswith(str(proxied.base_url).rstrip("/") + "/files/")
    picture = proxied.get(address)
    assert picture.headers["content-type"] == "image/jpeg"
    Image.open(io.BytesIO(picture.content)).verify()
    part = proxied.get(address, headers={"range": "bytes=0-9"})
    assert (part.status_code, part.content) == (206, picture.content[:10])


def test_an_event_arrives_when_it_happens(proxied: httpx.Client, tmp_path: Path) -> None:
    """The second step is not allowed before the first one has been heard of."""
    gate = Gate(tmp_path / "gate")
    gate.allow(1)
    with proxied.stream("POST", PATH, json=BODY | {"prompt": gate.prompt, "stream": True}) as reply:
        lines = (line for line in reply.iter_lines() if line.startswith("data: "))
        assert any('"step":1' in line for line in lines)
        gate.allow(2)
        assert '"image_generation.completed"' in list(lines)[-1]


def test_a_large_picture_passes_and_one_that_is_too_large_does_not(proxied: httpx.Client) -> None:
    with io.BytesIO() as file:
        Image.effect_noise((512, 512), 50).convert("RGB").save(file, "png")
        picture = file.getvalue()
    form = {"prompt": "x", "num_inference_steps": "2"}

    def send(padding: int) -> int:
        files = {"image": ("a.png", picture + bytes(padding), "image/png")}
        return proxied.post("/v1/images/edits", data=form, files=files).status_code

    assert send(20 * MIB) == 201
    with suppress(httpx.TransportError):  # a proxy may answer before it has read all, and close
        assert send(60 * MIB) == 413


def test_a_refusal_keeps_its_form_and_advice(proxied: httpx.Client) -> None:
    reply = proxied.post(PATH, json=BODY | {"num_inference_steps": 99}, headers={"x-client-request-id": "mine"})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "num_inference_steps"
    assert reply.headers["x-client-request-id"] == "mine"
    assert reply.json()["requestId"] == reply.headers["x-request-id"]
