"""Events of a device that is not there: once the host has waited for one, all that was queued before it is done."""

from typing import Any

import pytest
import torch


class EventLog:
    """What the host did, in order: `("record", 1)`, `("wait", 1)`, and whatever a test adds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done: list[tuple[str, int]] = []
        self.recorded = self.waited = 0
        log = self

        class Event:
            def __init__(self, *, blocking: bool) -> None:
                assert blocking, "a wait that spins takes a core"

            def record(self, stream: Any) -> None:
                assert stream == "stream of cuda:0"
                log.recorded += 1
                self.number = log.recorded
                log.done.append(("record", self.number))

            def synchronize(self) -> None:
                log.waited = max(log.waited, self.number)
                log.done.append(("wait", self.number))

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")

    @property
    def ahead(self) -> int:
        """How many events the host has not waited for."""
        return self.recorded - self.waited
