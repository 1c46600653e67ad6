"""What `bench.behaviour` does with a version of the server, one function a scenario; and the old data folder."""

import json
import os
import re
import sqlite3
import struct
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from bench.behaviour import requests as table
from bench.behaviour.server import EDITS, GENERATIONS, Live, Recording, describe_image, strip_volatile, wait_until

ASYNC = {"prefer": "respond-async"}
OPTIMIZATIONS = (
    "texts,rotary,modulation,attention"  # all that a CPU can do without a compiler; the last is measured once
)
KEYS = ("first-secret-key", "second-secret-key")


def draw(
    live: Live, name: str, headers: Mapping[str, str] | None = None, path: str = GENERATIONS, **fields: Any
) -> Any:
    """A recorded request for images. Returns the reply's JSON, None where it is none."""
    reply = live.ask(name, "POST", path, json={**table.BASE, **fields}, headers=dict(headers or {}))
    return reply.json() if reply.headers.get("content-type", "") == "application/json" else None


def run_commands(recording: Recording) -> None:
    """Help texts of all commands, refused command lines and settings, and commands that need no server."""
    record_help(recording, [])
    for name, (arguments, settings) in table.COMMANDS.items():
        recording.command(f"command: {name}", arguments, **settings)
    recording.command("command: keys, one", ["keys"])
    recording.command("command: selfcheck", ["selfcheck", "--model", "tiny", "--data-dir", "checked"])
    recording.command("command: selfcheck, again", ["selfcheck", "--model", "tiny", "--data-dir", "checked"])
    drawing = ["generate", "--model", "tiny", "--image-size", "square", "--num-inference-steps", "2", "--seed", "7"]
    recording.command("command: generate", [*drawing, "a red apple", "-o", "apple.png"])
    recording.command("command: generate, several", [*drawing, "a red apple", "--num-images", "2", "-o", "two.webp"])
    (recording.folder / "requests.jsonl").write_text(
        '{"prompt": "one", "seed": 1}\n{"prompt": "two", "seed": 2, "image": "apple.png", "strength": 0.5}\n'
    )
    for name in ("generate, JSONL", "generate, JSONL again"):
        recording.command(f"command: {name}", [*drawing[:-2], "--jsonl", "requests.jsonl", "-o", "drawn"])
    recording.command("command: verify", ["verify", "apple.png", *sorted(map(str, find_images(recording.folder)))])
    for path in find_images(recording.folder):
        recording.add(f"drawn by a command: {path}", describe_image((recording.folder / path).read_bytes()))
    write_safetensors(recording.folder / "some.safetensors")
    recording.command("command: weights inspect", ["weights", "inspect", "some.safetensors", "--json"])


def record_help(recording: Recording, command: list[str]) -> None:
    """The help of a command and of those that it lists."""
    shown = recording.command(f"help: {' '.join(['srpo', *command])}", [*command, "--help"])
    listed = re.search(r"^(?:commands|measurements):\n((?:  .*\n)+)", shown, re.MULTILINE)
    for line in listed[1].splitlines() if listed else ():
        if line[2] != " ":
            record_help(recording, [*command, line.split()[0]])


def find_images(folder: Path) -> list[Path]:
    return sorted(
        path.relative_to(folder) for kind in ("png", "webp", "jpeg", "jpg") for path in folder.rglob(f"*.{kind}")
    )


