"""A cluster whose engines do what the prompt says: `python -m support.ray_cluster FOLDER`. It ends with SIGTERM."""

import signal
import sys
import threading

from server.cluster.session import prepare_environment, running_cluster
from server.cluster.settings import ClusterSettings


def main() -> None:
    settings = ClusterSettings()
    settings.data_dir.mkdir(exist_ok=True)
    prepare_environment(settings)
    over = threading.Event()
    with running_cluster(settings, "support.scripted_engine:load"):
        import ray  # not before its environment is prepared

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: over.set())
        print(f"control: {ray.get_runtime_context().gcs_address}", flush=True)
        over.wait()


if __name__ == "__main__":
    sys.exit(main())
