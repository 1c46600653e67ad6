"""The Dockerfile's image, and the server in it (make image-test: root on Debian, buildah and mmdebstrap).

buildah needs no daemon. Its base image is Debian with Debian's own Python, so no registry is asked. Packages are
downloaded on this machine, where pip's own configuration says from where, and the build takes nothing else. With torch
for the CPU (PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu) 5 GB below /var/tmp are enough.

    IMAGE_BASE      another base, in buildah's words: docker.io/library/python:3.12-slim-bookworm, oci:FOLDER, ...
    STORAGE_DRIVER  buildah's: overlay where this machine mounts it, else vfs, which copies whole layers
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.server import free_port

from server.__main__ import COMMANDS
from server.settings.server import Settings

pytestmark = pytest.mark.image

ROOT = Path(__file__).parent.parent
ROOMS = ("server", "pipelines", "weights")
COPIED = ("pyproject.toml", "constraints.txt", "hashes.txt", "README.md", "LICENSE", *ROOMS)
PREFIX = str(Settings.model_config["env_prefix"])
KEY = "image-test-key"
RELEASE = "bookworm"
# What python:3.12-slim-bookworm has: `python`, `pip`, and Python's headers.
PACKAGES = "python3-venv,python3-pip,python-is-python3,libpython3-dev,ca-certificates"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
START_LIMIT = 300.0  # seconds until the health check must pass
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
LABELS = {"VERSION": VERSION, "REVISION": "0" * 40, "CREATED": "2026-01-02T03:04:05Z", "SOURCE": "https://example.com"}
LABEL = "org.opencontainers.image."
LARGEST = 3e9  # bytes, without CUDA
# Files that must never reach an image, where people have them.
SECRETS = (".env", "data/keys.json", "models/FLUX.1-dev/flux1-dev.safetensors", "server/__pycache__/old.pyc")
COMPILE = """
import torch, torchao
double = torch.compile(lambda x: (2 * x).relu())
assert double(torch.tensor([-1.0, 3.0])).tolist() == [0.0, 6.0]
"""


@dataclass(frozen=True)
class Buildah:
    """The command, with all its storage below one folder."""

    folder: Path
    driver: str

    @property
    def env(self) -> dict[str, str]:
        return os.environ | {"BUILDAH_ISOLATION": "chroot", "TMPDIR": str(self.folder)}

    def command(self, *words: str) -> list[str]:
        storage = [f"--root={self.folder}/root", f"--runroot={self.folder}/run", f"--storage-driver={self.driver}"]
        return ["buildah", *storage, *words]

    def __call__(self, *words: str) -> str:
        """Standard output without its last line break."""
        done = subprocess.run(self.command(*words), env=self.env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"buildah {' '.join(words)}\n{done.stdout}{done.stderr}"
        return done.stdout.strip()

    def create(self, image: str) -> "Container":
        name = self("from", "--pull=never", image)
        return Container(self, name, Path(self("mount", name)))


@dataclass(frozen=True)
class Container:
    """A container of an image, and its root as a folder of this machine. Every `run` finds the same volumes."""

    buildah: Buildah
    name: str
    root: Path

    def command(self, *words: str, **env: str) -> list[str]:
        variables = [f"--env={name}={value}" for name, value in env.items()]
        return self.buildah.command("run", "--cap-drop=all", *variables, self.name, "--", *words)

    def run(self, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
        command = self.command(*words, **env)
        return subprocess.run(command, env=self.buildah.env, capture_output=True, text=True, check=False)

    def remove(self) -> None:
        self.buildah("rm", self.name)


@dataclass(frozen=True)
class Server:
    """The image's own command, running in a container as its engine would start it."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path
    started_at: float
    health: list[subprocess.CompletedProcess[str]]

    def entry_point(self) -> int:
        """The process that an engine calls 1; buildah has two of its own before it."""
        pid = self.process.pid
        while "buildah" in Path(f"/proc/{pid}/cmdline").read_text():
            children = [path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/children")]
            (pid,) = map(int, chain.from_iterable(children))  # of any of its threads
        return pid


@pytest.fixture(scope="module")
def buildah() -> Iterator[Buildah]:
    missing = [tool for tool in ("buildah", "mmdebstrap") if not shutil.which(tool)]
    if os.geteuid() != 0 or missing:
        pytest.skip("an image is built by root, on Debian with `apt-get install buildah mmdebstrap`")
    with tempfile.TemporaryDirectory(prefix="srpo-image-", dir="/var/tmp") as folder:
        buildah = Buildah(Path(folder), os.environ.get("STORAGE_DRIVER") or storage_driver(Path(folder)))
        try:
            yield buildah
        finally:
            buildah("rm", "--all")


def storage_driver(folder: Path) -> str:
    """overlay where it can be mounted: not in many containers."""
    overlay = Buildah(folder / "probe", "overlay")
    overlay.folder.mkdir()
    try:
        overlay.create("scratch").remove()
    except AssertionError:
        return "vfs"
    return "overlay"


@pytest.fixture(scope="module")
def context(buildah: Buildah) -> Path:
    """The project's files, and beside them what a machine in use has."""
    folder = buildah.folder / "context"
    listed = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True).split("\0")
    for name in filter(None, listed):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    for name in SECRETS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("secret")
    return folder


