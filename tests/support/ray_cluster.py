"""As `srpo cluster up`, with engines that do what the prompt says: `python -m support.ray_cluster`."""

import signal

from server.cli.cluster import REDEPLOY, announced, operate, take_orders
from server.cli.terminal.banner import format_address
from server.cluster.session import prepare_environment, running_cluster
from server.cluster.settings import ClusterSettings
from server.process.data_folder import lock_data_folder


def main() -> None:
    settings = ClusterSettings()
    settings.data_dir.mkdir(exist_ok=True)
    orders = take_orders(REDEPLOY)
    address = format_address(settings, settings.port, own=True)
    with lock_data_folder(settings.data_dir), announced(settings.data_dir, address):
        prepare_environment(settings)
        with running_cluster(settings, "support.scripted_engine:load") as cluster:
            import ray  # not before its environment is prepared

            take_orders(signal.SIGTERM, signal.SIGINT, orders=orders)
            print(f"control: {ray.get_runtime_context().gcs_address}", flush=True)
            operate(cluster, orders, settings.data_dir, print)


if __name__ == "__main__":
    main()
