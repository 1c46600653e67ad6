"""Traces: a span for a request, for its generation and for each stage, in the client's trace; and nobody's prompt.

Real servers send to a collector on loopback, which decodes what comes.
"""

import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("opentelemetry.sdk", reason="the extra otel is not installed")
pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="the extra otel is not installed")

from support.collector import Collector, Received
from support.jobs import PREFER, ended
from support.receivers import Receiver
from support.scripted_process import ScriptedProcess, scripted_process
from support.scripted_server import Gate
from support.server import START_LIMIT, free_port, wait_ready
from support.waiting import within

from server.tracing.opening import open_traces
from server.tracing.traces import Traces
from weights.version import read_version

TESTS = Path(__file__).parent
PATH = "/v1/images/generations"
ROUTE = f"POST {PATH}"
GENERATION = "generate_content flux/srpo"
STAGES = ("queue", "text", "denoise", "decode", "safety", "encode", "store")
KEY = "tracing-key-1"
PROMPT = "a rhinoceros on a unicycle"
BODY = {"model": "flux/srpo", "prompt": PROMPT, "image_size": "square", "num_inference_steps": 2}
LIMIT = 60.0
VERDICT = b'{"flagged": false}'
STOPPABLE = """
import sys
from pathlib import Path
import server.cli.serve
from support.scripted_server import Scripted
with Scripted(Path(sys.argv[1]), safety_checker="none") as server:
    print(server.port, flush=True)
    sys.stdin.read()
print(*(name for name in sys.modules if name.startswith(("opentelemetry.sdk", "opentelemetry.exporter"))), flush=True)
"""


ENDING = """
import asyncio, signal, sys
from pathlib import Path
import uvicorn
from rich.console import Console
from pipelines.engine.base import EngineConfig
from pipelines.workers.pool import WorkerPool
from pipelines.workers.supervisor import local_workers
from server import logs
from server.app import create_app
from server.cli.serve import listen, run
from server.cli.stopping import DrainingServer
from server.settings.server import Settings
port, folder = int(sys.argv[1]), Path(sys.argv[2])
workers = local_workers(EngineConfig("tiny", str(folder), factory="support.scripted_engine:load"))
pool = WorkerPool(workers, max_running=1)
settings = Settings(port=port, data_dir=folder, model="tiny", safety_checker="none", log_format="json")
logs.configure(settings)
app = create_app(settings, pool)
config = uvicorn.Config(app, log_config=None, ws="none", timeout_graceful_shutdown=settings.shutdown_grace)
signal.signal(signal.SIGTERM, lambda *_: None)
server = DrainingServer(config, app.parts, app.jobs, Console(stderr=True))
sys.exit(asyncio.run(run(server, app.parts, app.jobs.replica, [listen("127.0.0.1", port, "--port")])))
"""


class Caller:
    """A client with a span of its own."""

    def __init__(self) -> None:
        self.trace, self.span = secrets.token_hex(16), secrets.token_hex(8)

    @property
    def headers(self) -> dict[str, str]:
        return {"traceparent": f"00-{self.trace}-{self.span}-01", "tracestate": "vendor=1", "baggage": "secret=bag"}


def by_name(spans: list[Received], name: str) -> list[Received]:
    return [span for span in spans if span.name == name]


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        yield collector


