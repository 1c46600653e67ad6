"""A cluster without Ray: its settings, what its proxy lets through, and engines behind the pool of an API replica.

`make ray` tries the same with Ray.
"""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from httpx import ASGITransport, AsyncClient
from pydantic import ValidationError
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from support.pictures import Peer
from support.scripted import ask, picture
from support.waiting import LIMIT

from pipelines.engine.base import EngineConfig, EngineInfo
from pipelines.errors import CannotSleep, WorkerCrashed
from pipelines.job import Preview, PreviewPlan, Progress
from pipelines.workers.patience import Patience
from pipelines.workers.pool import WorkerPool
from pipelines.workers.supervisor import local_workers
from server.__main__ import main as srpo
from server.cli import cluster
from server.cluster.engine import EnginePool, EngineService, EngineUnavailable
from server.cluster.proxy import list_middlewares
from server.cluster.session import RAY, SERVE
from server.cluster.settings import ClusterSettings
from server.cluster.slots import CallLost, make_slots

ROOT = Path(__file__).parent.parent
TRUTH: dict[str, Any] = {"database_url": "postgresql://user:pw-canary@host/name", "store_url": "s3://bucket/prefix"}
SILENCE = 1.0  # seconds, of an engine that is silent; others have all the time that a busy machine needs


class LocalCall:
    """A call of an engine in this process; a `frozen` one says one thing and no more, a `dying` one breaks then.

    A `deaf` one says nothing at all, and a `gone` one breaks before it has said anything. A `newer` one says more.
    """

    def __init__(self, said: Any, fault: str | None) -> None:
        self._said, self._fault = said, fault

    async def messages(self) -> AsyncIterator[Any]:
        try:
            if self._fault == "gone":
                raise CallLost("it is gone")
            if self._fault == "deaf":
                await asyncio.sleep(3600)
            async for said in self._said:
                if self._fault == "newer":
                    yield {"event": "weather", "job": "none"}, b""
                    yield said[0] | {"colour": "green"}, said[1]
                    continue
                yield said
                if self._fault == "dying":
                    raise CallLost("it died")
                if self._fault == "frozen":
                    await asyncio.sleep(3600)
        except EngineUnavailable as error:
            raise CallLost(str(error)) from None
        finally:
            await self._said.aclose()

    def cancel(self) -> None:
        pass


class LocalEngines:
    """Engines in this process, with a worker process each. `faults` are those of the next calls."""

    def __init__(self, services: list[EngineService], faults: list[str]) -> None:
        self.services, self.faults, self.calls = services, faults, 0

    async def count_ready(self) -> int:
        return len(self.services)

    async def describe(self) -> EngineInfo:
        return EngineInfo(**self.services[0].describe())

    def draw(self, *asked: Any) -> LocalCall:
        self.calls += 1
        if self.faults and self.faults[0] == "refused":
            raise RuntimeError(self.faults.pop(0))
        service = self.services[self.calls % len(self.services)]
        return LocalCall(service.draw(*asked), self.faults.pop(0) if self.faults else None)


@pytest.fixture(autouse=True)
def engines_find_the_scripted_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


def scripted_config() -> EngineConfig:
    return EngineConfig("tiny", device="none", factory="support.scripted_engine:load")


@asynccontextmanager
async def running(
    *faults: str, slots: int = 1, silence: float | None = None
) -> AsyncIterator[tuple[WorkerPool, LocalEngines, EnginePool]]:
    silence = silence or (SILENCE if {"frozen", "deaf"} & {*faults} else LIMIT)
    config = scripted_config()
    engine = EnginePool(local_workers(config), max_running=4)
    service = EngineService(engine, Patience(), SILENCE / 10)
    await service.load()
    engines = LocalEngines([service] * slots, list(faults))
    pool = WorkerPool(lambda callbacks: make_slots(engines, callbacks, slots, timeout=silence), max_running=4)
    await pool.start()
    try:
        while pool.status().state != "ready":
            await asyncio.sleep(0.01)
        yield pool, engines, engine
    finally:
        await pool.stop()
        await engine.stop()


