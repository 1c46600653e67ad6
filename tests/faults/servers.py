"""The servers of the table, which several rows share."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from faults.outcome import Server
from support.ledgers import small_disk
from support.server import LiveServer, running


@contextmanager
def serving(server: Server, folder: Path) -> Iterator[LiveServer]:
    """It runs with the tiny model and without a checker, on a disk of its own if one is asked for."""
    settings: dict[str, Any] = {"safety_checker": "none", **server.settings}
    if server.disk is None:
        with running(folder, **settings) as live:
            yield live
        return
    (folder / "data").mkdir()
    with running(folder, wrap=partial(small_disk, folder / "data", server.disk), **settings) as live:
        live.data_dir = Path(f"/proc/{live.process.pid}/root{live.data_dir}")
        yield live
