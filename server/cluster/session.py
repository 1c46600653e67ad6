"""A cluster on this machine, for as long as this process lives: Ray's processes are its children."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager

from server.cluster.proxy import CALLBACK
from server.cluster.settings import ClusterSettings

TOKEN_FILE = "ray.token"  # noqa: S105 - its name
CPUS = 4  # logical: replicas ask for none


def prepare_environment(settings: ClusterSettings) -> None:
    """What Ray and the replicas read, set before Ray is imported. The token is made where there is none."""
    token = settings.data_dir.absolute() / TOKEN_FILE
    if not token.exists():
        token.touch(0o600)
        token.write_text(secrets.token_hex(32))
    os.environ.update(settings.to_environment())
    os.environ.update(CALLBACK)
    os.environ.update(
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN_PATH=str(token),
        RAY_USAGE_STATS_ENABLED="0",
        RAY_SERVE_ENABLE_HA_PROXY="0",  # it listens on all addresses
        RAY_SERVE_LOG_TO_STDERR="0",
        RAY_ENABLE_UV_RUN_RUNTIME_ENV="0",
    )


@contextmanager
def running_cluster(settings: ClusterSettings, factory: str | None = None) -> Iterator[str]:
    """The address of a cluster that serves, until the context ends. Call `prepare_environment` before.

    At the end replicas finish what they have, within `request_timeout`.
    """
    import ray
    from ray import serve

    from server.cluster.application import NAME, build_application

    gpus = settings.engines * settings.engine_gpus
    ray.init(
        address="local",
        num_cpus=CPUS,
        num_gpus=int(-(-gpus // 1)) or None,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
    )
    try:
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": settings.host, "port": settings.port},
            logging_config={"enable_access_log": False},
        )
        serve.run(build_application(settings, factory), name=NAME, route_prefix="/")
        yield f"http://{settings.host}:{settings.port}"
        serve.delete(NAME)
    finally:
        serve.shutdown()
        ray.shutdown()