async def test_a_request_comes_back_from_an_engine_with_its_steps_and_previews() -> None:
    async with running() as (pool, _, engine):
        job = pool.submit(ask(steps=4), PreviewPlan(1, 32))
        events = [event async for event in job.events()]
        assert (await job.result()).pixels == (picture(7),)
        assert [event.step for event in events if isinstance(event, Progress) and event.stage == "denoise"] == [
            1,
            2,
            3,
            4,
        ]
        assert [type(event) for event in events].count(Preview) == 1
        assert asdict(pool.status())["info"] == asdict(engine.status())["info"]


@pytest.mark.parametrize("fault", ["dying", "frozen"])
async def test_an_engine_that_is_lost_costs_a_second_call_and_the_bytes_are_the_same(fault: str) -> None:
    async with running(fault, fault) as (pool, engines, _):
        assert (await pool.submit(ask()).result()).pixels == (picture(7),)
        assert engines.calls == 3


@pytest.mark.parametrize("fault", ["gone", "deaf"])
async def test_an_engine_that_never_began_says_nothing_against_the_request(fault: str) -> None:
    """As many calls as it takes: Serve may choose a frozen replica again and again, until it has noticed."""
    async with running(*[fault] * 4, "dying") as (pool, engines, _):
        assert (await pool.submit(ask()).result()).pixels == (picture(7),)
        assert engines.calls == 6


async def test_a_request_that_is_called_again_can_still_be_cancelled() -> None:
    async with running("dying") as (pool, engines, engine):
        job = pool.submit(ask("slow", steps=50))
        while engines.calls < 2 or not engine.status().running:
            await asyncio.sleep(0.01)
        pool.cancel(job)
        while engine.status().running:
            await asyncio.sleep(0.01)
        assert pool.status().running == 0


async def test_a_third_loss_is_the_end_of_the_request_and_of_no_other_one() -> None:
    async with running("dying", "dying", "dying") as (pool, engines, _):
        with pytest.raises(WorkerCrashed):
            await pool.submit(ask()).result()
        assert (await pool.submit(ask()).result()).pixels == (picture(7),)
        assert engines.calls == 4


async def test_a_call_that_fails_in_an_unknown_way_is_made_again() -> None:
    """It left the request without an end, and its cancellation was an error too."""
    async with running("refused") as (pool, engines, _):
        assert (await pool.submit(ask()).result()).pixels == (picture(7),)
        assert engines.calls == 2
        engines.faults += ["refused"] * 3
        with pytest.raises(WorkerCrashed):
            await pool.submit(ask()).result()
        engines.faults.append("refused")
        job = pool.submit(ask())
        while engines.calls < 6:
            await asyncio.sleep(0.01)
        pool.cancel(job)
        engines.faults.clear()
        assert (await pool.submit(ask()).result()).pixels == (picture(7),)


async def test_waiting_for_an_engine_is_no_silence() -> None:
    async with running(silence=SILENCE) as (pool, engines, _):
        slow = [pool.submit(ask("slow", steps=40)) for _ in range(2)]  # two seconds each, one after the other
        assert [(await job.result()).pixels for job in slow] == [(picture(7),)] * 2
        assert engines.calls == 2


async def test_an_engine_knows_whose_the_work_is_and_cancelling_ends_it() -> None:
    async with running() as (pool, _, engine):
        job = pool.submit(ask("slow", steps=50), tenant="somebody")
        while not engine.status().running:
            await asyncio.sleep(0.01)
        assert len(engine.unfinished_of("somebody")) == 1
        pool.cancel(job)
        while engine.status().running:
            await asyncio.sleep(0.01)


async def test_an_engine_that_would_draw_other_bytes_draws_none() -> None:
    async with running() as (_, engines, _):
        call = engines.draw(ask().to_json(), b"", asdict(PreviewPlan()), "another fingerprint")
        with pytest.raises(CallLost, match="other bytes"):
            await anext(call.messages())


async def test_a_server_understands_an_engine_of_a_later_version() -> None:
    """While a cluster is updated. It says more of what it always said, and things that nobody knew before."""
    async with running("newer") as (pool, engines, _):
        assert (await pool.submit(ask()).result()).pixels == (picture(7),)
        assert engines.calls == 1


