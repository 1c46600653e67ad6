"""Real parts for the tests: a real `srpo serve` on a real loopback port, with the tiny model."""

import functools
import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from support.buckets import S3Service, running_s3
from support.clients import failing, failing_server
from support.cluster_site import running_cluster
from support.node import clients, node
from support.pictures import canary, public
from support.postgres import Postgres, running_postgres
from support.replicas import running_pair
from support.server import LiveServer, running

from pipelines.safety import open_nsfw

# The models here are so small that a second torch thread only waits, minutes long on a machine that has other work.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# An example may take as long as it likes: 200 ms pass on a machine that has other work, whatever is tested.
settings.register_profile("ours", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ours")

gc.disable()  # until all tests are imported, with all their libraries: nothing is to be freed there

__all__ = ["canary", "clients", "failing", "failing_server", "node", "public"]  # fixtures


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cluster", action="store_true", help="the shared server is a cluster of Ray Serve (make ray)")
    parser.addoption("--replicas", action="store_true", help="the shared server is two behind nginx (make replicas)")


def pytest_xdist_auto_num_workers() -> int:
    """One more than there are processors, since many tests wait; above five they would only wait for memory."""
    return min(5, 1 + (os.cpu_count() or 1))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Before several servers come only the tests of the shared server, without those of one server itself."""
    if config.getoption("replicas") or config.getoption("cluster"):
        shared = [item for item in items if "live" in getattr(item, "fixturenames", ())]
        items[:] = [item for item in shared if item.get_closest_marker("direct") is None]


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def _one_embedded_checker() -> Iterator[None]:
    """The network is read and compiled once a process. Each server still proves at its start that the checker works."""
    load = open_nsfw.load_open_nsfw
    load_of = functools.cache(lambda packages: load())  # a test that changes the packages gets what it asks for

    @functools.wraps(load)
    def load_once() -> open_nsfw.OpenNsfw:
        return load_of(open_nsfw.OPEN_NSFW)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(open_nsfw, "load_open_nsfw", load_once)
        yield


@pytest.fixture(scope="session")
def live(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[LiveServer]:
    """One server with default settings, shared by all tests that do not change it."""
    start = running_pair if request.config.getoption("replicas") else running
    if request.config.getoption("cluster"):
        start = running_cluster
    with start(tmp_path_factory.mktemp("live")) as server:
        yield server


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A Postgres for all tests; each takes a database of its own, and starts it again if it has killed it."""
    with running_postgres() as server:
        yield server


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Service]:
    """An S3 service for all tests; each takes a bucket of its own."""
    with running_s3() as service:
        yield service


@pytest.fixture(scope="session")
def live_with_key(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server that asks for the key `secret-key-1`, and refuses others at once."""
    with running(tmp_path_factory.mktemp("keys"), api_keys="secret-key-1,secret-key-2", key_delay="0") as server:
        yield server


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., LiveServer]]:
    """A factory of servers of one's own."""
    with ExitStack() as stack:
        folders = (tmp_path / f"server-{number}" for number in count())
        yield lambda *flags, **env: stack.enter_context(running(next(folders), *flags, **env))


@pytest.fixture(autouse=True)
def _attention_backend() -> Iterator[None]:
    """diffusers' `set_attention_backend` on one model is the default of all that are made later in the process.

    What a test sets so ends with it.
    """
    yield
    if dispatch := sys.modules.get("diffusers.models.attention_dispatch"):
        dispatch._AttentionBackendRegistry.set_active_backend(dispatch.AttentionBackendName.NATIVE)
