"""Durable jobs as a client polls and watches them."""

import json
import time
from typing import Any

import httpx
from support.server import START_LIMIT

from server.jobs.models import JobRecord
from server.schema import JobReply

PREFER = {"prefer": "respond-async"}


KEYS = ("first-key", "second-key")


def call(server: Any, method: str, path: str, key: str = KEYS[0], **options: Any) -> httpx.Response:
    headers = {"authorization": f"Bearer {key}"} | options.pop("headers", {})
    return httpx.request(method, server.url + path, headers=headers, timeout=START_LIMIT, **options)


def ended(server: Any, identity: str) -> dict[str, Any]:
    deadline = time.monotonic() + START_LIMIT
    while (job := call(server, "GET", f"/v1/jobs/{identity}").json())["status"] in ("queued", "running"):
        assert time.monotonic() < deadline, job
        time.sleep(0.01)
    JobReply.model_validate(job)
    return job


def events_of(reply: httpx.Response) -> list[tuple[str, str, Any]]:
    """(id, name, data) of every event."""
    blocks = [dict(line.split(": ", 1) for line in block.split("\n")) for block in reply.text.split("\n\n") if block]
    return [(block.get("id", ""), block["event"], json.loads(block["data"])) for block in blocks]


def record(name: str, **fields: Any) -> JobRecord:
    return JobRecord(name, "", None, "hash", {"spoken": {"native": {"prompt": "secret"}}}, created=1.0, **fields)