@pytest.fixture(scope="module")
def environment(collector: Collector) -> Iterator[pytest.MonkeyPatch]:
    """What OpenTelemetry's own variables say."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        patch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip")
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
        yield patch


@pytest.fixture(scope="module")
def server(environment: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedProcess]:
    """A server that traces; its engine does what the prompt says."""
    with scripted_process(tmp_path_factory.mktemp("traced") / "data", traces="1", api_keys=KEY) as server:
        yield server


def ask(server: Any, caller: Caller, **fields: Any) -> httpx.Response:
    headers = caller.headers | {"authorization": f"Bearer {KEY}"} | fields.pop("headers", {})
    return httpx.post(server.url + PATH, json=BODY | fields, headers=headers, timeout=LIMIT)


def test_a_request_is_a_span_in_its_clients_trace_and_so_is_each_stage(
    server: ScriptedProcess, collector: Collector
) -> None:
    caller = Caller()
    reply = ask(server, caller, seed=7, num_images=2, acceleration="none")
    assert reply.status_code == 201
    spans = collector.wait_for(caller.trace, ROUTE, GENERATION)
    (request,), (generation,) = by_name(spans, ROUTE), by_name(spans, GENERATION)
    stages = [span for span in spans if span not in (request, generation)]
    assert (request.kind, request.parent) == ("server", caller.span)
    assert (generation.kind, generation.parent) == ("internal", request.id)
    assert {(span.kind, span.parent) for span in stages} == {("internal", generation.id)}
    # two images on one device, one after the other
    assert [span.name for span in stages] == ["queue", "text", *("denoise", "decode") * 2, "safety", "encode", "store"]
    assert request.start <= generation.start
    assert all(before.end <= after.end and before.start <= after.start for before, after in pairwise(stages))
    assert stages[-1].end <= generation.end <= request.end
    assert not [span for span in spans if span.failed]
    assert {span.service for span in spans} == {"srpo"}


def test_the_durations_of_stages_are_those_of_the_reply(server: ScriptedProcess, collector: Collector) -> None:
    def differing() -> list[str]:
        """The stages of one request that took longer in one of them; the clock is read twice, and not at once."""
        caller = Caller()
        timings = ask(server, caller).json()["timings"]
        spans = collector.wait_for(caller.trace, GENERATION)
        seconds = {span.name: (span.end - span.start) / 1e9 for span in spans}
        assert seconds["denoise"] >= timings["denoise"] - 0.001  # with what came between two steps
        return [
            stage
            for stage in ("text", "decode", "safety")
            if seconds[stage] != pytest.approx(timings[stage], abs=0.001)
        ]

    assert within(LIMIT, lambda: not differing())


def test_attributes_are_the_conventions_and_hold_nothing_private(server: ScriptedProcess, collector: Collector) -> None:
    caller = Caller()
    url = ask(server, caller, seed=7, acceleration="none").json()["images"][0]["url"]
    spans = collector.wait_for(caller.trace, ROUTE, GENERATION)
    (request,), (generation,) = by_name(spans, ROUTE), by_name(spans, GENERATION)
    assert request.attributes == {
        "http.request.method": "POST",
        "http.route": PATH,
        "http.response.status_code": 201,
        "url.scheme": "http",
    }
    assert generation.attributes == {
        "gen_ai.operation.name": "generate_content",
        "gen_ai.provider.name": "srpo",
        "gen_ai.request.model": "flux/srpo",
        "gen_ai.response.model": "tiny",
        "gen_ai.output.type": "image",
        "gen_ai.request.choice.count": 1,
        "gen_ai.request.seed": 7,
        "srpo.image.width": 512,
        "srpo.image.height": 512,
        "srpo.steps": 2,
        "srpo.acceleration": "none",
        "srpo.outcome": "succeeded",
    }
    httpx.get(f"{server.url}/v1/images/generations?prompt=queried-prompt")
    httpx.get(f"{server.url}/nowhere/pathed-prompt")
    last = Caller()
    ask(server, last)
    collector.wait_for(last.trace, ROUTE)
    told = b"".join(collector.raw)
    for private in (
        "rhinoceros",
        "unicycle",
        KEY,
        url.rpartition("/")[2],
        "secret=bag",
        "queried-prompt",
        "pathed-prompt",
    ):
        assert private.encode() not in told, private


def test_what_is_refused_or_fails_says_why(server: ScriptedProcess, collector: Collector) -> None:
    caller = Caller()
    assert ask(server, caller, num_images=9).status_code == 400
    (span,) = collector.wait_for(caller.trace, ROUTE)
    assert (span.attributes["error.type"], span.failed) == ("invalid_request", False)
    caller = Caller()
    assert ask(server, caller, prompt="raise").status_code == 500
    spans = collector.wait_for(caller.trace, ROUTE, GENERATION)
    for span in (*by_name(spans, ROUTE), *by_name(spans, GENERATION)):
        assert (span.attributes["error.type"], span.failed) == ("generation_failed", True)


def test_probes_are_not_traced_and_a_wrong_context_begins_a_trace_of_its_own(
    server: ScriptedProcess, collector: Collector
) -> None:
    caller = Caller()
    for path in ("/health", "/ready", "/metrics"):
        httpx.get(server.url + path, headers=caller.headers)
    wrong = Caller()
    reply = ask(server, wrong, headers={"traceparent": f"00-{wrong.trace}-{wrong.span}"})
    assert reply.status_code == 201
    httpx.get(f"{server.url}/v1/models", headers=caller.headers)
    assert [span.name for span in collector.wait_for(caller.trace, "GET /v1/models")] == ["GET /v1/models"]
    assert collector.spans(wrong.trace) == []
    lost = Caller()
    httpx.get(f"{server.url}/nowhere", headers=lost.headers)
    (span,) = collector.wait_for(lost.trace, "GET")
    assert (span.attributes["http.response.status_code"], "http.route" in span.attributes) == (404, False)


@pytest.mark.long
def test_a_job_that_survives_a_kill_keeps_its_trace_and_its_webhook_has_it(
    environment: pytest.MonkeyPatch, collector: Collector, tmp_path: Path
) -> None:
    gate, port, caller = Gate(tmp_path / "gate"), free_port(), Caller()
    settings = {"traces": "1", "webhook_hosts": f"127.0.0.1:{port}", "webhook_private": "1"}
    hook = {"webhook-url": f"http://127.0.0.1:{port}/hook?token=path-secret"}
    with scripted_process(tmp_path / "data", **settings) as server:
        reply = ask(server, caller, prompt=gate.prompt, headers=PREFER | hook)
        assert reply.status_code == 202
        collector.wait_for(caller.trace, ROUTE)
        server.process.kill()
        server.process.wait()
    gate.allow(1000)
    with Receiver(port=port) as receiver, scripted_process(tmp_path / "data", **settings) as server:
        assert ended(server, reply.json()["id"])["status"] == "succeeded"
        spans = collector.wait_for(caller.trace, ROUTE, GENERATION, "POST webhook")
        (message,) = receiver.messages
    (request,), (generation,), (delivery,) = (by_name(spans, name) for name in (ROUTE, GENERATION, "POST webhook"))
    assert generation.parent == delivery.parent == request.id
    assert {span.name for span in spans} >= set(STAGES)
    assert message.headers["traceparent"] == f"00-{caller.trace}-{delivery.id}-01"
    assert message.headers["tracestate"] == "vendor=1"
    assert "baggage" not in message.headers
    assert delivery.attributes == {
        "http.request.method": "POST",
        "http.request.resend_count": 0,
        "http.response.status_code": 204,
        "server.address": "127.0.0.1",
        "server.port": port,
    }
    assert b"path-secret" not in b"".join(collector.raw)


def test_the_operators_moderation_service_is_told_the_trace(
    environment: pytest.MonkeyPatch, collector: Collector, tmp_path: Path
) -> None:
    def allow(out: Any) -> None:
        out.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(VERDICT), VERDICT))

    caller = Caller()
    with Receiver(lie=allow) as service:
        hooks = {"prompt_hook": service.url, "safety_checker": f"hook:{service.url}"}
        with scripted_process(tmp_path / "data", traces="1", api_keys=KEY, **hooks) as server:
            assert ask(server, caller).status_code == 201
            spans = collector.wait_for(caller.trace, ROUTE, GENERATION)
        told = [message.headers["traceparent"] for message in service.messages if "traceparent" in message.headers]
    (request,), (generation,) = by_name(spans, ROUTE), by_name(spans, GENERATION)
    assert told == [f"00-{caller.trace}-{span.id}-01" for span in (request, generation)]


@contextmanager
def stopped_in_order(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """A server's address, and a list that has what of OpenTelemetry it had loaded at its end. It must end well."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join((str(TESTS), str(TESTS.parent)))}
    command = [sys.executable, "-c", STOPPABLE, str(folder / "data")]
    loaded: list[str] = []
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)
    assert process.stdout is not None
    port = next((int(line) for line in process.stdout if line.strip().isdigit()), 0)
    try:
        wait_ready(f"http://127.0.0.1:{port}", process, folder / "log")
        yield f"http://127.0.0.1:{port}", loaded
        told, _ = process.communicate(timeout=START_LIMIT)
        loaded += told.decode().splitlines()[-1].split()  # the lines before are the log
        assert process.returncode == 0, (folder / "log").read_text()
    finally:
        process.kill()
        process.wait()


