"""A real Prometheus, as `apt-get install prometheus` brings it, and what the files in deploy/ ask it."""

import json
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml
from support.server import free_port
from support.waiting import LIMIT, within

DEPLOY = Path(__file__).parents[2] / "deploy"
ALERTS = DEPLOY / "prometheus" / "alerts.yml"
DASHBOARD = DEPLOY / "grafana" / "dashboard.json"
VARIABLES = {"$instance": ".*", "$__rate_interval": "1m", "$__range": "5m"}  # as Grafana would put them in


@dataclass(frozen=True)
class Panel:
    """A panel of the dashboard, and its expressions as Prometheus gets them."""

    title: str
    expressions: tuple[str, ...]


def panels() -> list[Panel]:
    found = json.loads(DASHBOARD.read_text())["panels"]
    return [
        Panel(panel["title"], tuple(fill_in(target["expr"]) for target in panel["targets"]))
        for panel in found
        if panel["type"] != "row"
    ]


def fill_in(expression: str) -> str:
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    assert "$" not in expression, expression
    return expression


def alerts() -> list[dict[str, Any]]:
    rules: list[dict[str, Any]] = yaml.safe_load(ALERTS.read_text())["groups"][0]["rules"]
    return rules


def selectors(expression: str) -> Iterator[tuple[str, set[str]]]:
    """The metrics of this server that an expression names, and the labels that it chooses them by."""
    for name, braces in re.findall(r"\b(srpo_\w+)(?:\{([^}]*)\})?", expression):
        yield name, set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", braces))


class Prometheus:
    def __init__(self, url: str) -> None:
        self.url = url

    def query(self, expression: str) -> list[dict[str, Any]]:
        reply = httpx.get(f"{self.url}/api/v1/query", params={"query": expression}, timeout=LIMIT)
        assert reply.status_code == 200, reply.text
        result: list[dict[str, Any]] = reply.json()["data"]["result"]
        return result

    def value(self, expression: str) -> float:
        """Of an expression with one sample; NaN-free sums of nothing are 0."""
        found = self.query(expression)
        return float(found[0]["value"][1]) if found else 0.0

    def alerts(self, *states: str) -> set[str]:
        """The names of those that are in one of the states, `pending` or `firing`, at the last evaluation."""
        alerts = httpx.get(f"{self.url}/api/v1/alerts", timeout=LIMIT).json()["data"]["alerts"]
        return {alert["labels"]["alertname"] for alert in alerts if alert["state"] in states}

    def firing(self) -> set[str]:
        return self.alerts("firing")


@contextmanager
def prometheus(folder: Path, target: str) -> Iterator[Prometheus]:
    """The configuration of deploy/, but quicker, with the server at `target`."""
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "500ms", "evaluation_interval": "500ms"}
    config["rule_files"] = [str(ALERTS)]
    (job,) = config["scrape_configs"]
    job["static_configs"] = [{"targets": [target]}]
    folder.mkdir(parents=True)
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_port()}"
    command = ["prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([*command, f"--web.listen-address={address}"], stdout=log, stderr=log)
    try:
        assert within(LIMIT, lambda: is_ready(f"http://{address}")), (folder / "log").read_text()
        yield Prometheus(f"http://{address}")
    finally:
        process.terminate()
        process.wait(LIMIT)


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/-/ready", timeout=LIMIT).status_code == 200
    except httpx.TransportError:
        return False