async def test_an_engine_refuses_a_request_of_a_later_version_only_if_it_asks_for_something_new() -> None:
    async with running() as (pool, engines, engine):
        request = ask()
        assert "source" not in request.to_json()  # a field that asks for nothing is not sent
        fingerprint = pool.status().info.fingerprint  # type: ignore[union-attr]
        call = engines.draw(request.to_json() | {"colour": "green"}, b"", asdict(PreviewPlan()), fingerprint)
        with pytest.raises(CallLost, match="version"):
            await anext(call.messages())
        assert engine.status().running == 0
        previews = asdict(PreviewPlan()) | {"colours": 2}  # no picture depends on them
        call = engines.draw(request.to_json(), b"", previews, fingerprint)
        assert [header["event"] async for header, _ in call.messages()][-1] == "done"


async def test_new_engines_that_draw_other_bytes_take_the_place_of_all_old_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A redeployment with other weights: the servers that came first described an old engine."""
    async with running(slots=2) as (pool, engines, _):
        monkeypatch.setenv("SCRIPTED_FINGERPRINT", "new weights")
        new = EnginePool(local_workers(scripted_config()), max_running=4)
        service = EngineService(new, Patience(), SILENCE / 5)
        await service.load()
        engines.services = [service] * 2
        jobs = [pool.submit(ask()) for _ in range(8)]  # more than one slot takes
        assert [(await job.result()).pixels for job in jobs] == [(picture(7),)] * 8
        status = pool.status()
        assert status.info is not None
        assert status.info.fingerprint == "new weights"
        assert [(worker.state, worker.failure) for worker in status.workers] == [("ready", None)] * 2
        await new.stop()


async def test_an_engine_whose_worker_dies_at_each_start_gives_up(tmp_path: Path) -> None:
    (tmp_path / "die").touch()
    config = EngineConfig(factory="support.scripted_engine:load", model="dying", models_dir=str(tmp_path))
    service = EngineService(EnginePool(local_workers(config, patience=Patience(max_deaths=2))), Patience(), beat=1.0)
    with pytest.raises(EngineUnavailable, match="died in a row"):
        await service.load()


def test_a_process_that_stops_is_killed_so_that_its_device_is_free() -> None:
    program = (
        "import asyncio, os, signal\n"
        "from server.cluster.watchdog import keep_watched\n"
        "async def main():\n"
        "    watched = asyncio.create_task(keep_watched(3))\n"
        "    await asyncio.sleep(0.5)\n"
        "    os.kill(os.getpid(), signal.SIGSTOP)\n"
        "asyncio.run(main())"
    )
    stopped = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False, timeout=120)
    assert stopped.returncode == -signal.SIGKILL


@contextmanager
def holding(program: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds a data folder in its own way, until its input ends."""
    lines = f"import sys\nfrom pathlib import Path\nfolder = Path(sys.argv[1])\n{program}\n"
    held = [sys.executable, "-c", lines, str(folder)]
    with subprocess.Popen(held, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        yield child


WAIT = "    print('held', flush=True)\n    print(sys.stdin.readline(), flush=True)"
SERVER = f"from server.process.data_folder import lock_data_folder\nwith lock_data_folder(folder):\n{WAIT}"
CLUSTER = f"from server.cli.cluster import announced\nwith announced(folder, 'http://127.0.0.1:1'):\n{WAIT}"


def test_an_ordinary_server_in_the_folder_is_no_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The signals that a cluster obeys would end it."""
    for name, value in (TRUTH | {"data_dir": str(tmp_path)}).items():
        monkeypatch.setenv(f"SRPO_{name.upper()}", value)
    with holding(SERVER, tmp_path) as server:
        for verb, code in {"redeploy": 1, "down": 0, "status": 1}.items():
            assert srpo(["cluster", verb]) == code
            assert capsys.readouterr().out == f"no cluster runs in the data folder {tmp_path}\n"
        assert server.communicate("go on\n")[0] == "go on\n\n"
    assert server.returncode == 0


def test_a_cluster_in_the_folder_is_found_until_it_ends(tmp_path: Path) -> None:
    settings = ClusterSettings(**TRUTH, data_dir=tmp_path)
    with holding(CLUSTER, tmp_path) as up:
        assert cluster.find_pid(settings) == up.pid
        cluster.down(settings)
        assert up.wait() == -signal.SIGTERM
    assert cluster.find_pid(settings) is None


def test_a_cluster_here_is_asked_through_no_proxy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    body = b'{"state":"ready","running":1,"waiting":2}'
    server = Peer("127.0.0.1", b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))
    for name in ("NO_PROXY", "no_proxy", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    settings = ClusterSettings(**TRUTH, data_dir=tmp_path, port=1)  # not the one that `up` was given
    with cluster.announced(tmp_path, server.url.rstrip("/")):
        assert cluster.status(settings) == 0
    assert capsys.readouterr().out == f"ready: 1 running, 2 waiting (process {os.getpid()})\n"


@pytest.mark.parametrize("missing", TRUTH)
def test_a_cluster_refuses_to_be_without_postgres_and_a_bucket(missing: str) -> None:
    with pytest.raises(ValidationError, match=r"SRPO_DATABASE_URL .* and SRPO_STORE_URL"):
        ClusterSettings(**TRUTH | {missing: None})


@pytest.mark.parametrize("setting", [{"idle_release": 60}, {"metrics_port": 9464}, {"link_lifetime": 60}])
def test_a_cluster_refuses_what_it_cannot_do(setting: dict[str, int]) -> None:
    with pytest.raises(ValidationError, match=next(iter(setting))):
        ClusterSettings(**TRUTH | setting)


async def test_engines_of_a_cluster_are_not_put_to_sleep() -> None:
    async with running() as (pool, _, _):
        with pytest.raises(CannotSleep):
            pool.idleness.sleep()
        pool.idleness.wake()
        assert pool.status().state == "ready"


def test_replicas_read_the_same_settings_from_their_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {"engines": 3, "api_keys": ("first-key", "second-key"), "no_fetch": True, "lease": 5.0}
    settings = ClusterSettings(**TRUTH | given)
    for name, value in settings.to_environment().items():
        monkeypatch.setenv(name, value)
    assert ClusterSettings() == settings


async def test_headers_that_ray_would_obey_do_not_reach_it() -> None:
    seen: list[bytes] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.extend(name for name, _ in scope["headers"])

    middleware = list_middlewares()[0]
    names = (b"X-Request-Timeout-Seconds", b"x-request-disconnect-disabled", b"serve-multiplexed-model-id", b"accept")
    scope = {"type": "http", "headers": [(name, b"1") for name in names]}
    await middleware.cls(app)(scope, None, None)  # type: ignore[call-arg, arg-type]
    assert seen == [b"accept"]


async def test_a_reply_has_one_request_id_though_serve_adds_another() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        reply = Response(headers={"x-request-id": "ours"})
        reply.raw_headers.append((b"x-request-id", b"serve's"))
        await reply(scope, receive, send)

    wrapped = app
    for middleware in list_middlewares():
        wrapped = middleware.cls(wrapped)  # type: ignore[call-arg, assignment]
    async with AsyncClient(transport=ASGITransport(wrapped), base_url="http://x") as client:
        assert (await client.get("/")).headers.get_list("x-request-id") == ["ours"]


@pytest.mark.parametrize(("kind", "status"), [("text/plain; charset=utf-8", 503), ("application/json", 404)])
async def test_serves_own_404_is_an_answer_to_come_back_for_and_the_apps_stays(kind: str, status: int) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await Response("Path '/' not found.", 404, media_type=kind)(scope, receive, send)

    asked = ASGITransport(list_middlewares()[1].cls(app))  # type: ignore[call-arg]
    async with AsyncClient(transport=asked, base_url="http://cluster") as client:
        reply = await client.get("/v1/jobs/job_1")
    assert reply.status_code == status
    if status == 503:
        assert reply.json()["error"]["code"] == "not_ready"
        assert int(reply.headers["retry-after"]) >= 1


def test_the_ray_service_sets_what_there_is() -> None:
    service = yaml.safe_load((ROOT / "deploy/kuberay/rayservice.yaml").read_text())
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    module, _, function = application["import_path"].partition(":")
    assert f"def {function}(" in (ROOT / (module.replace(".", "/") + ".py")).read_text()
    groups = [
        service["spec"]["rayClusterConfig"]["headGroupSpec"],
        *service["spec"]["rayClusterConfig"]["workerGroupSpecs"],
    ]
    for group in groups:
        (container,) = group["template"]["spec"]["containers"]
        values = {item["name"]: item.get("value") for item in container["env"]}
        ours = {name.removeprefix("SRPO_").lower() for name in values if name.startswith("SRPO_")}
        assert ours <= set(ClusterSettings.model_fields)
        assert values.items() >= (RAY | SERVE).items()
