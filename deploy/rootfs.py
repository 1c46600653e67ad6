"""Builds the Dockerfile's image without a container engine, starts it as an engine would, and checks what it does.

    sudo python3 -m deploy.rootfs TARGET [--bind FOLDER] [--build-arg NAME=VALUE]

For root on Debian, with Python 3.11 or later and nothing installed. TARGET is a folder for layers (some GB); a second
run builds only what changed. All mounts live in a mount namespace of this process, so its end, however it comes,
takes them away. What differs from an engine: Debian's own Python stands in for the python image's; build steps use this
machine's pip configuration, certificates and name service; there are no cgroups and no seccomp filter.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from deploy.dockerfile import Instruction, parse
from deploy.layers import Builder, Image
from deploy.mounts import CHROOT, isolated, mounted, plugged, quiet

KEY = "rootfs-check-key"
PATIENCE = 300.0  # seconds until the container must be healthy
TOOLS = {"debootstrap": "debootstrap", "ip": "iproute2"}
CLIENT = """
import json, sys, urllib.request
call = json.load(sys.stdin)
request = urllib.request.Request(call["url"], call["body"] and json.dumps(call["body"]).encode(), call["headers"])
with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=300) as reply:
    sys.stdout.buffer.write(reply.read())
"""


@dataclass(slots=True)
class Container:
    """A running container: process 1 as this machine numbers it, and what an engine knows of the image."""

    image: Image
    runner: subprocess.Popen[bytes]
    pid: int
    env: Mapping[str, str]

    def exec(self, command: list[str], user: str | None = None) -> subprocess.CompletedProcess[str]:
        """A command beside process 1, like `docker exec`."""
        uid, _, gid = (user or self.image.user).partition(":")
        enter = ["nsenter", f"--target={self.pid}", "--mount", "--pid", "--net", "--root"]
        enter += [f"--setuid={uid}", f"--setgid={gid or uid}", "--", *command]
        return subprocess.run(enter, env=self.env, capture_output=True, text=True, timeout=60, check=False)

    def call(self, path: str, body: object = None) -> bytes:
        """A request from the container's network, with the key."""
        url = path if "://" in path else f"http://127.0.0.1:{self.env['SRPO_PORT']}{path}"
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
        command = ["nsenter", f"--target={self.pid}", "--net", "--", sys.executable, "-c", CLIENT]
        text = json.dumps({"url": url, "body": body, "headers": headers}).encode()
        return subprocess.run(command, input=text, stdout=subprocess.PIPE, check=True).stdout


def main() -> int:
    options = arguments()
    if os.geteuid() != 0:
        print("deploy.rootfs: mounting needs root; run it with sudo", file=sys.stderr)
        return 2
    if "ROOTFS_NAMESPACE" not in os.environ:
        os.environ["ROOTFS_NAMESPACE"] = "1"
        alone = ["unshare", "--mount", "--propagation", "private", sys.executable, "-m", "deploy.rootfs"]
        os.execvp(alone[0], [*alone, *sys.argv[1:]])  # noqa: S606
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if missing := [package for tool, package in TOOLS.items() if shutil.which(tool) is None]:
        quiet(["apt-get", "update"])
        quiet(["apt-get", "install", "--yes", "--no-install-recommends", *missing])
    target = options.target.absolute()
    stages = parse((options.context / "Dockerfile").read_text())
    start = time.monotonic()
    build_args = dict(pair.split("=", 1) for pair in options.build_arg)
    image = Builder(target, options.context.absolute(), build_args, options.bind).build(stages)
    print(f"built in {time.monotonic() - start:.0f}s; the image's layers above its base: ", end="")
    print(", ".join(f"{layer.size() / 1e6:.2f} MB" for layer in image.layers[1:]))
    (health,) = stages[-1].find("HEALTHCHECK")
    check_refusal(image, target)
    with started(image, target, {"SRPO_API_KEYS": KEY}) as container:
        check(container, health)
        stop(container)
    print("ok")
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="deploy.rootfs", description="build, start and check the Dockerfile's image")
    parser.add_argument("target", type=Path, help="folder for layers and volumes")
    parser.add_argument("--context", type=Path, default=Path(), help="folder with the Dockerfile")
    parser.add_argument("--bind", action="append", default=[], help="folder the build steps may read, as it is here")
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE", help="value for an ARG")
    return parser.parse_args()


