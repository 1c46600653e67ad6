"""The table of `make faults` leaves nothing out: each incident has a row, tests that exist, or waits for a GPU."""

import ast
import re
from pathlib import Path

import fault_table
import pytest
from faults.incidents import GPU, INCIDENTS, TESTS
from faults.table import FAULTS

TESTS_FOLDER = Path(__file__).parent
ROOT = TESTS_FOLDER.parent


def test_each_incident_is_tried_by_a_row_or_a_test_and_nothing_else_is() -> None:
    rows = {number for fault in FAULTS for number in fault.incidents.split()}
    assert rows | set(TESTS) | set(GPU.values()) | {"39"} == set(INCIDENTS)  # 39: make soak
    assert [number for number in INCIDENTS if number.isdecimal()] == [str(number) for number in range(1, 43)]
    assert [number for number in INCIDENTS if not number.isdecimal()] == [f"D{number}" for number in range(1, 16)]


def test_each_test_that_is_named_exists() -> None:
    for number, names in TESTS.items():
        assert names, number
        for name in names:
            module, _, function = name.partition("::")
            source = (TESTS_FOLDER / f"{module}.py").read_text()
            assert re.search(rf"^(async )?def {function}\(", source, re.MULTILINE), name


def test_each_row_has_a_name_of_its_own_and_a_server_one_meaning() -> None:
    assert len({fault.case for fault in FAULTS}) == len(FAULTS)
    servers = [fault.server for fault in FAULTS]
    assert all(one == other for one in servers for other in servers if one.name == other.name)


def test_a_word_that_chooses_no_row_is_an_error_and_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        fault_table.main(["killed", "nosuchrow"])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "no row has 'nosuchrow' in its name" in said
    assert all(fault.case in said for fault in FAULTS)


def test_no_check_of_the_server_is_an_assertion() -> None:
    """Assertions are gone under `python -O`: those that there are say to the type checker what something is."""
    for file in [*(ROOT / "server").rglob("*.py"), *(ROOT / "pipelines" / "safety").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Assert):
                said = ast.unparse(node.test)
                assert re.fullmatch(r"[\w.]+ is not None|isinstance\(.*\)", said), f"{file}:{node.lineno}: {said}"
