"""Tells receivers that a job has ended, as Standard Webhooks says (https://www.standardwebhooks.com).

The message is small: what became of the job and where it is, no prompt, no picture and no key. It comes at least once,
with one `webhook-id`, again and again over restarts until the receiver takes it or `RETRIES` are used up. A receiver
that is slow, dead, redirecting or lying harms nobody: one attempt a host at a time, a few an owner, each of bounded
time in threads of their own; redirects are not followed, and of a reply only the status counts.
"""

import asyncio
import base64
import http.client
import json
import re
import time
from collections import Counter
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

import structlog
from standardwebhooks import Webhook

from server.errors import StorageFailure, invalid_request
from server.jobs.models import SUCCEEDED, JobRecord
from server.jobs.outbox import Claim, Outbox, derive_secret
from server.outbound import PORTS, Exchange, Unreachable
from server.settings.webhooks import ANY, WebhookSettings
from server.state import AppState

SECONDS = 10.0  # of one attempt
INTERVAL = 1.0  # seconds between looks for what is due
MOST, MOST_OF_OWNER = 8, 4  # attempts at a time; threads.POOLS has as many threads
MAX_URL = 2048  # characters
LONGEST_HOST = 253  # characters of a name in the DNS
ENTRY = re.compile(r"(.+?)(?::(\d{1,5}))?")  # of the allowed hosts
GONE = 410  # the receiver wants no more of it
log = structlog.get_logger("srpo")


class WebhookSender:
    """Carries out the deliveries of one database, together with other servers that share it."""

    def __init__(self, state: AppState) -> None:
        self._state = state
        self._outbox = Outbox(state.database)
        self._under_way: dict[str, tuple[str, asyncio.Task[None]]] = {}  # by host: whose, and the attempt
        self._free = asyncio.Event()
        self._masters: list[bytes] = []

    @property
    def enabled(self) -> bool:
        return bool(self._state.settings.webhook_hosts)

    async def run(self) -> None:
        """Never ends, where there are hosts to send to."""
        while self.enabled:
            self._free.clear()
            try:
                while len(self._under_way) < MOST and await self._start_next():
                    pass
            except StorageFailure as error:
                log.error("webhooks", error=type(error).__name__)
            try:
                await asyncio.wait_for(self._free.wait(), INTERVAL)
            except TimeoutError:
                continue

    async def stop(self) -> None:
        """End all attempts; they are made again later."""
        attempts = [task for _, task in self._under_way.values()]
        for task in attempts:
            task.cancel()
        await asyncio.gather(*attempts, return_exceptions=True)

    async def secrets(self, owner: str) -> list[bytes]:
        """Those that sign an owner's messages, the newest first."""
        if not self._masters:
            chosen = [secret.encode() for secret in self._state.settings.webhook_secrets]
            self._masters = chosen or [await self._state.threads.run("database", self._outbox.master)]
        return [derive_secret(master, owner) for master in self._masters]

    async def _start_next(self) -> bool:
        owners = Counter(owner for owner, _ in self._under_way.values())
        full = [owner for owner, count in owners.items() if count >= MOST_OF_OWNER]
        claim = await self._state.threads.run("database", self._outbox.claim, list(self._under_way), full)
        if claim is None:
            return False
        host = claim.delivery.host
        self._under_way[host] = claim.delivery.owner, asyncio.ensure_future(self._attempt(claim, host))
        return True

    async def _attempt(self, claim: Claim, host: str) -> None:
        delivery, status = claim.delivery, None
        try:
            allowed = find_host(delivery.url, self._state.settings) is not None
            if allowed:
                status = await self._send(claim)
            delivered = status is not None and 200 <= status < 300
            final = status == GONE or not allowed
            await self._state.threads.run(
                "database", self._outbox.finish, delivery, status, delivered=delivered, final=final
            )
            log.info("webhook", job=delivery.job_id, status=status, attempt=delivery.attempts)
        except StorageFailure as error:  # it is made again when the claim is over
            log.error("webhook_not_noted", job=delivery.job_id, error=type(error).__name__)
        finally:
            del self._under_way[host]
            self._free.set()

    async def _send(self, claim: Claim) -> int | None:
        """The status of the receiver's reply; None where there is none within `SECONDS`."""
        body = json.dumps(describe_event(claim.job))
        delivery, trace = claim.delivery, (claim.job.request or {}).get("trace", {})
        headers = sign(f"msg_{claim.job.id}", body, await self.secrets(delivery.owner), time.time())
        exchange = Exchange(SECONDS, private=self._state.settings.webhook_private)
        span, status = self._state.traces.begin_delivery(delivery.host, delivery.attempts, trace), None
        try:
            headers |= span.headers
            status = await self._state.threads.run_within(
                SECONDS, "webhooks", post, exchange, delivery.url, headers, body
            )
        except TimeoutError:
            pass
        finally:
            exchange.abort()
            span.end(status)
        return status


