"""The start banner: its sample request works as it stands, and asks for what the served model can draw."""

import json
import re
import subprocess
from typing import Any

from support.server import LiveServer
from support.waiting import LIMIT, within

from weights.checkpoints import CHECKPOINTS, EMBEDDED


def sample_request(server: LiveServer) -> str:
    """The command below "Try it:" in what the server prints: a moment after it has become ready."""
    printed = re.compile(r"Try it:\n((?:.*\\\n)*.*[^\\\n])\n")
    assert within(LIMIT, lambda: printed.search(server.log.read_text()) is not None), server.log.read_text()
    found = printed.search(server.log.read_text())
    assert found is not None
    return found[1]


def paste(command: str) -> dict[str, Any]:
    ended = subprocess.run(["bash", "-c", f"{command} --silent --fail"], capture_output=True, text=True, check=True)
    reply: dict[str, Any] = json.loads(ended.stdout)
    return reply


def test_the_sample_request_draws_an_image_as_it_is_printed(live: LiveServer) -> None:
    command = sample_request(live)
    assert CHECKPOINTS["tiny"].sample_prompt in command
    assert len(paste(command)["images"]) == 1


def test_where_keys_are_required_the_sample_request_says_where_to_put_one(live_with_key: LiveServer) -> None:
    command = sample_request(live_with_key)
    assert len(paste(command.replace("YOUR_KEY", "secret-key-1"))["images"]) == 1


def test_the_sketchs_sample_prompt_names_a_thing_that_it_knows() -> None:
    assert set(EMBEDDED.sample_prompt.split()) & set(EMBEDDED.subjects)
