"""What a container needs, read off the Dockerfile; `python3 -m deploy.rootfs` executes it."""

import configparser
import json
from pathlib import Path

import pytest
import yaml

from deploy.dockerfile import Stage, context, ignored, parse, substitute
from server.__main__ import COMMANDS
from server.settings import Settings

ROOT = Path(__file__).parent.parent
ROOMS = ("server", "pipelines", "weights")
PREFIX = str(Settings.model_config["env_prefix"])


@pytest.fixture(scope="module")
def stages() -> list[Stage]:
    return parse((ROOT / "Dockerfile").read_text())


@pytest.fixture(scope="module")
def final(stages: list[Stage]) -> Stage:
    return stages[-1]


def settings_of(variables: dict[str, str]) -> dict[str, str]:
    return {name.removeprefix(PREFIX).lower(): value for name, value in variables.items() if name.startswith(PREFIX)}


def test_it_runs_as_a_fixed_user_who_is_not_root(final: Stage) -> None:
    user, _, group = final.find("USER")[-1].text.partition(":")
    assert user.isdigit()
    assert group.isdigit()
    assert "0" not in (user, group)
    assert final.steps.index(final.find("USER")[-1]) > final.steps.index(final.find("RUN")[-1])


def test_it_starts_the_server(final: Stage) -> None:
    (entrypoint,), (cmd,) = final.find("ENTRYPOINT"), final.find("CMD")
    assert entrypoint.text.startswith("[")
    assert entrypoint.words() == ["srpo"]
    assert cmd.words()[0] in COMMANDS
    assert final.find("STOPSIGNAL")[0].text == "SIGTERM"


def test_the_health_check_asks_ready_at_the_servers_port(final: Stage) -> None:
    (health,) = final.find("HEALTHCHECK")
    program, flag, code = json.loads(health.text.removeprefix("CMD"))
    assert (program, flag) == ("python", "-c")
    compile(code, "HEALTHCHECK", "exec")
    assert "/ready" in code
    assert f"{PREFIX}PORT" in code
    assert f"{PREFIX}PORT" in final.env()
    assert final.find("EXPOSE")[0].text == final.env()[f"{PREFIX}PORT"]
    assert health.flags["start-period"].endswith("m")  # real weights


def test_its_settings_are_real_and_only_keys_are_missing(final: Stage) -> None:
    chosen = settings_of(final.env())
    assert set(chosen) <= set(Settings.model_fields)
    with pytest.raises(ValueError, match=f"{PREFIX}API_KEYS"):
        Settings(**chosen)
    assert not Settings(**chosen, api_keys="a-long-key").is_loopback


def test_what_is_written_goes_to_volumes(final: Stage) -> None:
    volumes = [word for step in final.find("VOLUME") for word in step.words()]
    assert sorted(volumes) == ["/data", "/models"]
    env = final.env()
    assert {env[f"{PREFIX}DATA_DIR"], env[f"{PREFIX}MODELS_DIR"]} == set(volumes)
    written = [value for name, value in env.items() if name == "HOME" or "CACHE" in name]
    assert len(written) > 1
    assert all(value == "/data" or value.startswith("/data/") for value in written)


def test_dependencies_are_a_layer_that_code_does_not_change(stages: list[Stage], final: Stage) -> None:
    build = stages[0]
    installs = [step for step in build.find("RUN") if "-r requirements.txt" in step.text]
    assert len(installs) == 1
    assert "-c constraints.txt" in installs[0].text
    before = build.steps[: build.steps.index(installs[0])]
    copied = {word for step in before if step.name == "COPY" for word in step.words()[:-1]}
    assert copied == {"pyproject.toml", "constraints.txt"}
    code = [step for step in build.find("RUN") if "pip wheel" in step.text]
    assert "--no-deps" in code[0].text
    assert "--root /code" in code[0].text
    copies = [(step.flags.get("from"), step.words()) for step in final.find("COPY")]
    assert copies == [(build.name, ["/opt/srpo", "/opt/srpo"]), (build.name, ["/code/opt/srpo", "/opt/srpo"])]


def test_the_context_holds_what_is_copied_and_nothing_else(stages: list[Stage]) -> None:
    wanted = {word.rstrip("/") for step in stages[0].find("COPY") for word in step.words()[:-1]}
    assert wanted == {"pyproject.toml", "constraints.txt", "README.md", "LICENSE", *ROOMS}
    files = context(ROOT)
    assert {file.parts[0] for file in files} == wanted
    assert not [file for file in files if "__pycache__" in file.parts or "recipe" in file.parts]


def test_ignore_patterns_read_as_engines_read_them() -> None:
    patterns = ["*", "!server", "server/secret", "**/*.pyc"]
    names = ["data/key", ".git/config", "server/secret/x", "server/a/b.pyc", "server/app.py", "server/a/b.py"]
    assert [name for name in names if not ignored(Path(name), patterns)] == ["server/app.py", "server/a/b.py"]


def test_the_parser_joins_lines_reads_flags_and_refuses_what_it_does_not_know() -> None:
    text = (
        "ARG V=3.12\nFROM python:${V}-slim AS a\n# no\nRUN --mount=type=cache,target=/c \\\n  # no\n  one && \\\n  two"
    )
    (stage,) = parse(text)
    assert (stage.base, stage.name) == ("python:3.12-slim", "a")
    assert (stage.steps[0].text, stage.steps[0].flags) == ("one && two", {"mount": "type=cache,target=/c"})
    assert substitute("$A/${B}$C", {"A": "1", "B": "2"}) == "1/2"
    for line in ("SHELL [1]", "ONBUILD RUN x", "COPY --chown=1 a b", "RUN <<EOF"):
        with pytest.raises(ValueError, match="line 2"):
            parse(f"FROM x\n{line}")


def test_compose_agrees_with_the_image(final: Stage) -> None:
    (service,) = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())["services"].values()
    assert service["read_only"]
    assert service["init"]
    assert "/tmp" in service["tmpfs"]
    assert set(settings_of(service["environment"])) <= set(Settings.model_fields)
    assert sorted(volume.split(":")[1] for volume in service["volumes"]) == ["/data", "/models"]
    assert service["ports"] == [f"{final.env()[f'{PREFIX}PORT']}:{final.env()[f'{PREFIX}PORT']}"]
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
