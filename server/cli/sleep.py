"""`srpo sleep` and `srpo wake`: ask a running server to free its devices, or to load them again."""

import json
import time
from urllib.parse import urlsplit

import httpx2
from pydantic import Field
from pydantic_settings import SettingsConfigDict

from server.cli.terminal.failure import CommandFailed, format_error
from server.cli.terminal.parsing import parse
from server.settings.types import EnvironmentSettings, Port, is_loopback

POLL = 0.2  # seconds
TIMEOUT = 30.0  # seconds for one answer


class ServerSettings(EnvironmentSettings):
    """Where the server is, and a key of it."""

    model_config = SettingsConfigDict(populate_by_name=True)

    url: str | None = Field(None, description="the server's address; none: this machine, on the port of SRPO_PORT")
    port: Port = Field(8000, description="the server's port on this machine")
    key: str | None = Field(None, description="a key with the scope admin, where the server has keys")


class SleepSettings(ServerSettings):
    """Free the devices' memory. The next request wakes the workers, and waits until they are awake."""


class WakeSettings(ServerSettings):
    """Load what sleeps, and wait until it is ready."""

    no_wait: bool = Field(False, description="return at once")


def sleep(arguments: list[str]) -> int:
    settings = parse(SleepSettings, "sleep", arguments)
    return talk("sleep", settings, wait=False)


def wake(arguments: list[str]) -> int:
    settings = parse(WakeSettings, "wake", arguments)
    return talk("wake", settings, wait=not settings.no_wait)


def talk(verb: str, settings: ServerSettings, *, wait: bool) -> int:
    """Ask for `verb`. Returns the exit code: 1 where the state it leads to is another one. Raises `CommandFailed`."""
    headers = {"authorization": f"Bearer {settings.key}"} if settings.key else {}
    url = settings.url or f"http://127.0.0.1:{settings.port}"
    proxied = not is_loopback(urlsplit(url).hostname or "")  # HTTP_PROXY is no way to this machine, and gets no key
    try:
        with httpx2.Client(base_url=url, headers=headers, timeout=TIMEOUT, trust_env=proxied) as client:
            reply = client.post(f"/v1/admin/{verb}")
            if not reply.is_success:
                hint = " Give it with --key or SRPO_KEY." if reply.status_code in (401, 403) else ""
                raise CommandFailed(explain(reply) + hint, exit_code=1)
            state = read_state(reply)
            while wait and state == "waking":
                time.sleep(POLL)
                state = read_state(client.get("/ready"))
    except ValueError as error:
        raise CommandFailed(f"{url}: {error}") from error
    except httpx2.HTTPError as error:
        raise CommandFailed(f"no server answers at {url}: {format_error(error)}") from error
    print(state)
    return 0 if state in ("asleep", "ready", "waking") else 1


def read_state(reply: httpx2.Response) -> str:
    """What the server says of its workers. Raises `ValueError` where it is none of ours."""
    try:
        return str(reply.json()["state"])
    except (json.JSONDecodeError, KeyError, TypeError):
        raise ValueError("what answers there is no server of this kind: see --url and --port") from None


def explain(reply: httpx2.Response) -> str:
    """The server's own words, where it is one of ours."""
    try:
        return str(reply.json()["message"])
    except (json.JSONDecodeError, KeyError, TypeError):
        return f"the server answered {reply.status_code}"
