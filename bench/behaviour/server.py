"""A running server seen from outside, and recordings of what it answers, without what differs at every run."""

import base64
import hashlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
LIMIT = 180.0  # seconds for anything that is waited for
VOLATILE = {
    "created", "created_at", "finished_at", "timestamp", "eta", "eta_seconds", "pid", "worker_pids", "ms", "progress",
    "step", "queue_position", "waiting",
}  # fmt: skip
VOLATILE_HEADERS = {"date", "content-length", "retry-after", "retry-after-ms"}
SUBSTITUTIONS = (
    (r"job_[0-9a-f]{32}", "job_<id>"),
    (r"\b[0-9a-f]{32}\b", "<id>"),  # request ids and engine fingerprints
    (r"(?<![A-Za-z0-9_-])[A-Za-z0-9_-]{32}(?=\.(?:jpeg|png|webp)\b)", "<name>"),
    (r'^"[A-Za-z0-9_-]{32}"$', '"<name>"'),  # the ETag of an image
    (r"https?://(?:127\.0\.0\.1|localhost):\d+", "<address>"),
    (r"127\.0\.0\.1:\d+", "<address>"),
    (r"max-age=\d+", "max-age=<seconds>"),
    (r"(after|again in) \d+(\.\d)? s\b", r"\1 <number> s"),
    (r"\d+% done", "<number>% done"),
    (r"pid \d+", "pid <number>"),
    (r"sk-[A-Za-z0-9_-]{43}", "<key>"),
    (r"\bsha256:[0-9a-f]{64}", "sha256:<digest>"),
    (r"^([a-z_0-9]+\.)+(?=[A-Z]\w+: )", ""),  # an exception's module
    (r"\d+(\.\d+)? (?=(GB|GiB|MB|MiB)\b)", "<number> "),
    (r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|\+00:00)", "<time>"),
)
NOISE = re.compile(
    r".*(Failed to load .*torchao|torchvision. \(not installed|import `torchao`|Warning: )"  # libraries' warnings
    r"|[WI]\d{4} |\s*warnings\.warn"
    r"|  \S.* \.\.\.$"  # stages of loading
    r"|Traceback |  File |    .*"  # and what belongs to a traceback
)


def strip_volatile(value: Any, key: str = "") -> Any:
    """A JSON value with fixed words in the place of times, identifiers, addresses and images' bytes."""
    if isinstance(value, dict):
        if value.get("object") == "job" and value.get("status") in ("queued", "running"):
            value = {name: part for name, part in value.items() if name != "progress"} | {"status": "unfinished"}
        if key == "timings":
            return {name: "<seconds>" if isinstance(part, float | int) else part for name, part in value.items()}
        return {substitute(name): strip_volatile(part, name) for name, part in value.items()}
    if isinstance(value, list):
        return [strip_volatile(part, key) for part in value]
    if isinstance(value, str):
        data = value.partition(",")[2] if value.startswith("data:image/") else value if key == "b64_json" else ""
        if data:
            return {"prefix": value[: -len(data)], **describe_image(base64.b64decode(data))}
        return "<volatile>" if key in VOLATILE else substitute(value)
    return "<volatile>" if key in VOLATILE and value is not None and not isinstance(value, bool) else value


def substitute(text: str) -> str:
    for pattern, word in SUBSTITUTIONS:
        text = re.sub(pattern, word, text)
    return text


def lines_of(text: str) -> list[str]:
    """Lines of a log, without libraries' warnings, passing stages of loading, and all but the end of tracebacks."""
    return [substitute(line).rstrip() for line in text.splitlines() if not NOISE.match(line)]


def kind_of_line(entry: dict[str, Any]) -> str:
    """What a line of the log is about, and the names of its members."""
    event = substitute(entry["event"].partition("\n")[0])
    return f"{entry['level']} {event}: {', '.join(sorted(entry))}"


def describe_image(data: bytes) -> dict[str, Any]:
    """The digests of a file and of its pixels: equal pixels in another file mean that only its metadata changed."""
    with Image.open(io.BytesIO(data)) as image:
        pixels = hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()
        return {"sha256": hashlib.sha256(data).hexdigest(), "pixels": pixels, "size": f"{image.format} {image.size}"}


