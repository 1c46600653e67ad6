"""Executes a Dockerfile's stages without a container engine: each RUN and COPY leaves one overlay layer.

A layer is kept under a key made of what it follows from (the layers below, the instruction, the variables, and for a
COPY the copied bytes), as engines do: a step that would give the same layer is not run again. The bottom layer is a
debootstrap root of the base image's Debian release, with Debian's Python in place of the image's.
"""

import hashlib
import os
import re
import shutil
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from deploy.dockerfile import Instruction, Stage, context, pairs
from deploy.mounts import CHROOT, PATH, isolated, mounted, plugged, quiet

PACKAGES = "python3,python3-venv,python3-pip,ca-certificates,netbase,tzdata"
HOST_FILES = ("/etc/resolv.conf", "/etc/hosts", "/etc/ssl/certs", "/etc/pip.conf", "/root/.config/pip/pip.conf")
HOST_VARIABLES = re.compile(r"PIP_|SSL_CERT_|REQUESTS_CA_BUNDLE|CURL_CA_BUNDLE|(https?|no|all)_proxy", re.IGNORECASE)


@dataclass(slots=True)
class Layer:
    """What one step added, and how it came to be."""

    title: str
    folder: Path
    seconds: float
    cached: bool

    def size(self) -> int:
        return sum(path.lstat().st_size for path in self.folder.rglob("*") if not path.is_dir() or path.is_symlink())


@dataclass(slots=True)
class Image:
    """A stage, executed so far: layers from the bottom up, and what the instructions declared."""

    key: str
    layers: list[Layer]
    env: dict[str, str] = field(default_factory=lambda: {"PATH": PATH})
    args: dict[str, str] = field(default_factory=dict)
    workdir: str = "/"
    user: str = "0:0"
    volumes: list[str] = field(default_factory=list)
    entrypoint: list[str] = field(default_factory=list)
    cmd: list[str] = field(default_factory=list)
    stop_signal: str = "SIGTERM"

    def folders(self) -> list[Path]:
        return [layer.folder for layer in self.layers]


@dataclass(slots=True)
class Builder:
    """Builds below `target`, from the files in `source`."""

    target: Path
    source: Path
    build_args: Mapping[str, str]
    binds: list[str]
    done: dict[str, Image] = field(default_factory=dict)

    def build(self, stages: list[Stage]) -> Image:
        image = None
        for stage in stages:
            image = self.done[stage.name] = self.begin(stage.base)
            for step in stage.steps:
                self.execute(image, step)
        if image is None:
            raise ValueError("the Dockerfile has no FROM")
        return image

    def begin(self, base: str) -> Image:
        """The bottom of a stage: debootstrap's root for the Debian release that the base image's name ends with."""
        found = re.fullmatch(r"python:([\d.]+)-slim-([a-z]+)", base)
        if found is None:
            raise ValueError(f"FROM {base}: only python:VERSION-slim-RELEASE has a counterpart in Debian")
        folder, start = self.target / f"base-{found[2]}", time.monotonic()
        cached = folder.exists()
        if not cached:
            fresh = folder.with_suffix(".new")
            shutil.rmtree(fresh, ignore_errors=True)
            command = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", found[2], str(fresh)]
            quiet([*command, mirror(found[2])])
            for name in ("python", "python3"):  # where the python image has them
                (fresh / "usr/local/bin" / name).symlink_to("/usr/bin/python3")
            fresh.rename(folder)
        for path in [*self.host_files(), "/root/.cache/pip"]:  # mount points, so that no layer holds them
            placeholder(folder, path)
        layer = Layer(f"FROM {base} (debootstrap)", folder, time.monotonic() - start, cached)
        report(layer)
        return Image(digest(base), [layer])

    def execute(self, image: Image, step: Instruction) -> None:
        variables = image.args | image.env
        match step.name:
            case "ARG":
                image.args |= {name: self.build_args.get(name, value) for name, value in pairs(step, variables)}
            case "ENV":
                image.env |= dict(pairs(step, variables))
            case "WORKDIR":
                image.workdir = str(Path(image.workdir, *step.words(variables)))
            case "USER":
                image.user = step.words(variables)[0]
            case "VOLUME":
                image.volumes += step.words(variables)
            case "ENTRYPOINT":
                image.entrypoint = step.words()
            case "CMD":
                image.cmd = step.words()
            case "STOPSIGNAL":
                image.stop_signal = step.words()[0]
            case "RUN":
                self.run(image, step)
            case "COPY":
                self.copy(image, step)

    def run(self, image: Image, step: Instruction) -> None:
        hosts = {name: value for name, value in os.environ.items() if HOST_VARIABLES.match(name)}
        env = {"HOME": "/root", **hosts, **image.args, **image.env}
        caches = dict(self.cache_mount(text) for name, text in step.flags.items() if name == "mount")
        with self.layer(image, step, image.args | image.env) as root:
            if root is None:
                return
            binds = {path: Path(path) for path in self.host_files()} | caches
            with plugged(root, binds):
                script = f"mkdir -p {image.workdir} && cd {image.workdir} && {step.text}"
                inside = [CHROOT, f"--userspec={image.user}", str(root), "/bin/sh", "-c", script]
                quiet([*isolated(root), *inside], env)

    def copy(self, image: Image, step: Instruction) -> None:
        *sources, destination = step.words(image.args | image.env)
        place = Path(image.workdir, destination)
        into = destination.endswith("/") or destination == "." or len(sources) > 1
        with self.origin(step.flags.get("from")) as root:
            pieces: list[tuple[Path, Path]] = []
            for source in sources:
                path = Path(source.strip("/"))
                if not (below := self.below(root, path)):
                    raise FileNotFoundError(f"line {step.line}: COPY {source}: there is no such file")
                for name in below:
                    rest = name.relative_to(path)
                    pieces.append((name, place / (path.name if rest == Path() and into else rest)))
            with self.layer(image, step, contents(root, pieces)) as top:
                for name, to in pieces:
                    if top is not None:
                        transfer(root / name, top / to.relative_to("/"))

    @contextmanager
    def origin(self, stage: str | None) -> Iterator[Path]:
        """The tree that a COPY takes from: an earlier stage's, or the build context."""
        if stage is None:
            yield self.source
        else:
            with mounted(self.done[stage].folders(), self.target / "from"):
                yield self.target / "from"

    def below(self, root: Path, path: Path) -> list[Path]:
        """What a COPY of `path` takes; from the build context without the files that .dockerignore names."""
        if root == self.source:
            return [name for name in context(root) if path in (name, *name.parents)]
        found = [root / path, *sorted((root / path).rglob("*"))] if (root / path).exists() else []
        return [name.relative_to(root) for name in found]

    @contextmanager
    def layer(self, image: Image, step: Instruction, inputs: object) -> Iterator[Path | None]:
        """A writable root for one step, which becomes the image's next layer; None where that layer is at hand."""
        image.key = digest(image.key, step.name, step.text, repr(step.flags), repr(inputs))
        folder, start = self.target / "layers" / image.key, time.monotonic()
        cached = folder.exists()
        if cached:
            yield None
        else:
            fresh, root = folder.with_suffix(".new"), self.target / "root"
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir(parents=True)
            with mounted(image.folders(), root, fresh):
                yield root
            fresh.rename(folder)
        origin = f"--from={step.flags['from']} " if "from" in step.flags else ""
        image.layers.append(Layer(f"{step.name} {origin}{step.text}", folder, time.monotonic() - start, cached))
        report(image.layers[-1])

    def host_files(self) -> list[str]:
        return [*(path for path in HOST_FILES if Path(path).exists()), *self.binds]

    def cache_mount(self, text: str) -> tuple[str, Path]:
        options = dict(part.split("=", 1) for part in text.split(","))
        if options.pop("type") != "cache" or set(options) != {"target"}:
            raise ValueError(f"--mount={text}: only type=cache,target=PATH is understood here")
        folder = self.target / "cache" / digest(options["target"])
        folder.mkdir(parents=True, exist_ok=True)
        return options["target"], folder


