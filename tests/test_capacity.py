"""The capacity model against closed forms of queueing theory, and its command against a server that draws nothing."""

import json
from pathlib import Path

import pytest

from bench.support.plans import parse_mix
from bench.support.simulation import Limits, Visit, draw_arrivals, simulate
from server.cli.bench import main

ENDLESS = 10**9  # places in the queue


def visits_of(mix: str, rate: float, requests: int, limits: Limits) -> list[Visit]:
    visits = draw_arrivals(parse_mix(mix, {}), rate, requests)
    simulate(limits, visits)
    return visits


def test_alike_requests_wait_as_the_formula_of_pollaczek_and_khinchine_says() -> None:
    load = 0.5
    visits = visits_of("none:512x512:1@1", load, 4000, Limits(1, ENDLESS))
    waits = [visit.ended - visit.arrived - 1 for visit in visits if visit.ended is not None]
    free, exact = 0.0, []
    for visit in visits:  # Lindley's recursion: the same arrivals, one after the other
        exact.append(max(0.0, free - visit.arrived))
        free = max(free, visit.arrived) + 1
    assert waits == pytest.approx(exact)
    assert sum(waits) / len(waits) == pytest.approx(load / (2 * (1 - load)), rel=0.1)


def test_cards_without_a_queue_refuse_as_erlangs_formula_says() -> None:
    """It holds for any mix of lengths, also where requests of unlike sizes come."""
    devices, load = 3, 0.9
    offered = devices * load  # erlangs: the mean request takes a second
    terms = [1.0]
    for number in range(1, devices + 1):
        terms.append(terms[-1] * offered / number)
    visits = visits_of("none:512x512:1@0.5,high:1024x1024:2@1.5", offered, 6000, Limits(devices, 0, 1))
    assert sum(visit.refused for visit in visits) / len(visits) == pytest.approx(terms[-1] / sum(terms), rel=0.05)


def test_short_requests_do_not_wait_for_long_ones_where_several_run_at_a_time() -> None:
    mix = "none:512x512:2=9@0.1,none:1024x1024:50=1@5"
    p95 = {}
    for running in (1, 16):
        visits = visits_of(mix, 1.0, 1000, Limits(1, ENDLESS, running))
        short = sorted(visit.ended - visit.arrived for visit in visits if visit.ended and visit.kind.plan.seconds < 1)
        p95[running] = short[int(0.95 * len(short))]
    assert p95[1] > 5
    assert p95[16] < 1


def test_a_request_that_takes_too_long_ends_without_an_image() -> None:
    visits = visits_of("none:512x512:4@1", 2.0, 100, Limits(1, ENDLESS, request_timeout=10.0))
    ended = [visit for visit in visits if visit.ended is not None]
    assert 0 < len(ended) < len(visits)
    assert all(visit.ended - visit.arrived <= 10 for visit in ended if visit.ended is not None)


def run(capsys: pytest.CaptureFixture[str], file: Path, *arguments: str) -> tuple[str, dict]:
    assert main(["capacity", *arguments, "--json", str(file)]) == 0
    return capsys.readouterr().out, json.loads(file.read_text())


def test_bench_capacity_says_what_cards_carry(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    few = ["--requests", "600", "--queue-size", "4", "--max-running", "4", "--mix", "none:512x512:4@0.5"]
    printed, figures = run(capsys, tmp_path / "f.json", *few, "--devices", "1,20", "--load", "0.5,2", "--price", "3")
    rows = {(row["devices"], row["load"]): row for row in figures["rows"]}
    assert [row["servers"] for row in rows.values()] == [1, 1, 3, 3]
    assert rows[1, 0.5]["refused"] < 0.01
    assert rows[1, 2]["refused"] == pytest.approx(0.5, abs=0.05)
    day = 86400 / 0.5
    assert rows[1, 2]["images_per_day"] == pytest.approx(day, rel=0.03)  # a card that always draws
    assert rows[20, 2]["images_per_day"] == pytest.approx(20 * day, rel=0.05)
    assert rows[1, 2]["usd_per_1000_images"] == pytest.approx(3 * 1000 / 7200, rel=0.03)
    assert rows[20, 0.5]["p95_s"] <= rows[1, 0.5]["p95_s"]
    assert "images a day" in printed


def test_bench_capacity_takes_what_bench_engine_has_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    times = tmp_path / "times.json"
    stages = {"512x512": {"text": 0.1, "step": 0.2, "skipped_step": None, "decode": 0.1}}
    times.write_text(json.dumps({"stages": stages}))
    few = ["--times", str(times), "--requests", "50", "--devices", "1", "--load", "0.01", "--host-ms", "0"]
    _, figures = run(capsys, tmp_path / "f.json", *few, "--mix", "none:512x512:4")
    assert figures["rows"][0]["p50_s"] == pytest.approx(1.0)
    _, figures = run(capsys, tmp_path / "f.json", *few, "--mix", "none:1024x512:4")  # twice the pixels
    assert figures["rows"][0]["p50_s"] == pytest.approx(0.1 + 2 * 0.9)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--mix", "fast:512x512:4@1"], "with a preset of none, regular, high"),
        (["--mix", "none:100x100:4@1"], "a size or number of steps that the API refuses"),
        (["--mix", "none:512x512:4"], "says no seconds (@0.75), and no --times are given"),
        (["--mix", "none:512x512:4=0@1"], "shares and seconds are positive numbers"),
        (["--times", "pyproject.toml"], "is not what `srpo bench engine --json` writes"),
        (["--devices", "0"], "argument --devices: invalid"),
        (["--queue-size", "-1"], "--queue-size is not negative"),
    ],
)
def test_bad_arguments_are_said_in_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["capacity", *arguments])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_the_check_sends_what_was_simulated_to_a_real_server(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--check", "--devices", "2", "--load", "0.4", "--seconds", "2", "--mix", "none:512x512:2@0.2"]
    printed, figures = run(capsys, tmp_path / "f.json", *small)
    assert figures["predicted"]["requests"] == figures["measured"]["requests"] == 8
    assert figures["predicted"]["refused"] == figures["measured"]["refused"] == 0
    assert figures["measured"]["p50_s"] > 0.2
    assert "predicted" in printed


def test_bench_api_says_what_a_request_costs_the_server(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    file = tmp_path / "f.json"
    assert (
        main(["api", "--clients", "2", "--size", "512x512", "--seconds", "0.2", "--steps", "0", "--json", str(file)])
        == 0
    )
    figures = json.loads(file.read_text())
    rows = {(row["reply"], row.get("safety")): row for row in figures["rows"]}
    assert set(rows) == {
        ("url", True),
        ("url", False),
        ("b64_json", True),
        ("b64_json", False),
        ("GET /v1/models", None),
    }
    assert rows["b64_json", True]["reply_bytes"] > 50_000 > rows["url", True]["reply_bytes"]
    checked, unchecked = rows["url", True], rows["url", False]
    assert checked["cpu_ms"] > 0 < unchecked["cpu_ms"]
    assert checked["parts_ms"]["encoding: encode_one"] > 0 < unchecked["parts_ms"]["encoding: encode_one"]
    assert checked["parts_ms"]["safety: inspect"] > 0
    assert all(count["cards_a_core"] > 0 for count in figures["cards"].values())
    assert "requests/s" in capsys.readouterr().out