@contextlib.contextmanager
def started(image: Image, target: Path, variables: Mapping[str, str]) -> Iterator[Container]:
    """ENTRYPOINT and CMD as process 1 and as USER: read-only root, empty volumes, /tmp, and a network of its own."""
    root, volumes = target / "run", target / "volumes"
    shutil.rmtree(volumes, ignore_errors=True)
    env = {**image.env, **variables}
    with mounted(image.folders(), root):
        binds: dict[str, Path] = {}
        for path in image.volumes:  # a new volume takes owner and mode from the image's folder
            binds[path] = volumes / path.strip("/")
            binds[path].mkdir(parents=True)
            info = (root / path.lstrip("/")).stat()
            os.chown(binds[path], info.st_uid, info.st_gid)
            binds[path].chmod(info.st_mode)
        with plugged(root, binds):
            quiet(["mount", "-t", "tmpfs", "-o", "mode=1777", "tmpfs", str(root / "tmp")])
            uid, _, gid = image.user.partition(":")
            drop = ["setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups", "--no-new-privs"]
            drop += ["--pdeathsig", "KILL"]  # anew: a change of user clears what `isolated` asked for
            inside = [CHROOT, str(root), *drop, "env", f"--chdir={image.workdir}", *image.entrypoint, *image.cmd]
            runner = subprocess.Popen(isolated(root, "--net", *inside), env=env)
            try:
                yield Container(image, runner, first_process(runner.pid), env)
            finally:
                runner.kill()
                runner.wait()


def first_process(parent: int) -> int:
    """The child of `unshare`, once it has become the entry point."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                name, _, rest = path.read_text().rpartition(")")
                if int(rest.split()[1]) == parent and not name.endswith(("(unshare", "(setpriv", "(chroot", "(env")):
                    return int(path.parent.name)
        time.sleep(0.05)
    return -1  # ended already


def check_refusal(image: Image, target: Path) -> None:
    """Without keys the server must refuse to start, and say why."""
    with started(image, target, {}) as container:
        code = container.runner.wait(timeout=60)
    expect("without keys it does not start", code == 2, f"exit {code}")


def check(container: Container, health: Instruction) -> None:
    start = time.monotonic()
    command = json.loads(health.text.removeprefix("CMD"))
    quiet(["nsenter", f"--target={container.pid}", "--net", "--", "ip", "link", "set", "lo", "up"])
    answers = []
    while (probe := container.exec(command)).returncode:
        answers.append(probe.stderr.strip().splitlines()[-1])
        if time.monotonic() - start > PATIENCE or container.runner.poll() is not None:
            expect("the health check passes", False, probe.stderr)
        time.sleep(1)
    expect("the health check waits for the model", any("503" in answer for answer in answers), "; ".join(answers))
    expect("the health check passes", True, f"after {time.monotonic() - start:.1f}s, on a network of loopback alone")
    status = Path(f"/proc/{container.pid}/status").read_text()
    uids = re.search(r"^Uid:\t(.*)$", status, re.MULTILINE)
    capabilities = re.search(r"^CapEff:\t0+$", status, re.MULTILINE)
    expect("process 1 is no root", uids is not None and "0" not in uids[1].split(), uids[1] if uids else "")
    expect("process 1 has no capabilities", capabilities is not None)

    start = time.monotonic()
    body = {"model": "flux/srpo", "prompt": "a red apple"}
    reply = json.loads(container.call("/v1/images/generations", body))
    picture = container.call(reply["images"][0]["url"])
    jpeg = picture.startswith(b"\xff\xd8\xff") and picture.endswith(b"\xff\xd9")
    expect("the example answers with a JPEG", jpeg, f"{len(picture)} bytes in {time.monotonic() - start:.1f}s")

    for path in ("/probe", "/etc/probe", "/opt/srpo/probe", "/var/probe"):
        tried = container.exec(["touch", path], user="0:0")
        expect(f"{path} cannot be written, even by root", "Read-only" in tried.stderr, tried.stderr.strip())
    for path in (*container.image.volumes, "/tmp"):  # noqa: S108
        tried = container.exec(["touch", f"{path}/probe"])
        expect(f"{path} can be written", tried.returncode == 0, tried.stderr.strip())


def stop(container: Container) -> None:
    start = time.monotonic()
    os.kill(container.pid, getattr(signal, container.image.stop_signal))
    code = container.runner.wait(timeout=70)
    name = container.image.stop_signal
    expect(f"{name} ends it cleanly", code == 0, f"exit {code} after {time.monotonic() - start:.1f}s")


def expect(what: str, holds: bool, detail: str = "") -> None:
    print(f"{'ok    ' if holds else 'FAILED'} {what}{f': {detail}' if detail else ''}", flush=True)
    if not holds:
        sys.exit(1)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (RuntimeError, ValueError, FileNotFoundError) as error:
        sys.exit(f"deploy.rootfs: {error}")
