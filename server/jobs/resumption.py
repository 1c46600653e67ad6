"""What a server that is gone left unfinished is carried out again, in the order in which it was accepted.

Jobs are pure: their seeds were chosen when they were accepted, so the same engine draws the same bytes.
"""

import asyncio
from contextlib import suppress

import structlog

from pipelines.errors import Draining, NotReady, PipelineError, WorkersSuspended
from server.errors import ServerError, StorageFailure
from server.jobs.generation import Generation
from server.jobs.runner import ActiveJob, JobRunner
from server.jobs.spec import JobSpec
from server.jobs.store import JobStore
from server.security.callers import Caller
from server.state import AppState

log = structlog.get_logger("srpo")
RETRY = 0.05  # seconds between two tries to get a job into the pool's line
REREAD = 1.0  # seconds between two tries to read its source picture


async def resume_jobs(jobs: list[ActiveJob], runner: JobRunner, store: JobStore, state: AppState) -> None:
    """Hand every job to the runner, as soon as the pool has room for it; to the next server where this one ends."""
    try:
        for job in jobs:
            await resume_job(job, runner, store, state)
    except Draining:
        pass
    finally:
        for job in jobs:
            runner.give_back(job)


async def resume_job(job: ActiveJob, runner: JobRunner, store: JobStore, state: AppState) -> None:
    """Raises `Draining`."""
    try:
        generation = await start_again(job, store, state)
    except Draining:
        raise
    except Exception as error:
        if not isinstance(error, PipelineError | ServerError):
            log.error("job_not_resumed", job=job.record.id, exc_info=error)
        runner.refuse(job, error)
    else:
        if generation is not None:
            runner.run(job, generation)


async def start_again(job: ActiveJob, store: JobStore, state: AppState) -> Generation | None:
    """The job's generation when the pool admits it; None if the job is cancelled before, which has ended it."""
    assert job.record.request is not None
    spec = JobSpec.from_json(job.record.request, state.served)
    request = spec.rebuild_request(state.served, await read_source(job, store, state))
    while not job.cancelled:
        with suppress(NotReady, WorkersSuspended):
            if state.pool.has_room:  # else the refusal would move the line of those who wait for a place
                return Generation.start(state, spec, request, Caller(job.record.owner), resumed=True, durable=True)
        await asyncio.sleep(RETRY)
    return None


async def read_source(job: ActiveJob, store: JobStore, state: AppState) -> bytes:
    """The source's pixels, as soon as the database gives them: its failure is not the job's."""
    while not job.cancelled:
        try:
            return await state.threads.run("database", store.source, job.record.id)
        except StorageFailure as error:
            log.error("source_not_read", job=job.record.id, error=type(error).__name__, again_in=REREAD)
            await asyncio.sleep(REREAD)
    return b""
