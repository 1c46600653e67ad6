"""What a stranger reads is true: links resolve, names exist, and every command and program runs as it stands.

A page's commands run in order, in a folder of their own that looks like a checkout after `make serve`, against a live
server: only its address, and the hub's, are others than on the page. What cannot run here is in
`pages.EXCEPTIONS` with a reason.
"""

import contextlib
import functools
import importlib.util
import io
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from support.checkout import ADDRESS, BIN, Checkout, run
from support.loopback_hub import TOKEN, Hub, serving
from support.node import FOLDER
from support.pages import EXCEPTIONS, PAGES, ROOT, RUN, SHOWN, anchors, blocks, code_spans, exception_of, links
from support.published import DEV, publish
from support.server import LiveServer

from server.__main__ import COMMANDS, WEIGHTS, main
from server.cli.bench import BENCHES
from server.settings.server import Settings
from weights.checkpoints import SAFETY

EXAMPLES = sorted(path for path in (ROOT / "docs" / "examples").iterdir() if path.suffix != ".md")
REAL_MODELS = (
    "README.md",
    "docs/weights.md",
)  # their commands serve flux/sketch, then the pulled weights; others `tiny`
NODE_MODULES = FOLDER / "node_modules"
SCRIPTS = [(page, number) for page in PAGES for number in range(len(blocks(page, "js")))]
each_page = pytest.mark.parametrize("page", PAGES)


# ---- What the pages say


def test_the_readme_is_short() -> None:
    assert len(PAGES["README.md"].read_text().split()) <= 1000


@each_page
def test_every_link_resolves(page: str) -> None:
    for link in links(page):
        if link.startswith(("https://", "http://127.0.0.1:8000/")):
            continue
        path, _, anchor = link.partition("#")
        target = (PAGES[page].parent / path).resolve() if path else PAGES[page]
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached, waiting = set(), ["README.md"]
    while waiting:
        page = waiting.pop()
        reached.add(page)
        targets = ((PAGES[page].parent / link.partition("#")[0]).resolve() for link in links(page))
        pages = {target.relative_to(ROOT).as_posix() for target in targets if target.is_relative_to(ROOT)}
        waiting += (pages & set(PAGES)) - reached
    assert reached == set(PAGES)


@each_page
def test_every_path_setting_target_and_command_that_a_page_names_exists(page: str) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for span in code_spans(page):
        if re.fullmatch(r"(server|pipelines|weights|bench|docs|deploy|tests)/[\w./-]*", span):
            assert (ROOT / span).exists(), span
        if "examples" not in page and (name := re.match(r"SRPO_([A-Z0-9_]+)", span)):
            assert name[1].lower() in Settings.model_fields, span
        if made := re.match(r"make ([a-z-]+)", span):
            assert made[1] in targets, span
        if typed := re.match(r"(?:\.venv/bin/)?srpo ([a-z]+)", span):
            assert typed[1] in COMMANDS, span
        if typed := re.match(r"srpo (bench|weights) ([a-z]+)", span):
            assert typed[2] in {"bench": BENCHES, "weights": WEIGHTS}[typed[1]], span


def test_every_folder_of_the_code_is_in_the_table_of_folders() -> None:
    table = PAGES["docs/architecture.md"].read_text()
    rows = set(re.findall(r"^\| `((?:server|pipelines|weights)/[\w/]*)` \|", table, re.MULTILINE))
    rooms = [ROOT / room for room in ("server", "pipelines", "weights")]
    packages = {file.parent.relative_to(ROOT).as_posix() + "/" for room in rooms for file in room.rglob("__init__.py")}
    assert rows == packages


@each_page
def test_every_code_block_says_what_it_is(page: str) -> None:
    assert {block.language for block in blocks(page)} <= {*RUN, *SHOWN}


# ---- The commands


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """The hub, with the tiny model's files under FLUX.1 [dev]'s and SRPO's names."""
    files = publish(tmp_path_factory.mktemp("published"))
    with serving(Hub(files, {DEV.name: DEV.revision, SAFETY.name: SAFETY.revision}, gated={DEV.name})) as server:
        yield server


