"""`make replicas`: what clients notice when a server, the database or the bucket fails, as a table.

Three server processes over one Postgres and one bucket, behind nginx. Fails where anything was lost, done twice without
need, or drawn wrongly.
"""

import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from support.nginx import find_nginx
from support.postgres import find_binaries
from support.replicas import LEASE, Load, Site, count_work, kill_database, refuse_bucket, running_site

REPLICAS, REQUESTS = 3, 48
COLUMNS = (
    "case",
    "offered",
    "accepted",
    "finished",
    "lost",
    "duplicated",
    "drawn again",
    "retries",
    "wrong",
    "recovery",
)


def nothing(site: Site) -> None:
    """The row to compare with."""


def kill_server(site: Site) -> None:
    site.busiest().stop(signal.SIGKILL)


def freeze_server(site: Site) -> None:
    """For longer than its lease; then it wakes and believes that nothing has happened."""
    server = site.busiest()
    server.send(signal.SIGSTOP)
    time.sleep(2 * LEASE)
    server.send(signal.SIGCONT)


def restart_all(site: Site) -> None:
    """One after the other, as an upgrade does."""
    for replica in site.replicas:
        replica.stop()
        replica.start()
        replica.wait_ready()


def lose_confirmations(site: Site) -> None:
    site.network.mode = "lose-answers"
    time.sleep(3)
    site.network.mode = "pass"


FAULTS: Mapping[str, Callable[[Site], None]] = {
    "nothing": nothing,
    "a server is killed": kill_server,
    "a server freezes and wakes": freeze_server,
    "every server is restarted": restart_all,
    "Postgres is killed, back after 5 s": kill_database,
    "the bucket refuses for 20 s": refuse_bucket,
    "the bucket's answers are lost for 3 s": lose_confirmations,
}


def run_case(case: str, site: Site, expected: dict[int, set[str]]) -> tuple[dict[str, object], list[str]]:
    """A row, and what is wrong with it. `expected`: the digests of each seed's file, filled by the first row."""
    before = count_work(site)
    load = Load(case, site.url, REQUESTS)
    over = load.run_through(lambda: FAULTS[case](site))
    for replica in site.replicas:  # whoever is dead is started again
        if replica.process is not None and replica.process.poll() is not None:
            replica.start()
        replica.wait_ready()
    site.wait_settled()
    jobs, objects, retries = (now - then for now, then in zip(count_work(site), before, strict=True))
    row = load.judge(jobs, expected, over) | {"drawn again": objects - REQUESTS, "retries": retries}
    bad = load.list_troubles(row)
    if objects - REQUESTS > retries:
        bad.append(f"{objects - REQUESTS} drawn again, {retries} retries")
    return row, bad


def main() -> int:
    for name, found in {"postgresql": find_binaries(), "nginx": find_nginx()}.items():
        if not found:
            print(f"{name} is not installed, so this is not tried (Debian: apt-get install {name})")
            return 0
    print("| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS), sep="\n", flush=True)
    troubles, expected = [], dict[int, set[str]]()
    with tempfile.TemporaryDirectory() as folder, running_site(Path(folder), REPLICAS) as site:
        for case in FAULTS:
            row, bad = run_case(case, site, expected)
            print("| " + " | ".join(str(row[name]) for name in COLUMNS) + " |", flush=True)
            troubles += [f"{case}: {trouble}" for trouble in bad]
    print(*troubles, sep="\n")
    return bool(troubles)


if __name__ == "__main__":
    sys.exit(main())