def write_safetensors(file: Path) -> None:
    """A file of one tensor that fits no model."""
    header = json.dumps({"some.weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))


def serve_sketch(recording: Recording) -> None:
    """The embedded model, with every optimization that is not exact and needs no compiler."""
    with recording.server("sketch", {"model": "flux/sketch", "optimizations": OPTIMIZATIONS}) as live:
        record_engine(live)
        for name, fields in table.IMAGES.items():
            draw(live, name, **fields)
        draw(live, "stream", stream=True, partial_images=2, num_inference_steps=8)
        for name in ("health, HEAD", "models", "openapi"):
            method, path, headers = table.OTHERS[name]
            live.ask(name, method, path, headers=headers)


def serve_tiny(recording: Recording) -> None:
    """The defaults, as far as they are not the model; and a second start on the same data."""
    with recording.server("tiny", {}) as live:
        record_engine(live)
        for name, fields in (table.IMAGES | table.MORE_IMAGES | table.REFUSED).items():
            draw(live, name, **fields)
        for path in (f"{GENERATIONS}/", "/images/generations", "/images/generations/", "//v1//images/generations"):
            draw(live, f"generations at {path}", path=f"http://127.0.0.1:{live.port}{path}")
        for name, (content, headers) in table.REFUSED_BODIES.items():
            live.ask(name, "POST", GENERATIONS, content=content, headers=headers)
        live.ask("large body", "POST", GENERATIONS, content=b" " * (2**24 + 1), headers=table.JSON)
        live.ask_raw("no HTTP", b"HELLO\r\n\r\n")
        live.ask_raw("no host", b"GET /health HTTP/1.1\r\n\r\n")
        for name, options in table.EDITS.items():
            live.ask(name, "POST", EDITS, **options)
        for name, (method, path, headers) in table.OTHERS.items():
            live.ask(name, method, path, headers=headers)
        own = {"origin": f"http://127.0.0.1:{live.port}"}
        live.ask("preflight from its own page", "OPTIONS", GENERATIONS, headers=table.PREFLIGHT | own)
        draw(live, "post from its own page", headers=own | {"x-client-request-id": "mine"})
        for path in table.PAGES:
            reply = live.ask(f"page {path}", "GET", path)
            live.ask(f"page {path}, known", "HEAD", path, headers={"if-none-match": reply.headers["etag"]})
        url = draw(live, "stored", output_format="png")["images"][0]["url"]
        for name, (method, headers) in table.FILES.items():
            live.ask(name, method, url, headers=headers)
        stream(live)
        manage_jobs(live)
        seed = live.send("POST", GENERATIONS, json={**table.BASE, "seed": None}).json()["seed"]
        recording.add("tiny: a seed is drawn", 0 < seed < 2**31)
        live.ask("health at the end", "GET", "/health")
        name, arguments = "command: serve: data folder in use", ["serve", "--data-dir", str(live.data), "--port", "0"]
        recording.command(name, arguments, model="tiny")
        recording.command("command: jobs, running server", ["jobs", "--data-dir", str(live.data), "--limit", "0"])
    record_data(recording, "tiny", live.data)
    restart(recording, live.data, url)


def record_engine(live: Live) -> None:
    health = live.ask("health", "GET", "/health").json()
    live.recording.add(f"{live.name}: fingerprint", health["fingerprint"])


def stream(live: Live) -> None:
    """Server-sent events, with and without previews, for browsers and for OpenAI's SDKs."""
    plan: dict[str, Any] = {"stream": True, "num_inference_steps": 8}
    draw(live, "stream", **plan)
    draw(live, "stream, previews of two", **plan, partial_images=3, num_images=2)
    draw(live, "stream, sharp previews", **plan, partial_images=1, enable_safety_checker=False, output_format="webp")
    draw(live, "stream for an SDK", headers={"accept": "application/json"}, **plan, partial_images=1)
    draw(live, "stream, sync_mode", **plan, sync_mode=True)
    draw(live, "stream, b64_json", **plan, response_format="b64_json")
    draw(live, "stream, refused", **plan, seed=0)


def manage_jobs(live: Live) -> None:
    """Durable jobs: accepted, watched, listed, cancelled; and idempotency on both roads."""
    accepted = draw(live, "job", ASYNC, num_inference_steps=4, partial_images=1)
    live.wait_job(accepted["id"])
    live.ask("job, ended", "GET", f"/v1/jobs/{accepted['id']}")
    live.ask("job, events", "GET", f"/v1/jobs/{accepted['id']}/events")
    live.ask("job, cancelled too late", "DELETE", f"/v1/jobs/{accepted['id']}")
    large = draw(live, "large job", ASYNC, **table.LARGE)
    wait_until(lambda: live.health()["running"] == 1, "a running job")
    live.ask("jobs, running", "GET", "/v1/jobs?status=running")
    live.ask("large job, cancelled", "DELETE", f"/v1/jobs/{large['id']}")
    live.ask("large job, events", "GET", f"/v1/jobs/{large['id']}/events")
    key = {"idempotency-key": "key 1"}
    draw(live, "key", key)
    draw(live, "key, replayed", key)
    draw(live, "key, replayed as job", key | ASYNC)
    draw(live, "key, replayed as stream", key, stream=True)
    draw(live, "key, with another body", key, seed=8)
    streamed = {"idempotency-key": "key 2"}
    draw(live, "stream with key", streamed, stream=True, partial_images=1, num_inference_steps=8)
    draw(live, "stream with key, replayed", streamed, stream=True, partial_images=1, num_inference_steps=8)
    name, options = "job of an edit", table.EDITS["edit"]
    edit = live.ask(name, "POST", EDITS, **options, headers=ASYNC).json()
    live.wait_job(edit["id"])
    live.ask(f"{name}, ended", "GET", f"/v1/jobs/{edit['id']}")
    page = live.ask("jobs, first page", "GET", "/v1/jobs?limit=2").json()
    live.ask("jobs, second page", "GET", f"/v1/jobs?limit=2&after={page['next_cursor']}")
    live.ask("jobs, cancelled", "GET", "/v1/jobs?status=cancelled")


def restart(recording: Recording, data: Path, url: str) -> None:
    """The same data in a second run: what was finished is there, and what is old has expired."""
    with closing(sqlite3.connect(data / "jobs.sqlite3")) as connection, connection:
        oldest = connection.execute("select id from jobs order by number").fetchone()[0]
        connection.execute("update jobs set finished = finished - 1e6 where id = ?", (oldest,))
    path = url[url.index("/files/") :]
    with recording.server("restarted", {}, data) as live:
        draw(live, "key, replayed", {"idempotency-key": "key 1"})
        live.ask("file", "GET", path)
        wait_until(lambda: live.send("GET", f"/v1/jobs/{oldest}").status_code == 410, "an expired job")
        live.ask("expired job", "GET", f"/v1/jobs/{oldest}")
        for file in (data / "images").glob("*/*"):
            os.utime(file, (1e9, 1e9))
        live.ask("expired file", "GET", path)
        live.ask("jobs", "GET", "/v1/jobs")


def record_data(recording: Recording, name: str, data: Path) -> None:
    """The layout of a data folder, of its database and of `engine.json`."""
    files = {re.sub(r"[A-Za-z0-9_-]{32}(?=\.\w+$)", "<name>", file.name) for file in data.rglob("*") if file.is_file()}
    recording.add(f"{name}: files of the data folder", sorted(files))
    recording.add(f"{name}: engine.json", strip_volatile(json.loads((data / "engine.json").read_text())))
    with closing(sqlite3.connect(data / "jobs.sqlite3")) as connection:
        schema = [row[0] for row in connection.execute("select sql from sqlite_master order by type, name")]
        version = connection.execute("select * from alembic_version").fetchall()
        journal = connection.execute("pragma journal_mode").fetchone()
    recording.add(f"{name}: database", {"schema": schema, "alembic": version, "journal": journal})


def serve_with_keys(recording: Recording) -> None:
    """Keys, a public address, and other settings of delivery."""
    settings = {
        "api_keys": ",".join(KEYS), "public_url": "https://images.example/", "success_status": "200",
        "optimizations": "none",
        "previews": "sharp", "no_fetch": "true", "omit_parameters": "true", "jpeg_quality": "60", "log_prompts": "true",
        "credits_per_megapixel": "10", "safety_checker": "none", "log_format": "json", "safety_policy": "always",
    }  # fmt: skip
    with recording.server("keys", settings) as live:
        draw(live, "no key")
        draw(live, "wrong key", {"authorization": "Bearer wrong-key"})
        draw(live, "other scheme", {"authorization": f"Basic {KEYS[0]}"})
        live.ask("jobs, no key", "GET", "/v1/jobs")
        live.ask("models, no key", "GET", "/v1/models")
        live.ask(
            "preflight from elsewhere", "OPTIONS", GENERATIONS, headers=table.PREFLIGHT | {"origin": table.FOREIGN}
        )
        live.headers = {"authorization": f"Bearer {KEYS[0]}"}
        record_engine(live)
        draw(live, "image", {"origin": table.FOREIGN}, num_inference_steps=4)
        draw(live, "unchecked image", enable_safety_checker=False)
        draw(live, "source picture not fetched", **table.SOURCED | {"image_url": "https://example.com/a.png"})
        draw(live, "stream", stream=True, partial_images=1, num_inference_steps=4)
        job = draw(live, "job", ASYNC)
        live.wait_job(job["id"])
        live.ask("job, ended", "GET", f"/v1/jobs/{job['id']}")
        live.headers = {"authorization": f"Bearer {KEYS[1]}"}
        live.ask("job of another key", "GET", f"/v1/jobs/{job['id']}")
        live.ask("jobs of another key", "GET", "/v1/jobs")


def leave_data(recording: Recording, data: Path) -> None:
    """A data folder with images and jobs in every state, whose server was killed at work."""
    job: dict[str, Any] = {"num_inference_steps": 50, "image_size": "landscape_4_3", "num_images": 2}
    with recording.server("old", {"optimizations": OPTIMIZATIONS}, data) as live:
        draw(live, "image")
        draw(live, "key", {"idempotency-key": "old key"}, response_format="b64_json")
        for name, fields in {"job": {"num_images": 2}, "job with source": table.SOURCED}.items():
            live.wait_job(draw(live, name, ASYNC, **fields)["id"])
        cancelled = draw(live, "cancelled", ASYNC, **table.LARGE)
        live.send("DELETE", f"/v1/jobs/{cancelled['id']}")
        draw(live, "running", ASYNC, **job)
        draw(live, "running, with previews", ASYNC | {"idempotency-key": "unfinished"}, **job, partial_images=2)
        draw(live, "waiting", ASYNC, **table.SOURCED | {"num_inference_steps": 28, "acceleration": "high"})
        live.ask("waiting edit", "POST", EDITS, **table.EDITS["edit"], headers=ASYNC)
        wait_until(lambda: live.health()["running"] > 0, "running jobs")
        time.sleep(0.5)
        live.stop(kill=True)


def open_data(recording: Recording, data: Path) -> None:
    """Serve an old data folder to the end of its jobs."""
    recording.command("jobs before", ["jobs", "--data-dir", str(data), "--json"])
    engine = data / "engine.json"
    before = (engine.read_bytes(), engine.stat().st_mtime_ns)
    images = [path.name for path in find_images(data)]
    with recording.server("opened", {"optimizations": OPTIMIZATIONS}, data) as live:
        recording.add("opened: fingerprint", live.health()["fingerprint"])
        recording.add("engine.json was left as it was", before == (engine.read_bytes(), engine.stat().st_mtime_ns))
        for number, image in enumerate(sorted(images)):
            live.ask(f"old image {number}", "GET", f"/files/{image}")
        draw(live, "key, replayed", {"idempotency-key": "old key"}, response_format="b64_json")
        for number, job in enumerate(reversed(live.send("GET", "/v1/jobs?limit=100").json()["data"]), 1):
            live.wait_job(job["id"])
            live.ask(f"job {number}", "GET", f"/v1/jobs/{job['id']}")
        live.ask("jobs", "GET", "/v1/jobs?limit=100")
    record_data(recording, "opened", data)