def describe_body(data: bytes, content_type: str) -> Any:
    if content_type.startswith("application/json") and data:
        return strip_volatile(json.loads(data))
    if content_type.startswith("text/event-stream"):
        return describe_events(data.decode())
    if content_type.startswith("image/") and "svg" not in content_type:
        try:
            return describe_image(data)
        except OSError:  # a part of a file
            pass
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def describe_events(text: str) -> dict[str, Any]:
    """Server-sent events. How many progress events arrive depends on the reader, so only their stages count."""
    events: list[Any] = []
    stages: dict[str, None] = {}
    progress: dict[str, Any] = {}
    numbers = []
    for block in filter(None, text.replace("\r\n", "\n").split("\n\n")):
        parts = dict(line.split(": ", 1) for line in block.split("\n"))
        comment = parts.get("", "")
        if "id" in parts:
            numbers.append(int(parts["id"].rpartition("-")[2]))
        if comment.startswith("progress "):
            data, name = json.loads(comment[len("progress ") :]), "comment"
        elif not comment:
            data, name = json.loads(parts["data"]), parts["event"]
        else:
            continue
        if name == "comment" or name.endswith(".progress"):
            stages[f"{name} {data['stage']} {data['image_index']}"] = None
            progress = {**strip_volatile(data), "stage": "<stage>", "image_index": "<index>"}
        else:
            events.append({"event": name, "id": "id" in parts, "data": strip_volatile(data)})
    passing = ("queued", "text")  # stages that are over before a reader has connected
    shown = sorted(stage for stage in stages if stage.split()[1] not in passing)
    form = {"ids rise": numbers == sorted(set(numbers)), "CRLF": "\r\n" in text}
    return {"stages": shown, "progress": progress, "events": events, **form}


class Recording:
    """What was seen, by the names of requests and commands."""

    def __init__(self, executable: Path, folder: Path) -> None:
        self.executable = executable
        self.folder = folder
        self.records: dict[str, Any] = {}

    def add(self, name: str, value: Any) -> None:
        if name in self.records:
            raise ValueError(f"{name} is recorded twice")
        self.records[name] = value

    def environment(self, settings: Mapping[str, str]) -> dict[str, str]:
        """Only what is named here reaches the server: one thread (other numbers draw other bits), a fixed width."""
        passed = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        fixed = {"OMP_NUM_THREADS": "1", "COLUMNS": "160", "NO_COLOR": "1", "TERM": "dumb"}
        return passed | fixed | {f"SRPO_{name.upper()}": value for name, value in settings.items()}

    def command(self, name: str, arguments: list[str], **settings: str) -> str:
        """Run `srpo ARGUMENTS` in the scratch folder, and record the exit code and the output. Returns the output."""
        ended = subprocess.run(
            [self.executable, *arguments], env=self.environment(settings), cwd=self.folder, capture_output=True,
            text=True, timeout=LIMIT, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        out, err = (text.replace(str(self.folder), "<folder>") for text in (ended.stdout, ended.stderr))
        shown = [substitute(line).rstrip() for line in out.splitlines()]
        self.add(name, {"exit": ended.returncode, "stdout": shown, "stderr": lines_of(err)})
        return ended.stdout

    @contextmanager
    def server(
        self, name: str, settings: Mapping[str, str], data: Path | None = None, *, wait: bool = True
    ) -> Iterator["Live"]:
        """A running server, on `data` or on a folder of its own.

        Its banner and the kinds of its log lines are recorded when it has stopped.
        """
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        data = data or self.folder / name
        log = self.folder / f"{name}.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                [self.executable, "serve", "--port", str(port), "--data-dir", str(data)],
                env=self.environment({"model": "tiny", **settings}), cwd=self.folder, stdout=out, stderr=out,
            )  # fmt: skip
        live = Live(self, name, port, process, data)
        try:
            if wait:
                live.wait_ready()
            yield live
        finally:
            live.stop()
            self._record_log(name, log.read_text(), process.returncode)

    def _record_log(self, name: str, log: str, code: int) -> None:
        text = log.replace(str(self.folder), "<folder>")
        entries = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
        kinds = {kind_of_line(entry) for entry in entries}
        banner = [line for line in lines_of(text) if not line.startswith("{")]
        self.add(f"{name}: log", {"exit": code, "banner": banner, "kinds of lines": sorted(kinds)})


