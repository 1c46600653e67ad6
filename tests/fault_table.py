"""`make faults`, its second part: what good clients notice of each fault, as a table. Fails where anything was lost,
answered twice or drawn wrongly.
"""

import sys
import tempfile
from dataclasses import fields
from pathlib import Path

from support.faults import FAULTS, Outcome, run_fault


def main() -> int:
    head = [field.name for field in fields(Outcome)]
    print("| " + " | ".join(head) + " |", "|" + " --- |" * len(head), sep="\n", flush=True)
    bad = []
    for case in FAULTS:
        with tempfile.TemporaryDirectory() as folder:
            outcome = run_fault(case, Path(folder))
        print(f"| {outcome} |", flush=True)
        if outcome.lost or outcome.duplicated or outcome.wrong:
            bad.append(case)
    if bad:
        print(f"Not survived: {', '.join(bad)}")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
