"""A duty that fails is begun again: it used to end for good, and nobody noticed."""

import asyncio

import pytest
from structlog.testing import capture_logs

from pipelines import duties
from pipelines.duties import keep_running


async def test_a_duty_that_fails_is_logged_and_begun_again(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, again = 0, asyncio.Event()

    async def duty() -> None:
        nonlocal begun
        begun += 1
        if begun == 1:
            raise RuntimeError("the database is damaged")
        again.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(duties, "RESTART", 0.0)
    with capture_logs() as entries:
        task = asyncio.create_task(keep_running("sweeping", duty))
        await asyncio.wait_for(again.wait(), 30)
        task.cancel()
    assert [entry["duty"] for entry in entries if entry["log_level"] == "error"] == ["sweeping"]