@pytest.fixture(scope="module")
def base(buildah: Buildah) -> str:
    if chosen := os.environ.get("IMAGE_BASE"):
        return buildah("pull", "--quiet", chosen)
    container = buildah.create("scratch")
    debian = ["mmdebstrap", "--quiet", "--variant=apt", f"--include={PACKAGES}", RELEASE, str(container.root)]
    subprocess.run(debian, check=True)
    buildah("config", f"--env=PATH={PATH}", container.name)
    return buildah("commit", "--quiet", "--rm", container.name)


@pytest.fixture(scope="module")
def wheels(buildah: Buildah, base: str, context: Path) -> Path:
    """What the image installs, for the base's Python."""
    build = tomllib.loads((context / "pyproject.toml").read_text())["build-system"]["requires"]
    container = buildah.create(base)
    version = container.run("python", "-c", "import sys; print('%d.%d' % sys.version_info[:2])").stdout.strip()
    container.remove()
    folder = buildah.folder / "wheels"
    download = [sys.executable, "-m", "pip", "download", "--quiet", f"--dest={folder}", f"--python-version={version}"]
    download += ["--only-binary=:all:"]
    hashed = ["--require-hashes", "--no-deps", f"--requirement={context}/hashes.txt"]
    for what in (hashed, [f"--constraint={context}/constraints.txt", "torch", *build]):
        subprocess.run([*download, *what], check=True)
    return folder


@pytest.fixture(scope="module")
def image(buildah: Buildah, base: str, wheels: Path, context: Path) -> str:
    arguments = {"BASE": base, "INSTALL_OPTIONS": "--no-index --find-links /wheels", **LABELS}
    words = [f"--build-arg={name}={value}" for name, value in arguments.items()]
    words += [f"--volume={wheels}:/wheels:ro", "--pull=never", "--format=docker", "--tag=srpo", "--quiet"]
    return buildah("build", *words, str(context))


@pytest.fixture(scope="module")
def config(buildah: Buildah, image: str) -> dict[str, Any]:
    """What the image tells its engine."""
    described = json.loads(buildah("inspect", "--type=image", image))
    return dict(described["Docker"]["config"])


@pytest.fixture(scope="module")
def container(buildah: Buildah, image: str) -> Container:
    return buildah.create(image)


@pytest.fixture(scope="module")
def server(container: Container, config: dict[str, Any]) -> Iterator[Server]:
    """Started with a key; healthy."""
    env = {f"{PREFIX}PORT": str(free_port()), f"{PREFIX}API_KEYS": KEY}
    command = container.command(*config["Entrypoint"], *config["Cmd"], **env)
    kind, *check = config["Healthcheck"]["Test"]
    assert kind == "CMD"
    log, health = container.buildah.folder / "server.log", [container.run(*check, **env)]
    now = time.time()
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=container.buildah.env, stdout=output, stderr=output)
    try:
        while health[-1].returncode:
            assert process.poll() is None, log.read_text()
            assert time.time() < now + START_LIMIT, f"{health[-1].stderr}\n{log.read_text()}"
            health.append(container.run(*check, **env))
        yield Server(f"http://127.0.0.1:{env[f'{PREFIX}PORT']}", process, log, now, health)
    finally:
        process.terminate()
        process.wait()


def files_below(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file() and not path.is_symlink()}


def settings_of(config: dict[str, Any]) -> dict[str, str]:
    variables = dict(line.split("=", 1) for line in config["Env"])
    return {name.removeprefix(PREFIX).lower(): value for name, value in variables.items() if name.startswith(PREFIX)}


def test_the_build_is_sent_what_the_dockerfile_copies_and_nothing_else(buildah: Buildah, context: Path) -> None:
    everything = buildah.folder / "everything"
    everything.write_text("FROM scratch\nCOPY . /\n")
    container = buildah.create(buildah("build", "--quiet", f"--file={everything}", str(context)))
    wanted = {name for name in files_below(context) if name.split("/")[0] in COPIED and name not in SECRETS}
    assert files_below(container.root) == wanted
    container.remove()


def test_the_image_holds_the_project_and_no_secret(container: Container, context: Path) -> None:
    (packages,) = container.root.glob("opt/srpo/lib/python3.*/site-packages")
    installed = [name for name in files_below(packages) if name.split("/")[0] in ROOMS]
    code = {name for name in files_below(context) if name.split("/")[0] in ROOMS} - set(SECRETS)
    assert {name for name in installed if "__pycache__" not in name} == code
    assert not [path for name in SECRETS for path in container.root.rglob(Path(name).name)]
    assert not [path for volume in ("data", "models") for path in (container.root / volume).iterdir()]


