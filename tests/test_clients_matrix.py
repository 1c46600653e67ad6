"""The matrix of real clients: one that cannot be run is said, and ends nothing."""

import runpy
from pathlib import Path
from typing import Any

import pytest
from support.waiting import LIMIT, within

FOLDER = Path(__file__).parent / "clients"


@pytest.fixture(scope="module")
def matrix() -> dict[str, Any]:
    """What `tests/clients` consists of."""
    return runpy.run_path(str(FOLDER))


def row(matrix: dict[str, Any], setting: str = "", **fields: Any) -> Any:
    return matrix["Client"](name="curl", install=(), program="curl.sh", pictures=1, setting=setting, **fields)


def results(matrix: dict[str, Any], *rows: Any) -> dict[str, str]:
    return {found["setting"]: found["result"] for found in matrix["run_all"](rows)}


def test_a_server_that_does_not_start_is_said(matrix: dict[str, Any]) -> None:
    (result,) = results(matrix, row(matrix, "SRPO_QUEUE_SIZE=many")).values()
    assert result.startswith("not run: the server: ")
    assert "queue_size" in result.lower()


def test_a_server_that_starts_slowly_ends_no_other_row(matrix: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(matrix["serving"].__wrapped__.__globals__, "START_LIMIT", 0)
    found = results(matrix, row(matrix), row(matrix, "SRPO_QUEUE_SIZE=2"))
    assert found == dict.fromkeys(("", "SRPO_QUEUE_SIZE=2"), "not run: the server: not ready after 0 s")


def test_a_client_that_cannot_be_installed_is_not_run(matrix: dict[str, Any]) -> None:
    reason = "it is in no package"
    assert results(matrix, row(matrix, missing=reason)) == {"": f"not run: {reason}"}
    others = [matrix["Client"](name, (), "", 1, missing=f"no {name}") for name in ("one", "two")]
    assert [found["result"] for found in matrix["run_all"](others)] == ["not run: no one", "not run: no two"]
    unknown = matrix["Client"]("none", (("--no-index", "no-such-client==1"),), "openai_sdk.py", 1)
    (found,) = matrix["run_all"]([unknown])
    assert found["result"].startswith("not run: ERROR: No matching distribution found")


def test_what_a_program_has_started_ends_with_it(matrix: dict[str, Any], tmp_path: Path) -> None:
    pid = matrix["carry_out"](["sh", "-c", "sleep 600 >/dev/null 2>&1 & echo $!"], tmp_path, 60).strip()
    assert within(LIMIT, lambda: ended(pid))


def ended(pid: str) -> bool:
    """Whether a process is over, whoever has to collect it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True
