"""What compose and systemd are told, held against the Dockerfile and the settings; test_image.py runs the image."""

import configparser
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import openai
import pytest
import yaml
from support.nginx import find_nginx, running_nginx, write_configuration
from support.server import free_port

from server.settings.server import Settings

ROOT = Path(__file__).parent.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text()
PREFIX = str(Settings.model_config["env_prefix"])


def settings_of(variables: dict[str, str]) -> dict[str, str]:
    return {name.removeprefix(PREFIX).lower(): value for name, value in variables.items() if name.startswith(PREFIX)}


def test_dependencies_are_installed_before_any_code_is_copied() -> None:
    """So an engine's cache holds them, whatever changes in the code."""
    before, install, _ = DOCKERFILE.partition("-c constraints.txt torch")
    assert install
    assert re.findall(r"^COPY (.*)$", before, re.MULTILINE) == ["constraints.txt hashes.txt ./"]


def test_an_image_with_more_extras_installs_what_they_name() -> None:
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (program,) = re.findall(r"python -c '(.*)' \$\{EXTRAS\} > extras.txt", DOCKERFILE)
    listed = subprocess.check_output([sys.executable, "-c", program, "ray", "c2pa"], cwd=ROOT, text=True)
    assert listed.splitlines() == [*known["ray"], *known["c2pa"]]


def test_compose_agrees_with_the_image() -> None:
    (service,) = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())["services"].values()
    assert service["read_only"]
    assert service["init"]
    assert "/tmp" in service["tmpfs"]
    assert set(settings_of(service["environment"])) <= set(Settings.model_fields)
    mounted = {volume.removesuffix(":ro").rpartition(":")[2] for volume in service["volumes"]}
    assert mounted == {"/data", "/models"}
    (port,) = re.findall(r"^EXPOSE (\d+)$", DOCKERFILE, re.MULTILINE)
    assert service["ports"] == [f"${{BIND:-127.0.0.1}}:{port}:{port}"]  # TLS comes before other machines do
    (file,) = service["env_file"]
    assert (ROOT / "deploy" / file["path"]).resolve() == ROOT / "srpo.env"
    assert "/srpo.env" in (ROOT / ".gitignore").read_text().split()  # keys are in it
    assert int(service["stop_grace_period"].rstrip("s")) > Settings.model_fields["shutdown_grace"].default
    assert service["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]


def test_the_unit_agrees_with_the_server() -> None:
    unit = configparser.RawConfigParser(strict=False)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(ROOT / "deploy/srpo.service")
    service = unit["Service"]
    assert service["ExecStart"].endswith("/srpo serve")
    assert int(service["TimeoutStopSec"]) > Settings.model_fields["shutdown_grace"].default
    text = (ROOT / "deploy/srpo.service").read_text()
    assigned = [word for line in text.splitlines() if line.startswith("Environment=") for word in line[12:].split()]
    assert set(settings_of(dict(word.split("=", 1) for word in assigned))) == {"models_dir", "data_dir"}


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_the_unit_is_hardened() -> None:
    """By systemd's own table, from 0 (all closed) to 100."""
    unit = str(ROOT / "deploy/srpo.service")
    command = ["systemd-analyze", "security", "--offline=true", "--threshold=20", unit]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout[-300:]


needs_nginx = pytest.mark.skipif(find_nginx() is None, reason="nginx is not installed (Debian: apt-get install nginx)")


@needs_nginx
def test_nginx_takes_the_example(tmp_path: Path) -> None:
    """`make replicas` runs it."""
    command = write_configuration(tmp_path, 8080, [8000, 8001])
    assert (tmp_path / "srpo.conf").read_text().count("server 127.0.0.1:") == 2
    tried = subprocess.run([*command, "-t"], capture_output=True, text=True)
    assert tried.returncode == 0, tried.stderr


@needs_nginx
def test_where_no_server_can_be_reached_nginx_says_so_as_they_would() -> None:
    with (
        running_nginx([free_port()]) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client,
        pytest.raises(openai.InternalServerError) as refused,
    ):
        client.images.generate(prompt="x")
    assert refused.value.code == "unavailable"
    assert "No server can be reached" in refused.value.message
    assert refused.value.response.headers["retry-after"] == "5"