def test_it_runs_the_server_as_a_fixed_user_who_is_not_root(config: dict[str, Any]) -> None:
    assert config["Entrypoint"] == ["srpo"]
    assert config["Cmd"][0] in COMMANDS
    assert config["StopSignal"] == "SIGTERM"
    user, _, group = config["User"].partition(":")
    assert user.isdigit()
    assert group.isdigit()
    assert "0" not in (user, group)


def test_it_is_labelled_with_what_was_built(config: dict[str, Any], container: Container) -> None:
    labels = {name: value for name, value in config["Labels"].items() if name.startswith(LABEL)}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    given = {f"{LABEL}{name.lower()}": value for name, value in LABELS.items()}
    fixed = {"title": "srpo", "description": project["description"], "licenses": project["license"]}
    assert labels == given | {f"{LABEL}{name}": value for name, value in fixed.items()}
    assert container.run("srpo", "--version").stdout == f"srpo {VERSION}\n"


def test_without_cuda_it_is_as_small_as_the_page_says(container: Container) -> None:
    """Unpacked; `pip` leaves no cache in it, and no layer holds a file twice."""
    files = [path for path in container.root.rglob("*") if path.is_file() and not path.is_symlink()]
    size = sum(path.stat().st_size for path in files)
    print(f"{size / 1e9:.2f} GB")
    if container.run("python", "-c", "import torch; print(torch.version.cuda)").stdout.strip() == "None":
        assert size < LARGEST


def test_its_settings_are_real_and_only_keys_are_missing(config: dict[str, Any]) -> None:
    chosen: dict[str, Any] = settings_of(config)
    assert set(chosen) <= set(Settings.model_fields)
    with pytest.raises(ValueError, match=f"{PREFIX}API_KEYS"):
        Settings(**chosen)
    assert not Settings(**chosen, api_keys="a-long-key").is_loopback
    assert list(config["ExposedPorts"]) == [f"{chosen['port']}/tcp"]


def test_what_is_written_goes_to_a_volume(config: dict[str, Any]) -> None:
    chosen = settings_of(config)
    assert {chosen["data_dir"], chosen["models_dir"]} == set(config["Volumes"]) == {"/data", "/models"}
    written = [line for line in config["Env"] if line.startswith("HOME=") or "CACHE" in line]
    assert len(written) > 1
    assert all(f"{line}/".split("=", 1)[1].startswith("/data/") for line in written)


def test_it_refuses_to_start_without_keys(container: Container, config: dict[str, Any]) -> None:
    done = container.run(*config["Entrypoint"], *config["Cmd"])
    assert done.returncode == 2
    assert f"{PREFIX}API_KEYS" in done.stderr


def test_torch_compiles_in_it(container: Container) -> None:
    """Inductor compiles C++ that includes Python.h: what Triton's driver module needs too."""
    done = container.run("python", "-c", COMPILE)
    assert done.returncode == 0, done.stderr


def test_it_is_healthy_once_the_model_is_loaded(server: Server) -> None:
    """Not before its start. Whether a check falls into the time while it loads depends on how long checks take."""
    assert "refused" in server.health[0].stderr
    assert server.health[-1].returncode == 0


def test_it_answers_with_a_picture(server: Server) -> None:
    body = {"model": "flux/srpo", "prompt": "a red apple"}
    with httpx.Client(base_url=server.url, headers={"authorization": f"Bearer {KEY}"}, timeout=START_LIMIT) as client:
        reply = client.post("/v1/images/generations", json=body)
        assert reply.is_success, reply.text
        picture = client.get(reply.json()["images"][0]["url"])
    assert picture.headers["content-type"] == "image/jpeg"
    assert picture.content.startswith(b"\xff\xd8\xff")
    assert picture.content.endswith(b"\xff\xd9")


def test_its_process_has_the_images_user_and_no_capability(server: Server, config: dict[str, Any]) -> None:
    lines = Path(f"/proc/{server.entry_point()}/status").read_text().splitlines()
    status = dict(line.split(":\t", 1) for line in lines)
    assert ":".join((status["Uid"].split()[0], status["Gid"].split()[0])) == config["User"]
    for name in ("CapEff", "CapPrm", "CapInh", "CapAmb"):
        assert int(status[name], 16) == 0


def test_it_ends_at_its_stop_signal_having_written_to_volumes_and_tmp_alone(
    server: Server, container: Container, config: dict[str, Any]
) -> None:
    """The volumes lie outside the container's root."""
    os.kill(server.entry_point(), signal.Signals[config["StopSignal"]])
    assert server.process.wait(timeout=70) == 0, server.log.read_text()
    files = {name for name in files_below(container.root) if not name.startswith("tmp/")}
    assert not [name for name in files if (container.root / name).stat().st_ctime > server.started_at]
