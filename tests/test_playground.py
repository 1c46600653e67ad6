"""The pages as files over HTTP; what they do in a browser is in test_browser.py."""

from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient
from support.server import LiveServer

import server
from server.api.openapi import EXAMPLES, REPLY
from server.app import create_app
from server.detailed_reply import DetailedReply
from server.schema import GenerationReply, read_body
from server.settings.server import Settings
from server.translation.aliases import translate

FOLDER = Path(server.__file__).parent / "playground" / "static"


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_a_page_needs_no_key_and_may_load_only_from_its_own_server(live_with_key: LiveServer, path: str) -> None:
    reply = httpx.get(live_with_key.url + path)
    assert reply.status_code == 200
    assert reply.headers["content-type"] == "text/html; charset=utf-8"
    policy = reply.headers["content-security-policy"]
    assert policy.startswith("default-src 'self';")
    assert "frame-ancestors 'none'" in policy
    assert "http" not in policy
    assert "://" not in reply.text


def test_every_file_of_the_playground_is_served_and_asked_for_again_cheaply(live: LiveServer) -> None:
    for file in FOLDER.iterdir():
        if file.suffix == ".html":
            continue
        url = f"{live.url}/playground/{file.name}"
        reply = httpx.get(url)
        assert (reply.status_code, reply.content) == (200, file.read_bytes()), file
        assert httpx.get(url, headers={"if-none-match": reply.headers["etag"]}).status_code == 304
        assert httpx.head(url).status_code == 200


@pytest.mark.parametrize("path", ["/playground/", "/playground/index.html", "/playground/..%2fapp.py", "/docs/x.js"])
def test_nothing_else_is_served(live: LiveServer, path: str) -> None:
    reply = httpx.get(live.url + path)
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "not_found")


@pytest.mark.parametrize(
    ("pages", "shown"),
    [
        ("none", set()),
        ("playground", {"/", "/playground/app.js", "/openapi.json"}),
        ("docs", {"/docs", "/docs/swagger-ui.css", "/playground/docs.js", "/openapi.json"}),
    ],
)
def test_pages_can_be_switched_off(tmp_path: Path, pages: str, shown: set[str]) -> None:
    paths = ("/", "/docs", "/docs/swagger-ui.css", "/playground/app.js", "/playground/docs.js", "/openapi.json")
    client = TestClient(create_app(Settings(pages=pages, data_dir=tmp_path, safety_checker="none", model="tiny")))
    found = {path for path in paths if client.get(path, headers={"host": "127.0.0.1"}).status_code == 200}
    assert found >= shown
    assert not {"/", "/docs"} & (found - shown)
    assert shown or not found


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_of_the_reference_are_valid_requests(name: str) -> None:
    example: dict[str, Any] = EXAMPLES[name]
    translated = translate(example["value"])
    assert read_body(translated.native, "tiny").prompt
    assert translated.ignored == []


def test_the_example_of_a_reply_has_every_field_of_one() -> None:
    assert GenerationReply.model_validate(REPLY).model_dump(exclude_none=True).keys() == REPLY.keys()
    assert REPLY.keys() == GenerationReply.model_fields.keys() - DetailedReply.model_fields.keys()


def test_the_reference_knows_every_route_of_jobs_and_what_they_take(live: LiveServer) -> None:
    paths = httpx.get(f"{live.url}/openapi.json").json()["paths"]

    def taken(path: str, method: str) -> set[str]:
        return {parameter["name"] for parameter in paths[path][method].get("parameters", [])}

    assert taken("/v1/images/generations", "post") == {"Prefer", "Idempotency-Key", "Webhook-URL"}
    assert taken("/v1/jobs", "get") == {"limit", "after", "status"}
    assert taken("/v1/jobs/{identity}/events", "get") == {"identity", "Last-Event-ID"}
    assert "text/event-stream" in paths["/v1/jobs/{identity}/events"]["get"]["responses"]["200"]["content"]
    assert {"get", "delete"} <= paths["/v1/jobs/{identity}"].keys()
