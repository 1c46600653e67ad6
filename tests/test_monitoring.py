"""The dashboard and the alerts in deploy/: every metric in them exists, and a real Prometheus makes sense of them."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from support.jobs import PREFER, ended
from support.ledgers import disks_permitted, fill, small_disk
from support.prometheus import ALERTS, DASHBOARD, DEPLOY, Prometheus, alerts, panels, prometheus, selectors
from support.server import LiveServer, free_port, running, wait_ready
from support.waiting import LIMIT, within

from server.metrics.table import METRICS
from server.settings.server import Settings

PATH = "/v1/images/generations"
ROOT = Path(__file__).parent.parent
SERIES = {
    f"{metric.name}{suffix}": {*metric.labels, *(["le"] if suffix == "_bucket" else [])}
    for metric in METRICS
    for suffix in (("_bucket", "_sum", "_count") if metric.kind == "histogram" else ("",))
}
ADDED = {"instance", "job"}  # by Prometheus itself
NEEDS_A_CARD = {"Device memory", "Memory of the cards"}
OF_THE_MACHINE = {"SrpoDiskFull", "SrpoWorkerSilent"}  # true alarms where others fill its disk or take its cores
needs_prometheus = pytest.mark.skipif(
    not shutil.which("prometheus"), reason="no prometheus (apt-get install prometheus)"
)


# ---- The files


def expressions() -> Iterator[str]:
    yield from (alert["expr"] for alert in alerts())
    yield from (expression for panel in panels() for expression in panel.expressions)
    yield from (note["expr"] for note in json.loads(DASHBOARD.read_text())["annotations"]["list"])


def test_every_metric_and_label_of_the_dashboard_and_the_alerts_exists() -> None:
    named = [selector for expression in expressions() for selector in selectors(expression)]
    for name, labels in named:
        assert name in SERIES, name
        assert labels <= SERIES[name] | ADDED, (name, labels)


def test_what_is_measured_is_shown() -> None:
    shown = {name for expression in expressions() for name, _ in selectors(expression)}
    hidden = {
        metric.name for metric in METRICS if not any(name in shown for name in SERIES if name.startswith(metric.name))
    }
    assert hidden == {"srpo_requests_admitted_total"}  # finished ones say more


def test_panels_do_not_overlap_and_have_a_title_and_a_meaning() -> None:
    board = json.loads(DASHBOARD.read_text())
    cells: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        at = panel["gridPos"]
        own = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not own & cells, panel["title"]
        assert at["x"] + at["w"] <= 24
        cells |= own
        assert panel["type"] == "row" or panel["description"].endswith("."), panel["title"]
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_an_alert_says_what_is_wrong_and_what_to_do() -> None:
    tested = (ROOT / "tests" / "prometheus" / "alerts.yml").read_text()
    for alert in alerts():
        assert set(alert["annotations"]) == {"summary", "action"}, alert["alert"]
        assert alert["labels"]["severity"] in ("page", "ticket")
        assert f'alertname="{alert["alert"]}"' in tested, alert["alert"]
        for name in re.findall(r"SRPO_([A-Z_]+)", alert["annotations"]["action"]):
            assert name.lower() in Settings.model_fields, name


def test_compose_runs_them_with_the_servers_own_port() -> None:
    services = yaml.safe_load((DEPLOY / "compose.monitoring.yaml").read_text())["services"]
    port = services["srpo"]["environment"]["SRPO_METRICS_PORT"]
    (job,) = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    assert job["static_configs"] == [{"targets": [f"127.0.0.1:{port}"]}]
    assert services["prometheus"]["network_mode"] == "service:srpo"
    for service in ("prometheus", "grafana"):
        for volume in services[service]["volumes"]:
            source = volume.partition(":")[0]
            assert not source.startswith(".") or (DEPLOY / source).exists(), source


@pytest.mark.skipif(not shutil.which("promtool"), reason="no promtool (apt-get install prometheus)")
@pytest.mark.parametrize(
    "command",
    ["check config deploy/prometheus/prometheus.yml", "test rules tests/prometheus/alerts.yml"],
)
def test_promtool_agrees(command: str) -> None:
    ended = subprocess.run(["promtool", *command.split()], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr


# ---- A real Prometheus


def load(server: LiveServer) -> dict[str, int]:
    """Mixed requests, several at a time. Returns what it counted."""
    fields: list[dict[str, Any]] = [
        *({"num_images": count % 4 + 1, "seed": count + 1} for count in range(8)),
        *({"num_inference_steps": 28, "acceleration": preset} for preset in ("none", "regular", "high")),
        *({"num_images": 7} for _ in range(5)),
        {"image_size": "square_hd"},
    ]
    with ThreadPoolExecutor(4) as threads:
        replies = list(threads.map(lambda own: server.generate(**own), fields))
    job = httpx.post(
        server.url + PATH, json={"model": "flux/srpo", "prompt": "x", "image_size": "square"}, headers=PREFER
    )
    assert job.status_code == 202, job.text
    ended(server, job.json()["id"])
    drawn = [reply.json() for reply in replies if reply.is_success]
    return {
        "succeeded": len(drawn) + 1,
        "invalid": sum(reply.status_code == 400 for reply in replies),
        "images": sum(len(reply["images"]) for reply in drawn) + 1,
        "flagged": sum(sum(reply["has_nsfw_concepts"]) for reply in drawn),
    }


@pytest.mark.operate
@needs_prometheus
def test_prometheus_counts_what_the_load_generator_counted_and_answers_every_panel(tmp_path: Path) -> None:
    port = free_port()
    with (
        running(tmp_path / "server", metrics_port=str(port)) as server,
        prometheus(tmp_path / "prometheus", f"127.0.0.1:{port}") as asked,
    ):
        assert within(LIMIT, lambda: asked.value("up") == 1)
        counted = load(server)
        of_route = f'srpo_http_requests_total{{route="{PATH}", method="POST", status="400"}}'
        expected = {
            'sum(srpo_requests_finished_total{outcome="succeeded"})': counted["succeeded"],
            "sum(srpo_requests_finished_total)": counted["succeeded"],
            "sum(srpo_images_total)": counted["images"],
            'sum(srpo_images_checked_total{flagged="true"})': counted["flagged"],
            f"sum({of_route})": counted["invalid"],
        }
        seen: dict[str, float] = {}

        def agree() -> bool:
            """All at once: a scrape may come between two counters of one request."""
            seen.update({expression: asked.value(expression) for expression in expected})
            return seen == expected

        assert within(LIMIT, agree), (seen, expected)
        load(server)  # so that rates have a second sample of every series
        answered: dict[str, bool] = {}

        def all_answered() -> bool:
            answered.update({panel.title: all(asked.query(own) for own in panel.expressions) for panel in panels()})
            return all(found for title, found in answered.items() if title not in NEEDS_A_CARD)

        assert within(LIMIT, all_answered), [title for title, found in answered.items() if not found]
        assert asked.firing() <= OF_THE_MACHINE


def fires(asked: Prometheus, alert: str) -> bool:
    return within(LIMIT, lambda: alert in asked.firing())


@pytest.mark.operate
@needs_prometheus
def test_a_killed_worker_and_a_server_that_is_gone_raise_alerts(tmp_path: Path) -> None:
    port = free_port()
    with prometheus(tmp_path / "prometheus", f"127.0.0.1:{port}") as asked:
        with running(tmp_path / "server", metrics_port=str(port)) as server:
            assert within(LIMIT, lambda: asked.value("srpo_worker_restarts_total + 1") == 1)
            (worker,) = httpx.get(f"{server.url}/health", timeout=LIMIT).json()["worker_pids"]
            os.kill(worker, signal.SIGKILL)
            assert fires(asked, "SrpoWorkerDied")
            assert server.generate().status_code == 201
        assert within(LIMIT, lambda: asked.value("up + 1") == 1)
        # the rules are evaluated by a clock of their own, and this one fires after a minute
        assert within(LIMIT, lambda: "SrpoDown" in asked.alerts("pending", "firing"))


@pytest.mark.operate
@needs_prometheus
def test_a_spent_quota_raises_an_alert(tmp_path: Path) -> None:
    port = free_port()
    with (
        running(tmp_path / "server", metrics_port=str(port), api_keys="first-key-of-all", key_images="1") as server,
        prometheus(tmp_path / "prometheus", f"127.0.0.1:{port}") as asked,
    ):
        refused = 'srpo_requests_refused_total{reason="insufficient_quota"} + 1'
        assert within(LIMIT, lambda: asked.value(refused) == 1)
        headers = {"authorization": "Bearer first-key-of-all"}
        body = {"model": "flux/srpo", "prompt": "x", "image_size": "square", "num_inference_steps": 1}
        replies = [httpx.post(server.url + PATH, json=body, headers=headers, timeout=LIMIT) for _ in range(2)]
        assert [reply.status_code for reply in replies] == [201, 403]
        assert fires(asked, "SrpoQuotaSpent")


@pytest.mark.operate
@needs_prometheus
def test_a_full_disk_raises_an_alert(tmp_path: Path) -> None:
    """On a real small one, which another program fills."""
    if not disks_permitted(tmp_path):
        pytest.skip("this machine does not permit a disk in a namespace")
    data, port, metrics_port = tmp_path / "data", free_port(), free_port()
    data.mkdir()
    flags = ["--port", str(port), "--metrics-port", str(metrics_port), "--data-dir", str(data), "--model", "tiny"]
    command = small_disk(data, "24m", sys.executable, "-m", "server", "serve", *flags)
    with (
        (tmp_path / "log").open("wb") as log,
        prometheus(tmp_path / "prometheus", f"127.0.0.1:{metrics_port}") as asked,
    ):
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT)
        try:
            wait_ready(f"http://127.0.0.1:{port}", process, tmp_path / "log")
            assert within(LIMIT, lambda: asked.value("srpo_disk_free_bytes") > 0)
            assert "SrpoDiskFull" not in asked.firing()
            fill(Path(f"/proc/{process.pid}/root{data}"))
            assert fires(asked, "SrpoDiskFull")
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(LIMIT)


def test_the_rules_are_where_prometheus_looks_for_them() -> None:
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    assert [(DEPLOY / "prometheus" / name).resolve() for name in config["rule_files"]] == [ALERTS.resolve()]
