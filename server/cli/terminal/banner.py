"""The start banner: what is served, where, to whom, and a first request to paste."""

import asyncio
import json
import time

from rich.console import Console
from rich.table import Table
from rich.text import Text

from server.settings.engine import EngineSettings
from server.settings.server import Settings
from server.state import AppState
from weights.checkpoints import CHECKPOINTS, HOSTED_MODEL


def format_address(settings: Settings, port: int, own: bool = False) -> str:
    """The server's address to show and to paste. `own`: as this machine reaches it, whatever clients call it."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)  # noqa: S104 - shown, not bound
    host = f"[{host}]" if ":" in host else host
    return settings.public_url if settings.public_url and not own else f"http://{host}:{port}"


def show_start(console: Console, server: AppState, address: str, replica: str) -> None:
    """Print what is about to be served. `replica`: this server's name among those that share its database."""
    settings, row = server.settings, CHECKPOINTS[server.served]
    rows = {
        "model": f"{row.id}: {row.title}",
        "licence": row.licence,
        "address": address,
        "keys": describe_access(settings, server.keys.needed),
        "safety": ", ".join(f"{name} {value}" for name, value in server.guard.description.items()),
        "images": f"{server.store.place}, kept for {settings.images_expire / 3600:g} h",
    }
    if server.database.shared:
        rows["jobs"] = f"Postgres {server.database.place}, as {replica}"
    table = Table.grid(padding=(0, 2))
    for name, text in rows.items():
        table.add_row(name, Text(text))  # not as markup: [dev] in a title is a word
    console.print("[bold]srpo[/] FLUX image server", table, sep="\n")
    if row.embedded:
        console.print(
            Text(f"{describe_substitute(settings, row.id)} Every reply says so (x-served-model).", "yellow"),
            soft_wrap=True,
        )
    if server.guard.description["checker"] == "none":
        console.print(
            "[red]No image is checked before it is shown. FLUX.1's licence for \\[dev] makes content filters, or a "
            "review of every output, a condition of use.[/]",
            soft_wrap=True,
        )
    if not settings.is_loopback and settings.public_url is None:
        console.print(
            "[yellow]SRPO_PUBLIC_URL is not set: image URLs begin with the address a connection arrived at, which "
            "clients behind a proxy or outside a container cannot reach.[/]",
            soft_wrap=True,
        )


def describe_substitute(settings: EngineSettings, model: str) -> str:
    """The sentence that says which model answers in place of SRPO, and why."""
    missing = f"No {HOSTED_MODEL} weights in {settings.models_dir.absolute()}"
    reason = missing if settings.model == "auto" else f"As --model {settings.model} says"
    return f"{reason}: the embedded model {model} answers in place of {HOSTED_MODEL}."


def describe_access(settings: Settings, needs_key: bool) -> str:
    """Whether a request needs a key, and who can send one if not."""
    if needs_key:
        return "required"
    alone = settings.is_loopback and settings.public_url is None
    return "none: open to this machine only" if alone else "none: open to everyone who can reach the address"


async def follow_loading(console: Console, server: AppState, address: str) -> None:
    """Print the stages of loading, then a command that asks for a first image."""
    start, shown = time.monotonic(), ""
    while (status := server.pool.status()).state == "loading":
        if status.stage != shown:
            shown = status.stage
            console.print(f"  {shown} ...", markup=False)
        await asyncio.sleep(0.1)
    if status.state != "ready" or status.info is None:
        return
    info = status.info
    text = (
        f" after {time.monotonic() - start:.1f} s: {info.model} on {info.device}, {info.dtype}, "
        f"fingerprint {info.fingerprint}\n"
        f"Placement {info.placement} (--placement chooses another)\n"
        f"Optimizations {info.optimizations}\n"
        f"Try it:\n{format_curl(address, CHECKPOINTS[server.served].sample_prompt, server.keys.needed)}"
    )
    console.print(Text.assemble(("Ready", "green"), text), soft_wrap=True)


def show_stopping(console: Console, server: AppState) -> None:
    """Print how many requests the server still finishes after a signal to stop."""
    status = server.pool.status()
    if count := status.running + status.waiting:
        requests = "1 request" if count == 1 else f"{count} requests"
        console.print(f"Stopping: {requests} in flight may take {server.settings.shutdown_grace} s more ...")


def format_curl(address: str, prompt: str, needs_key: bool) -> str:
    """A first request to paste into a shell."""
    key = "  -H 'Authorization: Bearer YOUR_KEY' \\\n" if needs_key else ""
    body = json.dumps({"model": HOSTED_MODEL, "prompt": prompt})
    return f"curl {address}/v1/images/generations \\\n{key}  -H 'Content-Type: application/json' \\\n  -d '{body}'"
