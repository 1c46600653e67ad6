"""Webhooks: a job's end is told, signed, at least once; and no receiver harms anybody, whatever it does."""

import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import ValidationError
from standardwebhooks import Webhook, WebhookVerificationError
from support.jobs import KEYS, PREFER, call, ended, record
from support.ledgers import opened
from support.postgres import Postgres
from support.receivers import Message, Receiver
from support.scripted_process import scripted_process
from support.scripted_server import Gate, Scripted
from support.server import START_LIMIT, free_port
from support.waiting import within

from server.jobs.models import WebhookDelivery
from server.jobs.outbox import Outbox
from server.jobs.store import JobStore
from server.jobs.webhooks import find_host, post
from server.outbound import Exchange
from server.settings.webhooks import WebhookSettings

PATH = "/v1/images/generations"
BODY = {"model": "flux/srpo", "prompt": "pomegranate", "image_size": "square", "num_inference_steps": 1}
HOSTS = [f"127.0.0.{number}" for number in range(1, 7)]


class Server:
    """Reports to receivers on the ports that were chosen for them before its start, one a host."""

    def __init__(self, scripted: Scripted, ports: dict[str, int], stack: ExitStack) -> None:
        self.scripted = scripted
        self._ports = ports
        self._stack = stack

    def receiver(self, number: int, *statuses: int, **options: Any) -> Receiver:
        host = HOSTS[number]
        return self._stack.enter_context(Receiver(*statuses, host=host, port=self._ports[host], **options))

    def accept(self, url: str, key: str = KEYS[0], **fields: Any) -> str:
        headers = PREFER | {"webhook-url": url}
        reply = call(self.scripted, "POST", PATH, key, json=BODY | fields, headers=headers)
        assert reply.status_code == 202, reply.text
        identity: str = reply.json()["id"]
        return identity

    def webhook(self, identity: str, key: str = KEYS[0]) -> dict[str, Any]:
        found: dict[str, Any] = call(self.scripted, "GET", f"/v1/jobs/{identity}", key).json()["webhook"]
        return found

    def until(self, identity: str, status: str) -> dict[str, Any]:
        assert within(START_LIMIT, lambda: self.webhook(identity)["status"] == status), self.webhook(identity)
        return self.webhook(identity)

    def secret(self, key: str = KEYS[0]) -> str:
        text: str = call(self.scripted, "GET", "/v1/webhooks/secret", key).json()["secret"]
        return text


