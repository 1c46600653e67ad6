"""Mounts, and commands inside them. All are made in the mount namespace that `deploy.rootfs` gives itself."""

import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
CHROOT = shutil.which("chroot", path=PATH) or "chroot"
DEVICES = ("null", "zero", "full", "random", "urandom", "tty")


@contextmanager
def mounted(layers: Iterable[Path], root: Path, upper: Path | None = None) -> Iterator[None]:
    """The layers as one tree at `root`; read-only unless there is an upper layer to write to."""
    root.mkdir(parents=True, exist_ok=True)
    options = "lowerdir=" + ":".join(str(layer) for layer in reversed(list(layers)))
    if upper is not None:
        work = root.with_suffix(".work")
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        options += f",upperdir={upper},workdir={work}"
    quiet(["mount", "-t", "overlay", "overlay", "-o", options, str(root)])
    try:
        yield
    finally:
        subprocess.run(["umount", "--recursive", "--lazy", str(root)], check=True)


@contextmanager
def plugged(root: Path, binds: Mapping[str, Path]) -> Iterator[None]:
    """What an engine puts into a container besides its files; `mounted` takes it away with the root."""
    quiet(["mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", str(root / "dev")])
    for name in DEVICES:
        (root / "dev" / name).touch()
        quiet(["mount", "--bind", f"/dev/{name}", str(root / "dev" / name)])
    (root / "dev/shm").mkdir(mode=0o1777)
    quiet(["mount", "-t", "tmpfs", "-o", "mode=1777,size=64m", "tmpfs", str(root / "dev/shm")])
    (root / "dev/fd").symlink_to("/proc/self/fd")
    quiet(["mount", "--bind", "-o", "ro", "/sys", str(root / "sys")])
    for inside, outside in binds.items():
        quiet(["mount", "--bind", str(outside), str(root / inside.lstrip("/"))])
    yield


def isolated(root: Path, *more: str) -> list[str]:
    """The beginning of a command that has its own processes and dies with this one."""
    kill = ["setpriv", "--pdeathsig", "KILL", "unshare", "--pid", "--fork", "--kill-child"]
    return [*kill, f"--mount-proc={root / 'proc'}", *more]


def quiet(command: list[str], env: Mapping[str, str] | None = None) -> str:
    """Run a command; its output is shown only when it fails."""
    ended = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if ended.returncode:
        raise RuntimeError(f"exit {ended.returncode}: {' '.join(command)}\n{ended.stdout[-4000:]}")
    return ended.stdout