def test_a_collector_that_is_away_harms_nobody(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{free_port()}")
        patch.setenv("SRPO_TRACES", "1")
        with stopped_in_order(tmp_path) as (url, loaded):
            assert httpx.post(url + PATH, json=BODY, timeout=LIMIT).status_code == 201
            assert within(LIMIT, lambda: "exporting span" in (tmp_path / "log").read_text())
    assert "opentelemetry.sdk" in loaded


@contextmanager
def silent() -> Iterator[str]:
    """A collector that accepts connections, reads what comes, and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=100) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@contextmanager
def failing() -> Iterator[str]:
    with Collector(500) as collector:
        yield collector.url


@contextmanager
def absent() -> Iterator[str]:
    yield f"http://127.0.0.1:{free_port()}"


@pytest.mark.parametrize(
    ("collector_of", "said"),
    [(silent, "traces_unsent"), (failing, "code: 500"), (absent, "traces_unsent"), (Collector, "")],
    ids=["silent", "failing", "absent", "good"],
)
def test_a_server_ends_in_time_and_well_whatever_the_collector_does(
    environment: pytest.MonkeyPatch, tmp_path: Path, collector_of: Any, said: str
) -> None:
    """Each has the same grace and margin, of which the exporter's own timeout would take several times as much."""
    port, log = free_port(), tmp_path / "log"
    with collector_of() as opened, log.open("wb") as out:
        variables = {
            "PYTHONPATH": os.pathsep.join((str(TESTS), str(TESTS.parent))),
            "OTEL_EXPORTER_OTLP_ENDPOINT": opened if isinstance(opened, str) else opened.url,
            "OTEL_EXPORTER_OTLP_TIMEOUT": "600",
            "SRPO_TRACES": "1",
            "SRPO_SHUTDOWN_GRACE": "15",
        }
        command = [sys.executable, "-c", ENDING, str(port), str(tmp_path / "data")]
        process = subprocess.Popen(command, env=os.environ | variables, stdout=out, stderr=out)
        try:
            wait_ready(f"http://127.0.0.1:{port}", process, log)
            assert httpx.post(f"http://127.0.0.1:{port}{PATH}", json=BODY, timeout=LIMIT).status_code == 201
            process.send_signal(signal.SIGTERM)
            assert process.wait(START_LIMIT) == 0, log.read_text()
        finally:
            process.kill()
            process.wait()
    told = log.read_text()
    assert "Stopped." in told
    assert said in told
    if not said:
        words = ('"level": "error"', "trace", "span")
        assert not [line for line in told.splitlines() if any(word in line for word in words)]


def test_off_it_loads_nothing_and_tells_nobody_whatever_the_variables_say(
    environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """FastAPI, which has its own spans and logs of requests, could be told to send them off by a variable.

    It brings OpenTelemetry's API, which does nothing by itself.
    """
    with Collector() as nobody, pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", nobody.url)
        patch.setenv("FASTAPI_OTEL_AUTO_CONFIGURE", "true")
        with stopped_in_order(tmp_path) as (url, loaded):
            assert httpx.post(url + PATH, json=BODY, headers=Caller().headers, timeout=LIMIT).status_code == 201
            assert httpx.post(url + PATH, json=BODY | {"prompt": "raise"}, timeout=LIMIT).status_code == 500
        assert loaded == []
        assert nobody.raw == []


def test_what_cannot_be_sent_is_said_at_start(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert type(open_traces(False)) is Traces
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
        command = [sys.executable, "-m", "server", "serve", "--traces", "--data-dir", str(tmp_path)]
        started = subprocess.run(command, capture_output=True, text=True, check=False)
    assert started.returncode == 2
    assert "OTEL_EXPORTER_OTLP_PROTOCOL=grpc: traces are sent by http/protobuf only" in started.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(sys.modules, "server.tracing.otel", raising=False)
        patch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
        with pytest.raises(ValueError, match=r"SRPO_TRACES needs the extra `otel`.*\.\[otel\]"):
            open_traces(True)


@pytest.mark.long
def test_the_service_has_the_name_and_the_sampler_that_the_variables_say(
    environment: pytest.MonkeyPatch, collector: Collector, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_SERVICE_NAME", "pictures")
        patch.setenv("OTEL_TRACES_SAMPLER", "parentbased_always_off")
        with scripted_process(tmp_path / "data", traces="1", api_keys=KEY) as server:
            unsampled, sampled = Caller(), Caller()
            flags = {"traceparent": f"00-{unsampled.trace}-{unsampled.span}-00"}
            assert ask(server, unsampled, headers=flags).status_code == 201
            assert ask(server, sampled).status_code == 201
            spans = collector.wait_for(sampled.trace, ROUTE)
    assert {span.service for span in spans} == {"pictures"}
    assert collector.spans(unsampled.trace) == []
    assert read_version().encode() in b"".join(collector.raw)
