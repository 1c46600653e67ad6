"""A cluster on this machine, for as long as this process lives: Ray's processes are its children."""

import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from server.cluster.proxy import CALLBACK
from server.cluster.settings import ClusterSettings, EngineCount

TOKEN_FILE = "ray.token"  # noqa: S105 - its name
ADDRESS = "RAY_ADDRESS"  # where a cluster that runs already is
CPUS = 4  # logical: replicas ask for none
QUIET: Mapping[str, Any] = {"log_to_driver": False, "configure_logging": False}  # of `ray.init`

# Where others start Ray, these are to be set on each machine (docs/cluster.md).
RAY = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # else all other programs of the machine come before ours
}
SERVE = CALLBACK | {
    "RAY_SERVE_ENABLE_HA_PROXY": "0",  # it listens on all addresses
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "2",  # a dead proxy is replaced after three failures
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # a new one is not taken for dead while a busy machine starts it
}


def prepare_environment(settings: ClusterSettings) -> None:
    """What Ray and the replicas read, set before Ray is imported."""
    secure_ray(settings.data_dir.absolute() / TOKEN_FILE)
    os.environ.update(settings.to_environment())
    os.environ.update(SERVE)
    os.environ.update(RAY_SERVE_LOG_TO_STDERR="0")


def secure_ray(token: Path) -> None:
    """Let Ray, when it is started, ask for the token in this file. It is made where there is none."""
    if not token.exists():
        token.touch(0o600)
        token.write_text(secrets.token_hex(32))
    os.environ.update(RAY)
    os.environ.update(RAY_AUTH_TOKEN_PATH=str(token), RAY_ENABLE_UV_RUN_RUNTIME_ENV="0")


@dataclass(frozen=True)
class Cluster:
    """A cluster that serves at `address`."""

    address: str
    _settings: ClusterSettings
    _factory: str | None

    def deploy(self) -> None:
        """Replace every replica by a new one, some at a time, while the others serve. The first time: start them.

        Raises `RuntimeError` where new ones do not start.
        """
        from ray import serve

        from server.cluster.application import NAME, build_application

        serve.run(build_application(self._settings, self._factory), name=NAME, route_prefix="/")


def start_ray(settings: EngineCount) -> None:
    """Ray on this machine, with the (logical) GPUs that the engines need. `ray.shutdown` ends it."""
    import ray

    ray.init(address="local", num_cpus=CPUS, num_gpus=ceil(settings.gpus), include_dashboard=False, **QUIET)


@contextmanager
def running_cluster(settings: ClusterSettings, factory: str | None = None) -> Iterator[Cluster]:
    """A cluster that serves, until the context ends. Call `prepare_environment` before.

    At the end replicas finish what they have, within `request_timeout`.
    """
    import ray
    from ray import serve

    from server.cluster.application import NAME

    start_ray(settings)
    try:
        with suppress(TimeoutError):  # the proxy takes longer than a minute on a busy machine, and comes all the same
            serve.start(
                proxy_location="HeadOnly",
                http_options={"host": settings.host, "port": settings.port},
                logging_config={"enable_access_log": False},
            )
        cluster = Cluster(f"http://{settings.host}:{settings.port}", settings, factory)
        cluster.deploy()
        yield cluster
        serve.delete(NAME)
    finally:
        serve.shutdown()
        ray.shutdown()
