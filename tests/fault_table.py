"""`make faults`, its second part: what good clients notice of each fault, as a table. Fails where anything was lost,
answered twice, drawn wrongly or let through, or a worker restarted without need.

Words after the name choose rows: `python tests/fault_table.py killed "say nothing"`.
"""

import sys
import tempfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from dataclasses import fields
from pathlib import Path

from faults.good import CANARY, looks, measure
from faults.incidents import GPU, INCIDENTS, TESTS
from faults.outcome import Fault, Outcome, Server, show_p99
from faults.servers import serving
from faults.table import FAULTS


def main(arguments: list[str]) -> int:
    words = parse_words(arguments)
    chosen = [fault for fault in FAULTS if not words or any(word in fault.case for word in words)]
    head = [field.name.replace("_", " ") for field in fields(Outcome)]
    print("| " + " | ".join(head) + " |", "|" + " --- |" * len(head), sep="\n", flush=True)
    bad = []
    for server in dict.fromkeys(fault.server for fault in chosen):
        bad += run_group(server, [fault for fault in chosen if fault.server == server])
    print(f"\n/health over all rows: p99 {show_p99(looks)} ms of {len(looks)} looks\n")
    if not words:
        show_others(len(head))
    if bad:
        print(f"Not survived: {', '.join(bad)}")
    return bool(bad)


def parse_words(arguments: list[str]) -> list[str]:
    """The words that choose rows. Ends with status 2 where one is in no row's name: an empty table would pass."""
    names = "\n".join(f"  {fault.case}" for fault in FAULTS)
    parser = ArgumentParser(
        description=__doc__, epilog=f"rows:\n{names}", formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("words", nargs="*", metavar="WORD", help="a part of a row's name; none: all rows")
    words: list[str] = parser.parse_args(arguments).words
    for word in words:
        if not any(word in fault.case for fault in FAULTS):
            parser.error(f"no row has {word!r} in its name. The rows:\n{names}")
    return words


def show_others(columns: int) -> None:
    """What needs a GPU, and where each incident is tried."""
    for case, number in GPU.items():
        print(f"| {case} | {number} | not run: needs a GPU |" + " |" * (columns - 3))
    print("\n| incident | what | rows and tests |", "| --- | --- | --- |", sep="\n")
    for number, what in INCIDENTS.items():
        rows = [fault.case for fault in FAULTS if number in fault.incidents.split()]
        soak = ["`make soak`"] if number == "39" else []
        print(f"| {number} | {what} | {'; '.join([*rows, *(f'`{name}`' for name in TESTS.get(number, ())), *soak])} |")


def run_group(server: Server, faults: list[Fault]) -> list[str]:
    """The rows of one server. Returns the cases that were not survived."""
    bad = []
    with tempfile.TemporaryDirectory() as folder, serving(server, Path(folder)) as live:
        for fault in faults:
            outcome = measure(fault, live)
            print(f"| {outcome} |", flush=True)
            if not outcome.sound:
                bad.append(fault.case)
        if CANARY in live.log.read_text(errors="replace"):
            bad.append(f"no prompt in the log of the server {server.name!r}")
    return bad


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
