"""The start banner: its sample request works as it stands, and asks for what the served model can draw."""

import asyncio
import io
import json
import re
import socket
import subprocess
from types import SimpleNamespace
from typing import Any

from rich.console import Console
from support.server import LiveServer
from support.waiting import LIMIT, within

from pipelines.engine.base import EngineInfo
from server.cli import serve
from server.cli.terminal.banner import follow_loading, show_start
from server.settings.server import Settings
from weights.checkpoints import CHECKPOINTS, EMBEDDED


def sample_request(server: LiveServer) -> str:
    """The command below "Try it:" in what the server prints: a moment after it has become ready."""
    printed = re.compile(r"Try it:\n((?:.*\\\n)*.*[^\\\n])\n")
    assert within(LIMIT, lambda: printed.search(server.shown()) is not None), server.shown()
    found = printed.search(server.shown())
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


def make_server(**status: Any) -> Any:
    """What the banner reads of a server, with text that rich would take for its markup."""
    failed = asyncio.Event()
    failed.set()
    return SimpleNamespace(
        settings=Settings(),
        served="flux/srpo",
        keys=SimpleNamespace(needed=True),
        guard=SimpleNamespace(description={"checker": "[/safe]"}),
        store=SimpleNamespace(place="/data/[old]/images"),
        database=SimpleNamespace(shared=True, place="db.example/[srpo]"),
        pool=SimpleNamespace(failed=failed, status=lambda: SimpleNamespace(**status)),
    )


async def test_brackets_in_what_is_shown_are_no_markup() -> None:
    console = Console(file=io.StringIO(), record=True, width=200)
    info = EngineInfo("flux/srpo", "cpu", "float32", "f" * 32, "[/host]", "[fast]")
    server = make_server(state="ready", info=info, stage="")
    show_start(console, server, "http://[::1]:8000", "host-1")
    await follow_loading(console, server, "http://[::1]:8000")
    shown = console.export_text()
    for text in (
        f"flux/srpo: {CHECKPOINTS['flux/srpo'].title}",
        "[/safe]",
        "/data/[old]/images",
        "http://[::1]:8000",
        "Postgres db.example/[srpo], as host-1",
    ):
        assert text in shown
    assert "[dev]" in CHECKPOINTS["flux/srpo"].title
    assert "Placement [/host] (" in shown
    assert "Optimizations [fast]\n" in shown


async def test_brackets_in_a_failure_change_no_exit_code() -> None:
    """Of a server whose model cannot be loaded: 78, so that a supervisor does not start it again and again."""
    parts = make_server(state="failed", info=None, failure="/models/[/x].safetensors is damaged")

    class EndedServer:
        console = Console(file=io.StringIO(), record=True, width=200)
        should_exit = False

        async def serve(self, _: object) -> None: ...

    server: Any = EndedServer()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert await serve.run(server, parts, "host-1", [listener]) == serve.EXIT_CONFIG
    assert "The model cannot be loaded.\n/models/[/x].safetensors is damaged" in server.console.export_text()


def test_the_sketchs_sample_prompt_names_a_thing_that_it_knows() -> None:
    assert set(EMBEDDED.sample_prompt.split()) & set(EMBEDDED.subjects)