def post(exchange: Exchange, url: str, headers: dict[str, str], body: str) -> int | None:
    try:
        with exchange.request("POST", url, headers, body.encode()) as reply:
            return reply.status
    except (Unreachable, OSError, http.client.HTTPException, ValueError):
        return None


def sign(identity: str, body: str, secrets: list[bytes], now: float) -> dict[str, str]:
    """The headers of a message, signed with each of the secrets. `now` in Unix seconds."""
    moment = datetime.fromtimestamp(int(now), UTC)
    return {
        "content-type": "application/json",
        "user-agent": "srpo",
        "webhook-id": identity,
        "webhook-timestamp": str(int(now)),
        "webhook-signature": " ".join(Webhook(secret).sign(identity, moment, body) for secret in secrets),
    }


def describe_event(job: JobRecord) -> dict[str, Any]:
    """The message: the same for every attempt."""
    finished = job.finished or job.created
    data: dict[str, Any] = {
        "id": job.id,
        "object": "job",
        "status": job.state,
        "created_at": int(job.created),
        "finished_at": int(finished),
        "model": job.fields.get("model"),
        "poll_url": f"{job.base_url}/v1/jobs/{job.id}",
    }
    if job.state != SUCCEEDED and job.outcome:
        data["error"] = {"code": json.loads(job.outcome).get("error", {}).get("code")}
    moment = datetime.fromtimestamp(finished, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return {"type": f"job.{job.state}", "timestamp": moment, "data": data}


def format_secret(secret: bytes) -> str:
    """As Standard Webhooks' libraries take it."""
    return "whsec_" + base64.b64encode(secret).decode()


def check_url(url: object, settings: WebhookSettings) -> tuple[str, str]:
    """A URL that jobs may be reported to, and its host with the port. Raises `InvalidRequest`, without the URL."""
    if isinstance(url, str) and len(url) <= MAX_URL and (host := find_host(url, settings)):
        return url, host
    expected = f"an http(s) address of at most {MAX_URL} characters at a host of SRPO_WEBHOOK_HOSTS"
    raise invalid_request(
        f"expected {expected}",
        path=("webhook_url",),
        code="webhook_refused",
        expected=expected,
        received="another host" if isinstance(url, str) else type(url).__name__,
    )


def find_host(url: str, settings: WebhookSettings) -> str | None:
    """The host and port of the URL, if the operator allows them. A host without a port has its scheme's only."""
    try:
        parts = urlsplit(url)
        host, default = (parts.hostname or "").lower(), PORTS[parts.scheme]
        port = parts.port or default
    except (KeyError, ValueError):
        return None
    if (
        not 0 < len(host) <= LONGEST_HOST
        or not url.isascii()
        or not url.isprintable()
        or " " in url
        or parts.username is not None
    ):
        return None
    name = f"[{host}]" if ":" in host else host
    place = f"{name}:{port}"
    for allowed in settings.webhook_hosts:
        match = ENTRY.fullmatch(allowed)
        known, own_port = match.groups() if match else ("", None)
        is_host = known in (ANY, name) or (known.startswith("*.") and name.endswith(known[1:]))
        if is_host and port == int(own_port or default):
            return place
    return None
