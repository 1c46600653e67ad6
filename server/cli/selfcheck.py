"""`srpo selfcheck`: compares what this machine draws with what it drew before, or starts the comparison anew."""

import asyncio
from pathlib import Path

from pydantic import Field
from rich.console import Console
from rich.text import Text

from pipelines import logs
from pipelines.loading.golden import SECTION
from pipelines.optimize.tuning_cache import FAILED_OPTIMIZATIONS, NAME, TuningCache
from pipelines.workers.pool import WorkerPool
from pipelines.workers.supervisor import local_workers
from server.cli.terminal.failure import STOPPED, CommandFailed, format_error
from server.cli.terminal.parsing import parse
from server.engine_setup import build_engine_config, build_patience
from server.settings.engine import EngineSettings


class SelfcheckSettings(EngineSettings):
    """Draw the fixed pictures, and compare them with earlier ones in the data folder. The first ones are stored."""

    renew: bool = Field(False, description="forget earlier pictures and failed optimizations; store new ones")


def main(arguments: list[str]) -> None:
    settings = parse(SelfcheckSettings, "selfcheck", arguments)
    logs.configure("console")
    cache = TuningCache(settings.data_dir / NAME)
    try:
        if settings.renew:
            forget_results(settings.data_dir)
        asyncio.run(compare_pictures(settings, cache))
    except (OSError, ValueError) as error:  # the file of another user, or a damaged one
        raise CommandFailed(format_error(error)) from error
    except KeyboardInterrupt:
        raise CommandFailed("stopped", exit_code=STOPPED) from None


def forget_results(data_dir: Path) -> None:
    """Forget the golden pictures and which optimizations failed: the next start counts as the first."""
    cache = TuningCache(data_dir / NAME)
    for section in (SECTION, FAILED_OPTIMIZATIONS):
        cache.forget(section)


async def compare_pictures(settings: SelfcheckSettings, cache: TuningCache) -> None:
    known = cache.section(SECTION)
    engine = build_engine_config(settings, settings.data_dir)
    pool = WorkerPool(local_workers(engine, settings.devices, build_patience(settings)))
    await pool.start()
    try:
        with Console(stderr=True).status("starting") as shown:
            status = pool.status()
            while any(worker.state == "loading" for worker in status.workers):
                shown.update(Text(status.stage))
                await asyncio.sleep(0.05)
                status = pool.status()
    finally:
        await pool.stop()
    if status.info is None or status.failure:
        raise CommandFailed(f"{status.failure}", exit_code=1)
    info = status.info
    found = "the same pictures as before" if info.fingerprint in known else "the first pictures; they are kept"
    print(f"{info.model} on {info.device}, {info.dtype}, fingerprint {info.fingerprint}: {found} in {cache.path}")
