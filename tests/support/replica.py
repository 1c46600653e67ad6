"""A server process whose engine does what the prompt says: `python -m support.replica PORT FOLDER`."""

import asyncio
import sys
from pathlib import Path

import uvicorn
from rich.console import Console

from pipelines.engine.base import EngineConfig
from pipelines.workers.pool import WorkerPool
from pipelines.workers.supervisor import local_workers
from server.app import create_app
from server.cli.stopping import DrainingServer
from server.settings.server import Settings


def main(port: int, folder: Path) -> None:
    pool = WorkerPool(
        local_workers(EngineConfig("tiny", str(folder), factory="support.scripted_engine:load")), max_running=1
    )
    app = create_app(Settings(port=port, data_dir=folder, model="tiny", safety_checker="none"), pool)
    config = uvicorn.Config(app, port=port, log_config=None, ws="none", timeout_graceful_shutdown=20)
    asyncio.run(DrainingServer(config, app.parts, app.jobs, Console()).serve())


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