@pytest.fixture
def checkout(tmp_path: Path, live: LiveServer, hub: Hub) -> Iterator[Checkout]:
    env = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    made = Checkout(tmp_path, live.url, env)
    yield made
    made.stop()


@pytest.mark.long
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "sh", "python")])
def test_the_commands_and_programs_of_a_page_run(page: str, checkout: Checkout) -> None:
    if page not in REAL_MODELS:
        checkout.env["SRPO_MODEL"] = "tiny"
    for block in blocks(page, "sh", "python"):
        if block.language == "python":
            run([sys.executable, "-c", block.text.replace(ADDRESS, checkout.url)], checkout.folder, checkout.env)
            continue
        for command in block.commands():
            if exception_of(command) is None:
                checkout.run(command)


@functools.cache
def options(*names: str) -> set[str]:
    """The options of a subcommand of `srpo`, as its help lists them."""
    with contextlib.redirect_stdout(io.StringIO()) as usage, pytest.raises(SystemExit, match="0"):
        main([*names, "--help"])
    return set(re.findall(r"--[a-z0-9-]+", usage.getvalue()))


@pytest.mark.long
def test_what_no_test_runs_would_be_understood() -> None:
    commands = {command for page in PAGES for block in blocks(page, "sh") for command in block.commands()}
    excepted = {command: start for command in commands if (start := exception_of(command))}
    assert set(excepted.values()) == set(EXCEPTIONS), "exceptions that no page needs"
    for command in excepted:
        words = shlex.split(command)
        if words[0] == "make":
            run(["make", "--dry-run", *words[1:]], ROOT, os.environ)
        if words[0] == "srpo":
            names = words[1:3] if words[1] in ("weights", "bench") else words[1:2]
            assert {word for word in words if word.startswith("--")} <= options(*names), command


@pytest.mark.parametrize(("page", "number"), SCRIPTS, ids=[f"{page}-{number}" for page, number in SCRIPTS])
def test_the_javascript_of_a_page_runs(page: str, number: int, live: LiveServer, clients: str, tmp_path: Path) -> None:
    (tmp_path / "node_modules").symlink_to(NODE_MODULES)
    (tmp_path / "script.mjs").write_text(blocks(page, "js")[number].text.replace(ADDRESS, live.url))
    assert run([clients, "script.mjs"], tmp_path, os.environ).stdout.strip()


# ---- The examples


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_an_example_saves_its_pictures(
    example: Path, live: LiveServer, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    program: str = {
        ".py": lambda: sys.executable,
        ".sh": lambda: "bash",
        ".mjs": lambda: request.getfixturevalue("clients"),
    }[example.suffix]()
    copy = tmp_path / example.name
    copy.write_bytes(example.read_bytes())
    (tmp_path / "node_modules").symlink_to(NODE_MODULES)
    printed = run([program, example.name], tmp_path, os.environ | {"SRPO_URL": live.url}).stdout
    saved = list(tmp_path.glob("*.jpeg"))
    assert saved
    for file in saved:
        assert file.name in printed
        with Image.open(file) as image:
            assert image.format == "JPEG"


def test_every_example_is_in_the_list() -> None:
    listed = set(links("docs/examples/README.md"))
    assert listed == {path.name for path in EXAMPLES}


# ---- What else a contributor gets


def test_the_hooks_call_the_projects_own_tools() -> None:
    """Nothing is fetched, and each tool is one of the development environment."""
    hooks = re.findall(r"^ +entry: (\S+)(?: -m (\S+))?", (ROOT / ".pre-commit-config.yaml").read_text(), re.MULTILINE)
    assert hooks
    assert "repo: https" not in (ROOT / ".pre-commit-config.yaml").read_text()
    for tool, module in hooks:
        assert (BIN / Path(tool).name).exists(), tool
        assert not module or importlib.util.find_spec(module), module


def test_the_workflow_calls_what_ci_runs() -> None:
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert re.search(r"run: .*\.ci/run$", workflow, re.MULTILINE)
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