def verify(message: Message, secret: str) -> Any:
    return Webhook(secret).verify(message.body, message.headers)


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Scripted, dict[str, int]]]:
    ports = {host: free_port() for host in HOSTS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        patch.setattr("server.jobs.outbox.RETRIES", (0.05,) * 3)
        patch.setattr("server.jobs.webhooks.INTERVAL", 0.02)
        patch.setattr("server.jobs.webhooks.SECONDS", START_LIMIT)  # no message is told twice since one took long
        options: dict[str, Any] = {
            "api_keys": KEYS,
            "safety_checker": "none",
            "webhook_hosts": tuple(f"{host}:{port}" for host, port in ports.items()),
            "webhook_private": True,
        }
        with Scripted(tmp_path_factory.mktemp("webhooks"), **options) as server:
            yield server, ports


@pytest.fixture
def server(scripted: tuple[Scripted, dict[str, int]]) -> Iterator[Server]:
    with ExitStack() as stack:
        yield Server(*scripted, stack)


def test_the_end_of_a_job_is_told_and_signed_with_its_keys_secret(server: Server) -> None:
    receiver = server.receiver(0)
    job = server.accept(receiver.url)
    shown = server.until(job, "delivered")
    assert (shown["attempts"], shown["last_status"]) == (1, 204)
    (message,) = receiver.messages
    event = verify(message, server.secret())
    assert event["type"] == "job.succeeded"
    assert event["data"]["poll_url"] == f"{server.scripted.url}/v1/jobs/{job}"
    assert message.headers["webhook-id"] == f"msg_{job}"
    with pytest.raises(WebhookVerificationError):
        verify(message, server.secret(KEYS[1]))
    told = json.dumps(message.headers) + message.body
    assert not [word for word in ("pomegranate", "authorization", *KEYS, server.secret()) if word in told]
    assert ended(server.scripted, job)["webhook"] == shown


def test_a_request_with_the_field_is_a_job_that_is_waited_for(server: Server) -> None:
    receiver = server.receiver(0)
    reply = call(server.scripted, "POST", PATH, json=BODY | {"webhook_url": receiver.url})
    assert reply.status_code == 201
    assert "webhook" not in reply.headers["x-ignored-fields"]
    assert within(START_LIMIT, lambda: len(receiver.messages) == 1)
    server.until(server.accept(receiver.url, prompt="oom"), "delivered")
    events = [json.loads(message.body) for message in receiver.messages]
    assert [event["type"] for event in events] == ["job.succeeded", "job.failed"]
    assert events[1]["data"]["error"] == {"code": "out_of_memory"}


def test_a_receiver_that_fails_hears_the_same_message_again(server: Server) -> None:
    receiver = server.receiver(1, 500, 429, 200)
    shown = server.until(server.accept(receiver.url), "delivered")
    assert shown["attempts"] == 3
    assert len({message.headers["webhook-id"] for message in receiver.messages}) == 1
    assert len({message.body for message in receiver.messages}) == 1
    for message in receiver.messages:
        verify(message, server.secret())


def test_what_is_never_taken_is_given_up(server: Server) -> None:
    receiver = server.receiver(1, 500)
    shown = server.until(server.accept(receiver.url), "failed")
    assert shown == {"status": "failed", "attempts": 4, "last_status": 500}
    assert len(receiver.messages) == 4


def test_a_receiver_that_wants_no_more_is_not_asked_again(server: Server) -> None:
    receiver = server.receiver(1, 410)
    assert server.until(server.accept(receiver.url), "failed")["attempts"] == 1
    assert len(receiver.messages) == 1


def test_a_redirect_leads_nowhere(server: Server) -> None:
    with Receiver(host="127.0.0.9") as elsewhere:
        receiver = server.receiver(2, 307, location=elsewhere.url)
        assert server.until(server.accept(receiver.url), "failed")["last_status"] == 307
        assert elsewhere.messages == []


def lie(file: Any) -> None:
    file.write(b"HTTP/1.1 200 OK\r\n")
    for number in range(200_000):
        file.write(b"x-%d: %s\r\n" % (number, b"x" * 1000))


def test_receivers_that_are_slow_dead_or_lying_hold_up_no_other(server: Server) -> None:
    released = threading.Event()
    slow, liar, good = server.receiver(3, wait=released), server.receiver(4, lie=lie), server.receiver(5)
    try:
        held = [server.accept(slow.url) for _ in range(12)]
        assert within(START_LIMIT, lambda: len(slow.messages) == 1)
        false, job = server.accept(liar.url), server.accept(good.url)
        server.until(job, "delivered")
        assert server.webhook(held[-1])["attempts"] == 0
        assert "last_status" not in server.until(false, "failed")
    finally:
        released.set()


def test_only_the_operators_hosts_are_told(server: Server) -> None:
    with Receiver(host="127.0.0.9") as other:
        for url in (other.url, "ftp://127.0.0.1/", "http://user:pw@127.0.0.1/", "http://127.0.0.1", 7, other.url * 99):
            refused = call(server.scripted, "POST", PATH, json=BODY | {"webhook_url": url}, headers=PREFER)
            assert refused.status_code == 400
            assert refused.json()["error"]["param"] == "webhook_url"
            assert "path-secret" not in refused.text
        assert other.messages == []


def test_without_webhooks_the_name_is_ignored_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    with Scripted(tmp_path, safety_checker="none") as scripted, Receiver() as receiver:
        headers = {"webhook-url": receiver.url}
        reply = httpx.post(f"{scripted.url}{PATH}", json=BODY | {"webhook_url": receiver.url}, headers=headers)
        assert reply.status_code == 201
        assert {"webhook_url", "webhook-url"} <= set(reply.headers["x-ignored-fields"].split(", "))
        body = BODY | {"extra_body": {"webhook_url": receiver.url}, "guidence_scale": 3}
        accepted = httpx.post(f"{scripted.url}{PATH}", json=body, headers=headers | PREFER)
        assert accepted.status_code == 202  # who waits for a message asks for nothing more, and hears it here
        ignored = set(accepted.headers["x-ignored-fields"].split(", "))
        assert {"webhook_url", "webhook-url", "guidence_scale"} <= ignored
        assert accepted.headers["x-engine-fingerprint"] == reply.headers["x-engine-fingerprint"]
        refused = httpx.get(f"{scripted.url}/v1/webhooks/secret")
        assert refused.status_code == 404
        assert "SRPO_WEBHOOK_HOSTS" in refused.json()["message"]
        assert receiver.messages == []


@pytest.mark.long
def test_a_kill_loses_no_message(tmp_path: Path) -> None:
    gate, port = Gate(tmp_path / "gate"), free_port()
    settings = {"webhook_hosts": f"127.0.0.1:{port}", "webhook_private": "1"}

    def accept(server: Any, prompt: str) -> str:
        headers = PREFER | {"webhook-url": f"http://127.0.0.1:{port}/"}
        identity: str = call(server, "POST", PATH, json=BODY | {"prompt": prompt}, headers=headers).json()["id"]
        return identity

    with scripted_process(tmp_path / "data", **settings) as server:
        done = accept(server, "x")
        assert within(START_LIMIT, lambda: call(server, "GET", f"/v1/jobs/{done}").json()["webhook"]["attempts"] == 1)
        begun = accept(server, gate.prompt)
        secret = call(server, "GET", "/v1/webhooks/secret").json()["secret"]
        server.process.kill()
        server.process.wait()
    gate.allow(1000)
    with Receiver(port=port) as receiver, scripted_process(tmp_path / "data", **settings):
        wanted = {f"msg_{done}", f"msg_{begun}"}
        assert within(START_LIMIT, lambda: {message.headers["webhook-id"] for message in receiver.messages} == wanted)
        for message in receiver.messages:
            verify(message, secret)


def test_servers_with_one_database_share_the_messages(postgres: Postgres) -> None:
    url = postgres.create_database().replace("postgresql://", "postgresql+psycopg://")
    with opened(url) as one, opened(url) as other:
        outboxes = Outbox(one), Outbox(other)
        assert outboxes[0].master() == outboxes[1].master()
        jobs = JobStore(one)
        for name in ("a", "b"):
            jobs.add(record(name, webhook=WebhookDelivery(name, "", "http://x/", f"{name}:80")))
            assert outboxes[0].claim([], []) is None
            assert jobs.end(name, "succeeded", 201, {}, "{}")
            claim = outboxes[0].claim([], [])
            assert claim is not None
            assert (claim.job.id, claim.delivery.attempts) == (name, 1)
            assert outboxes[1].claim([], []) is None
            outboxes[0].finish(claim.delivery, 204, delivered=name == "a", final=False)
        found = jobs.find("a"), jobs.find("b")
        assert [job.webhook.state for job in found if job and job.webhook] == ["delivered", "pending"]
        jobs.sweep(expire=-1)
        assert outboxes[1].claim([], []) is None


def test_an_address_that_is_not_public_is_not_connected_to() -> None:
    with Receiver(host="127.0.0.9") as receiver:
        assert post(Exchange(START_LIMIT), receiver.url, {}, "{}") is None
        assert receiver.messages == []
        assert post(Exchange(START_LIMIT, private=True), receiver.url, {}, "{}") == 204


@pytest.mark.parametrize(
    ("allowed", "url", "host"),
    [
        ("a.example", "https://a.example/x", "a.example:443"),
        ("a.example", "http://A.example:80/x", "a.example:80"),
        ("a.example", "https://a.example:8443/x", None),
        ("a.example:8443", "https://a.example:8443/x", "a.example:8443"),
        ("a.example", "https://b.a.example/", None),
        ("*.a.example", "https://b.a.example/", "b.a.example:443"),
        ("*.a.example", "https://a.example/", None),
        ("*.a.example", "https://bada.example/", None),
        ("*", "https://anywhere.example/", "anywhere.example:443"),
        ("*", "https://anywhere.example:22/", None),
        ("*", "https://user@anywhere.example/", None),
        ("*", "https://anywhere.example/ x", None),
        ("*", "file:///etc/passwd", None),
        ("[::1]:80", "http://[::1]/", "[::1]:80"),
        ("*", f"https://{'a' * 400}.example/", None),
    ],
)
def test_which_hosts_are_allowed(allowed: str, url: str, host: str | None) -> None:
    assert find_host(url, WebhookSettings(webhook_hosts=(allowed,))) == host


@pytest.mark.parametrize(
    "fields",
    [
        {"webhook_hosts": ("*",), "webhook_private": True},
        {"webhook_hosts": ("https://a.example",)},
        {"webhook_secrets": ("short",)},
    ],
)
def test_settings_that_would_be_unsafe_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        WebhookSettings(**fields)