class Live:
    """A server that runs. Requests are recorded under their name."""

    def __init__(
        self, recording: Recording, name: str, port: int, process: subprocess.Popen[bytes], data: Path
    ) -> None:
        self.recording, self.name, self.port, self.process, self.data = recording, name, port, process, data
        self.headers: dict[str, str] = {}  # sent with every request
        self._client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=LIMIT)
        self._threads = ThreadPoolExecutor(4)

    def send(self, method: str, path: str, **options: Any) -> httpx.Response:
        """A request that is not recorded."""
        headers = self.headers | options.pop("headers", {})
        return self._client.request(method, path, headers=headers, **options)

    def ask(self, name: str, method: str, path: str, **options: Any) -> httpx.Response:
        reply = self.send(method, path, **options)
        self._record(name, reply.status_code, reply.reason_phrase, reply.headers.multi_items(), reply.content)
        return reply

    def ask_meanwhile(self, name: str, method: str, path: str, **options: Any) -> "Future[httpx.Response]":
        return self._threads.submit(self.ask, name, method, path, **options)

    def ask_raw(self, name: str, request: bytes) -> None:
        """Bytes that no HTTP client would send."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=LIMIT) as connection:
            connection.sendall(request)
            reply = HTTPResponse(connection)
            reply.begin()
            self._record(name, reply.status, reply.reason, reply.getheaders(), reply.read())

    def _record(self, name: str, status: int, reason: str, headers: list[tuple[str, str]], body: bytes) -> None:
        shown: dict[str, str] = {}
        for field, value in sorted((field.lower(), value) for field, value in headers):
            known = "<volatile>" if field in VOLATILE_HEADERS else substitute(value)
            shown[field] = f"{shown[field]} | {known}" if field in shown else known
        described = describe_body(body, shown.get("content-type", "")) if body else None
        record = {"status": f"{status} {reason}", "headers": shown, "body": described}
        if isinstance(described, dict) and "images" in described.get("reply", described):
            whole = json.loads(body)
            urls = [image.get("url", "") for image in whole.get("reply", whole)["images"]]
            paths = [url[url.index("/files/") :] for url in urls if "/files/" in url]
            record["files"] = [describe_image(self.send("GET", path).content) for path in paths]
        self.recording.add(f"{self.name}: {name}", record)

    def health(self) -> dict[str, Any]:
        health: dict[str, Any] = self.send("GET", "/health").json()
        return health

    def wait_ready(self) -> None:
        wait_until(lambda: self.process.poll() is not None or self._answers("/ready"), "ready")
        if self.process.poll() is not None:
            raise RuntimeError(f"{self.name}: the server ended with {self.process.returncode}; see its log")

    def wait_answering(self) -> None:
        wait_until(lambda: self._answers("/health"), "answering")

    def _answers(self, path: str) -> bool:
        try:
            return self._client.get(path).status_code == 200
        except httpx.TransportError:
            return False

    def wait_job(self, identity: str) -> None:
        """Wait until a job has ended."""
        states = ("queued", "running")
        wait_until(lambda: self.send("GET", f"/v1/jobs/{identity}").json()["status"] not in states, "the job's end")

    def stop(self, kill: bool = False) -> None:
        """End the server; with `kill` at once and its workers too, as a power cut does."""
        if self.process.poll() is None:
            victims = [*self.health()["worker_pids"], self.process.pid] if kill else []
            for pid in victims:
                os.kill(pid, signal.SIGKILL)
            if not kill:
                self.process.terminate()
            self.process.wait(LIMIT)
        self._threads.shutdown()
        self._client.close()


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {LIMIT:.0f} s for: {what}")
        time.sleep(0.05)
