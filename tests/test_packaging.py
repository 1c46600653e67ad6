"""What `pip install` gets: the sdist, the wheel built from it, and the server installed from that wheel elsewhere.

The wheel is installed without its dependencies into an environment that sees this one's packages, so that nothing is
fetched and torch is not copied; `make image-test` installs them all. It does not see the checkout.
"""

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import fastapi
import httpx
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from support.server import free_port, wait_ready

from server.__main__ import COMMANDS

ROOT = Path(__file__).parent.parent
ROOMS = ("server", "pipelines", "weights")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()
PICKLES = (".pt", ".bin", ".ckpt", ".pkl")


@dataclass(frozen=True)
class Distributions:
    sdist: Path
    wheel: Path


@dataclass(frozen=True)
class Installation:
    """An environment with the wheel in it, and a folder beside which there is no checkout."""

    bin: Path
    folder: Path

    @property
    def env(self) -> dict[str, str]:
        ours = ("SRPO_", "PYTHON")
        clean = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        return clean | {"SRPO_DEVICES": "cpu"}

    def run(self, *command: str) -> str:
        words = [str(self.bin / command[0]), *command[1:]]
        ended = subprocess.run(words, cwd=self.folder, env=self.env, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout


def tracked() -> set[str]:
    return set(subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).split())


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Distributions:
    """The sdist of the checkout as it is, and the wheel that is built from that sdist."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return Distributions(sdist, wheel)


@pytest.fixture(scope="module")
def installation(distributions: Distributions, tmp_path_factory: pytest.TempPathFactory) -> Installation:
    folder = tmp_path_factory.mktemp("installed")
    environment = folder / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    (packages,) = environment.glob("lib/python3.*/site-packages")
    (packages / "borrowed.pth").write_text(f"{Path(fastapi.__file__).parents[1]}\n")
    pip = [sys.executable, "-m", "pip", "--python", str(environment / "bin/python"), "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", str(distributions.wheel)], check=True)
    return Installation(environment / "bin", folder)


@pytest.fixture
def served(installation: Installation, tmp_path: Path) -> Iterator[str]:
    """The address of the installed server, which draws with the model that it brings."""
    port, log = str(free_port()), tmp_path / "server.log"
    command: list[str | Path] = [installation.bin / "srpo", "serve", "--port", port, "--data-dir", tmp_path / "data"]
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=tmp_path, env=installation.env, stdout=output, stderr=output)
    try:
        wait_ready(f"http://127.0.0.1:{port}", process, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


@pytest.mark.long
def test_the_sdist_holds_what_the_repository_does(distributions: Distributions) -> None:
    with tarfile.open(distributions.sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    assert tracked() | {"PKG-INFO"} <= names
    assert not [name for name in names if name.endswith(PICKLES) or name.startswith((".venv", ".git/", "data/"))]


@pytest.mark.long
def test_the_wheel_holds_the_three_rooms_and_nothing_else(distributions: Distributions) -> None:
    with zipfile.ZipFile(distributions.wheel) as wheel:
        names = wheel.namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(ROOMS)
    assert not [name for name in names if name.endswith(PICKLES)]
    assert {name for name in tracked() if name.split("/")[0] in ROOMS} <= set(names)


@pytest.mark.long
def test_the_installed_command_says_its_version_and_its_commands(installation: Installation) -> None:
    assert installation.run("srpo", "--version") == f"srpo {PROJECT['version']}\n"
    usage = installation.run("srpo", "--help")
    assert all(f"  {name} " in usage for name in COMMANDS)
    place = installation.run("python", "-c", "import server; print(server.__file__)")
    assert Path(place).is_relative_to(installation.bin.parent)


@pytest.mark.long
def test_the_installed_server_draws(served: str) -> None:
    body = {"model": "flux/srpo", "prompt": "a red apple", "image_size": "square", "num_inference_steps": 2}
    reply = httpx.post(f"{served}/v1/images/generations", json=body, timeout=120)
    assert reply.status_code == 201, reply.text
    assert reply.headers["x-served-model"] == "flux/sketch"
    picture = httpx.get(reply.json()["images"][0]["url"])
    assert picture.content.startswith(b"\xff\xd8\xff")
    assert httpx.get(f"{served}/").status_code == 200


def test_the_version_has_one_place_and_the_changelog_has_it_or_says_unreleased() -> None:
    released = re.findall(r"^## \[(\d\S*)\] - \d{4}-\d{2}-\d{2}$", CHANGELOG, re.MULTILINE)
    unreleased = CHANGELOG.partition("## [Unreleased]")[2].partition("\n## ")[0]
    assert released[:1] == [PROJECT["version"]] or f"this will be {PROJECT['version']}." in unreleased
    elsewhere = [
        path
        for path in tracked()
        if path.split("/")[0] in ROOMS and path.endswith(".py") and "__version__ =" in (ROOT / path).read_text()
    ]
    assert not elsewhere


# ---- What is pinned


def pins_of(name: str) -> dict[str, str]:
    """Each package of a file of pins, with its version."""
    found = re.findall(r"^([A-Za-z0-9._-]+)==(\S+)", (ROOT / name).read_text(), re.MULTILINE)
    return {canonicalize_name(package): version for package, version in found}


def needs(*extras: str) -> list[Requirement]:
    """What the project itself and its extras name."""
    listed = [*PROJECT["dependencies"], *(need for name in extras for need in PROJECT["optional-dependencies"][name])]
    return [Requirement(need) for need in listed]


def image_extras() -> list[str]:
    (line,) = re.findall(r"^IMAGE_EXTRAS := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return str(line).split()


def test_constraints_pin_all_that_the_project_and_its_extras_need() -> None:
    pinned = pins_of("constraints.txt")
    for need in needs(*PROJECT["optional-dependencies"]):
        assert need.specifier.contains(pinned[canonicalize_name(need.name)]), need


def test_hashes_pin_what_the_image_has_but_torch_at_the_same_versions() -> None:
    pinned, hashed = pins_of("constraints.txt"), pins_of("hashes.txt")
    assert hashed.items() <= pinned.items()
    assert {canonicalize_name(need.name) for need in needs(*image_extras())} <= set(hashed)
    text = (ROOT / "hashes.txt").read_text()
    assert re.search(r"^torch==\S+ ; sys_platform == 'never' ", text, re.MULTILINE), "torch comes from a chosen index"
    entries = re.split(r"^(?=\w)", text, flags=re.MULTILINE)[1:]
    assert len(entries) == len(hashed)
    assert all("--hash=sha256:" in entry for entry in entries)


def test_every_documented_way_to_install_takes_the_pins() -> None:
    """Those in the pages, the Makefile, the unit and the Dockerfile. Tools of a contributor's own are theirs."""
    files = [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").glob("*.md"),
        *map(ROOT.joinpath, ("Makefile", "deploy/srpo.service")),
    ]
    commands = re.findall(r"^.*\b(?:pip|pipx|uv tool) install .*$", "\n".join(map(Path.read_text, files)), re.MULTILINE)
    ours = [command for command in commands if re.search(r"""[ '"]\.['"\[ ]|[ '"]\.$""", command)]
    assert len(ours) > 5
    assert not [command for command in ours if "constraints.txt" not in command]


# ---- What a release is made with

AUDITS = {
    "echo 'No known vulnerabilities found'": (0, "No known vulnerabilities found"),
    "echo 'Found 1 known vulnerability in 1 package'; exit 1": (2, "Found 1 known vulnerability"),
    "echo 'ERROR: certifi: Dependency not found on PyPI'; exit 1": (2, "Nothing was audited"),
    "echo 'ConnectionError: no route to host' >&2; exit 1": (2, "Nothing was audited"),
}


@pytest.mark.parametrize("script", AUDITS)
def test_an_audit_that_could_not_be_done_says_so(script: str, tmp_path: Path) -> None:
    """With what pip-audit says and how it exits in each case: the service itself is on the internet."""
    tool = tmp_path / "tools/bin/pip-audit"
    tool.parent.mkdir(parents=True)
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    command = ["make", "--assume-old", f"{tmp_path}/.tools", f"VENV={tmp_path}", "audit"]
    (tmp_path / ".tools").touch()
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    status, line = AUDITS[script]
    assert (ended.returncode, line in ended.stdout) == (status, True), ended.stdout + ended.stderr
    assert ("Nothing was audited" in ended.stdout) == (line == "Nothing was audited")
