"""Settings, keys and the `srpo` command's words."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError
from support.command_line import srpo
from support.server import START_LIMIT

from server.errors import Unauthorized
from server.security.keys import KeyRing, new_key
from server.settings.server import Settings


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def test_every_setting_is_a_flag_with_help() -> None:
    text = srpo("serve", "--help").stdout
    for name, field in Settings.model_fields.items():
        assert f"--{name.replace('_', '-')}" in text
        assert field.description
        assert field.description.split()[0] in text


@pytest.mark.parametrize(
    ("arguments", "env", "complaint"),
    [
        (["--port", "99999"], {}, "SRPO_PORT (--port)"),
        (["--host", "0.0.0.0"], {}, "--allow-no-keys"),
        ([], {"SRPO_MODEL": "flux/unheard-of"}, "SRPO_MODEL (--model): expected auto or one of"),
        ([], {"SRPO_SAFETY_ACTION": "pixelate"}, "(--safety-action): expected one of black, blur, error, flag"),
        (["--safety-policy", "sometimes"], {}, "(--safety-policy): expected one of client, always, never"),
        (["--store-url", "ftp://host/x"], {}, "(--store-url): expected file:///FOLDER or s3://BUCKET/PREFIX"),
        (["--store-url", "s3:///x"], {}, "(--store-url): expected file:///FOLDER or s3://BUCKET/PREFIX"),
        (["--store-url", "file://host/x"], {}, "(--store-url): expected file:///FOLDER or s3://BUCKET/PREFIX"),
        ([], {"SRPO_API_KEYS": "short"}, "at least 8"),
        ([], {"SRPO_PUBLIC_URL": "images.example"}, "begins with http"),
        (["--nonsense", "1"], {}, "--nonsense"),
        ([], {"SRPO_API_KEYS": " , "}, "SRPO_API_KEYS (--api-keys): it holds no key"),
        ([], {"SRPO_MAX_BODY": "infMiB"}, "SRPO_MAX_BODY (--max-body): 'infMiB' is not a number of bytes"),
        ([], {"SRPO_UPLOADS": "nanGiB"}, "SRPO_UPLOADS"),
    ],
)
def test_a_wrong_setting_is_one_clear_line(arguments: list[str], env: dict[str, str], complaint: str) -> None:
    ended = srpo("serve", *arguments, **env)
    assert ended.returncode == 2
    assert complaint in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("arguments", "env"),
    [
        (["--log-format", "console"], {}),
        (["--log_format=console"], {"SRPO_LOG_FORMAT": "json"}),
        ([], {"SRPO_LOG_FORMAT": "console"}),
    ],
)
def test_in_a_log_for_people_wrong_settings_are_lines(arguments: list[str], env: dict[str, str]) -> None:
    ended = srpo("serve", "--port", "99999", *arguments, **env)
    assert ended.returncode == 2
    assert ended.stderr.startswith("srpo serve: SRPO_PORT (--port): ")


def test_in_a_log_of_json_wrong_settings_are_json_too() -> None:
    ended = srpo("serve", "--port", "99999", "--queue-size", "x")
    assert ended.returncode == 2
    entries = [json.loads(line) for line in ended.stderr.splitlines()]
    assert {(entry["event"], entry["level"]) for entry in entries} == {("start_failed", "error")}
    assert sorted(entry["reason"].split(":")[0] for entry in entries) == [
        "SRPO_PORT (--port)",
        "SRPO_QUEUE_SIZE (--queue-size)",
    ]
    said = srpo("serve", "--port", "99999", "--log-format", "console").stderr
    assert said.startswith("srpo serve: SRPO_PORT (--port): ")


@pytest.mark.parametrize("name", ["idle_release", "images_expire", "request_timeout", "shutdown_grace"])
def test_a_time_has_units(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for text, seconds in {"90": 90, "90s": 90, "15m": 900, "2h": 7200, "7d": 604800}.items():
        monkeypatch.setenv(f"SRPO_{name.upper()}", text)
        assert getattr(Settings(), name) == seconds
    monkeypatch.setenv(f"SRPO_{name.upper()}", "a week")
    with pytest.raises(ValidationError, match="'a week': expected seconds, or a time such as 15m"):
        Settings()


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_no_setting_is_without_end_or_no_number(value: float) -> None:
    names = [name for name, field in Settings.model_fields.items() if re.search(r"\bfloat\b", str(field.annotation))]
    assert {"images_expire", "link_lifetime", "request_timeout", "lease", "idle_release"} <= set(names)
    for name in names:
        with pytest.raises(ValidationError, match="finite number"):
            Settings.model_validate({name: value})


def test_a_start_names_unknown_variables_and_a_key_file_that_is_not_there() -> None:
    unknown = {"SRPO_SAFTY_CHECKER": "none", "SRPO_XYZ": "1"}
    env = {"PATH": "/usr/bin:/bin", "SRPO_API_KEYS_FILE": "/nowhere"} | unknown
    command = [sys.executable, "-m", "server", "serve"]
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=START_LIMIT)
    assert ended.returncode == 2
    (failure,) = [json.loads(line) for line in ended.stderr.splitlines() if '"error"' in line]
    assert (failure["event"], failure["reason"]) == ("start_failed", "/nowhere: No such file or directory")
    assert "Traceback" not in ended.stderr
    lines = [line for line in ended.stderr.splitlines() if "unknown_setting" in line]
    assert [json.loads(line)["name"] for line in lines] == ["SRPO_SAFTY_CHECKER", "SRPO_XYZ"]
    assert [json.loads(line)["nearest"] for line in lines] == ["SRPO_SAFETY_CHECKER", None]


@pytest.mark.parametrize("command", [("verify",), ("keys", "extra"), ("weights", "inspect"), ("bench", "nothing")])
def test_wrong_arguments_exit_with_2(command: tuple[str, ...]) -> None:
    ended = srpo(*command)
    assert ended.returncode == 2
    assert f"srpo {' '.join(command[: 2 if command[0] == 'weights' else 1])}: " in ended.stderr
    assert "Traceback" not in ended.stderr


def test_commands_about_files_read_no_environment_variables(tmp_path: Path) -> None:
    ended = srpo("weights", "convert", str(tmp_path / "absent"), str(tmp_path / "out"), TO="nonsense", SRPO_TO="q5")
    assert f"{tmp_path / 'absent'}" in ended.stderr
    assert "nonsense" not in ended.stderr


def test_flags_win_over_the_environment_and_sizes_take_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SRPO_MAX_BODY", "2MiB")
    monkeypatch.setenv("SRPO_API_KEYS", " one-long-key , another-key ")
    settings = Settings()
    assert settings.max_body == 2 * 2**20
    assert settings.api_keys == ("one-long-key", "another-key")
    assert Settings(max_body=4096).max_body == 4096


def test_a_network_address_needs_keys_or_an_explicit_word() -> None:
    with pytest.raises(ValidationError, match="reachable from other machines"):
        Settings(host="192.0.2.1")
    assert Settings(host="192.0.2.1", api_keys=("long-enough",)).needs_key
    assert not Settings(host="::", allow_no_keys=True).needs_key
    assert Settings(host="::1").is_loopback


def test_a_key_file_holds_hashes_names_and_comments(tmp_path: Path) -> None:
    (key, line), (other, second) = new_key(), new_key()
    file = tmp_path / "keys"
    file.write_text(f"# clients\nalice {line}\n\n{second}  # bob\n")
    ring = KeyRing(file=file)
    for good in (key, other):
        ring.authenticate(good)
    for bad in (None, "", "x", line, f"{key}x", f"Bearer {key}"):
        with pytest.raises(Unauthorized):
            ring.authenticate(bad)
    assert key not in file.read_text()


@pytest.mark.parametrize("text", ["", "# nobody\n", "alice secret\n", "sha256:12\n"])
def test_a_key_file_that_admits_nobody_or_cannot_be_read_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "keys").write_text(text)
    with pytest.raises(ValueError, match="keys"):
        KeyRing(file=tmp_path / "keys")


def test_srpo_keys_makes_a_key_and_its_line(tmp_path: Path) -> None:
    text = srpo("keys").stdout
    found = re.search(r"(sk-\S+)\n.*(sha256:\S+)", text)
    assert found
    (tmp_path / "keys").write_text(found[2])
    KeyRing(file=tmp_path / "keys").authenticate(found[1])