def placeholder(root: Path, path: str) -> None:
    place = root / path.lstrip("/")
    place.parent.mkdir(parents=True, exist_ok=True)
    if Path(path).is_file():
        place.touch()
    else:
        place.mkdir(exist_ok=True)


def transfer(source: Path, to: Path) -> None:
    """One file, folder or link, owned by root as COPY makes it."""
    to.parent.mkdir(parents=True, exist_ok=True)
    if source.is_symlink():
        to.unlink(missing_ok=True)
        to.symlink_to(source.readlink())
    elif source.is_dir():
        to.mkdir(exist_ok=True)
    else:
        shutil.copy2(source, to)


def contents(root: Path, pieces: list[tuple[Path, Path]]) -> str:
    """A digest of what is copied and where to; times do not count."""
    total = hashlib.sha256()
    for name, to in pieces:
        info = (root / name).lstat()
        total.update(f"{to} {stat.filemode(info.st_mode)} {info.st_size}\n".encode())
        if stat.S_ISLNK(info.st_mode):
            total.update(str((root / name).readlink()).encode())
        elif stat.S_ISREG(info.st_mode):
            with (root / name).open("rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def mirror(release: str) -> str:
    """The machine's own Debian mirror."""
    files = [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*"))]
    for text in (file.read_text() for file in files if file.exists()):
        for stanza in text.split("\n\n"):
            suites, uris = (re.search(rf"^{name}:\s*(.+)$", stanza, re.MULTILINE) for name in ("Suites", "URIs"))
            if suites and uris and release in suites[1].split():
                return uris[1].split()[0]
        if line := re.search(rf"^deb\s+(?:\[.*?\]\s+)?(\S+)\s+{release}\s", text, re.MULTILINE):
            return line[1]
    return "http://deb.debian.org/debian"


def report(layer: Layer) -> None:
    title = layer.title if len(layer.title) <= 76 else layer.title[:73] + "..."
    print(
        f"{'cached' if layer.cached else f'{layer.seconds:5.0f}s'}  {layer.size() / 1e6:8.2f} MB  {title}", flush=True
    )
