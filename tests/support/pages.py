"""The pages that people read, as data: their prose, links and headings, and the code blocks that can be run."""

import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
PAGES = {
    path.relative_to(ROOT).as_posix(): path
    for path in (
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")),
        *sorted((ROOT / "docs").rglob("*.md")),
        ROOT / "weights" / "sketch" / "README.md",
    )
}
RUN, SHOWN = (
    ("sh", "python", "js"),
    ("json", "yaml", ""),
)  # languages of code blocks: those that are run, those that are not

# Commands that no test runs, by how they begin, with the reason. test_docs checks that ours would be understood.
EXCEPTIONS: Mapping[str, str] = {
    "git clone ADDRESS": "makes the checkout that the tests run in",
    "sudo apt-get install": "needs root and changes the machine",
    "apt-get install": "as sudo apt-get install",
    "mkdir -p models && sudo chown": "needs root",
    "PIP_EXTRA_INDEX_URL=": "installs torch from the network",
    ".venv/bin/pip install": "installs from the network; `make test` installs the same extras",
    "OTEL_EXPORTER_OTLP_ENDPOINT=": "needs a collector; tests/test_tracing.py has one",
    ".venv/bin/pre-commit install": "changes the checkout's hooks; test_the_hooks_call_the_projects_own_tools",
    ".venv/bin/hf auth login": "asks for a token at the terminal",
    "hf auth login": "asks for a token at the terminal",
    "GRAFANA_PASSWORD=another-one docker": "needs a container engine",
    "prometheus --config.file": "runs until it is stopped; `make operate` runs it so",
    "promtool ": "needs Debian's prometheus; tests/test_monitoring.py runs it",
    "make operate": "needs Debian's prometheus; CI runs it",
    "kubectl ": "needs a cluster; tests/test_kubernetes.py holds the manifests against its schemas",
    "docker ": "needs a container engine; `make image-test` builds and checks the image",
    "python3 -m venv /opt/srpo": "needs root and changes the machine",
    "install -m ": "needs root and changes the machine",
    "systemctl ": "needs root and systemd",
    "rm -f /etc/nginx": "needs root and changes the machine",
    "nginx -t": "needs root and systemd; tests/test_deploy.py tries the configuration",
    "srpo_run": "needs root and systemd",
    "sed -i /^HF_TOKEN=/d /etc/srpo.env": "needs root and changes the machine",
    "[ -e /etc/srpo.env ]": "needs root and changes the machine",
    "python3 -m venv /tmp/fetch": "fetches from the network",
    "PIP_NO_INDEX=": "installs what `pip download` has fetched",
    "make docs": "writes the pages; tests/test_house.py compares them",
    "make test": "runs this very test",
    "make constraints": "asks PyPI; tests/test_packaging.py looks at what it writes",
    "make audit": "asks PyPI; tests/test_packaging.py tries what it says",
    "make dist sbom": "tests/test_packaging.py builds the same",
    "make image": "needs a container engine; `make image-test` builds the image",
    "sudo make image-test": "CI runs it",
    ".ci/run": "runs this very test",
    "git commit": "a release",
    "git tag": "a release",
    "git push": "a release",
    "umask 077": "tests/test_upkeep.py runs it on a server's folder",
    ".venv/bin/python -c 'import sqlite3": "as umask 077",
    "cp -a data/images": "as umask 077",
    "git pull": "an upgrade",
    "pipx install": "installs from the network; tests/test_packaging.py installs the wheel",
    "uv tool install": "as pipx install",
    "make cuda-dry": "tests of this suite",
    "make lint": "tests/test_house.py runs the same commands",
    "make browser": "needs Chromium; CI runs it",
    "make faults": "takes minutes; CI runs it",
    "make fuzz": "takes long; run by hand",
    "make soak": "takes half an hour; run by hand",
    "make replicas": "takes minutes; CI runs it",
    "SRPO_DATABASE_URL=": "needs a Postgres and a bucket; `make replicas` starts such servers",
    "make ray": "takes minutes, and needs the extra `ray`; CI runs it",
    "srpo generate --jsonl requests.jsonl -o s3:": "needs Ray and a bucket; `make ray ARGS=--all` draws so",
    "srpo cluster": "needs Ray, a Postgres and a bucket; `make ray` runs such a cluster",
    "make bench": "takes minutes on an idle machine; tests/test_bench.py measures a little",
    "srpo bench engine": "takes minutes; tests/test_bench.py measures a little",
    "srpo bench quality --model flux/srpo": "needs the gated weights and a GPU",
    "srpo bench api": "takes minutes; tests/test_capacity.py measures a little",
    "srpo bench capacity": "takes a minute; tests/test_capacity.py simulates a little",
    "srpo bench start": "takes minutes and 10 GB of memory",
    "srpo serve --transformer": "the reader's own files; tests/test_formats.py serves every format, LoRAs too",
    "srpo weights pull safety-compvis": "its digest is pinned, so no other file passes; tests/test_pull.py",
}


@dataclass(frozen=True)
class Block:
    """A fenced code block."""

    language: str
    text: str
    line: int

    def commands(self) -> Iterator[str]:
        """The block's commands, comments left out. One that spans lines is one: an open quote, `\\`, `|` or `&&`."""
        command = ""
        for line in self.text.splitlines():
            if not command and (not line.strip() or line.startswith("#")):
                continue
            command += line
            complete = subprocess.run(["bash", "-n", "-c", command], capture_output=True).returncode == 0
            if complete and not line.endswith("\\"):
                yield re.sub(r"\s{2,}#.*$", "", command)
                command = ""
            else:
                command += "\n"
        assert not command, f"line {self.line}: a command without an end: {command}"


def tokens(page: str) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(PAGES[page].read_text())


def inline(page: str) -> Iterator[Token]:
    return (part for token in tokens(page) for part in token.children or ())


def blocks(page: str, *languages: str) -> list[Block]:
    fences = [token for token in tokens(page) if token.type == "fence"]
    found = [Block(token.info.strip(), token.content, (token.map or [0])[0] + 1) for token in fences]
    return [block for block in found if not languages or block.language in languages]


def links(page: str) -> Iterator[str]:
    """Where the page's links and pictures lead."""
    for token in inline(page):
        if token.type in ("link_open", "image"):
            yield str(token.attrs["href" if token.type == "link_open" else "src"])


def code_spans(page: str) -> list[str]:
    return [token.content for token in inline(page) if token.type == "code_inline"]


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, by GitHub's rule."""
    found: set[str] = set()
    parsed = MarkdownIt("commonmark").enable("table").parse(path.read_text())
    for token, content in pairwise(parsed):
        if token.type == "heading_open":
            text = "".join(part.content for part in content.children or ())
            slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            found.add(next(name for name in (slug, *(f"{slug}-{n}" for n in range(1, 99))) if name not in found))
    return found


def exception_of(command: str) -> str | None:
    """How an excepted command begins."""
    return next((start for start in EXCEPTIONS if command.startswith(start)), None)
