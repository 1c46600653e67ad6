"""Command lines: what was typed arrives as it was typed."""

from pathlib import Path

import pytest

from server.__main__ import main as srpo
from server.cli.generate.batch import add_parameter_flags
from server.cli.terminal.parsing import parse
from server.cli.verify import VerifySettings
from server.cli.weights.pull import PullSettings

TYPED = ['a cat, on a "mat"', 'an unpaired " mark', "[a sign] in {braces", "12", "a\\b, c", " a space "]


def test_each_argument_of_a_list_stays_whole() -> None:
    kind = add_parameter_flags()
    assert parse(kind, "generate", ['a cat, on a "mat"']).prompts == ['a cat, on a "mat"']
    assert parse(kind, "generate", [*TYPED, "-o", "out"]).prompts == TYPED
    assert parse(kind, "generate", []).prompts == []
    assert parse(VerifySettings, "verify", ["one, two.png", "three.png"]).files == [
        Path("one, two.png"),
        Path("three.png"),
    ]
    pull = parse(PullSettings, "weights pull", ["flux/srpo", "--revision", "a/b=1", "--revision", "c/d=2"])
    assert (pull.names, pull.revision) == (["flux/srpo"], ["a/b=1", "c/d=2"])


def test_names_of_one_argument_are_separated_by_commas() -> None:
    settings = parse(add_parameter_flags(), "generate", ["x", "--devices", "cpu,cpu", "--safety-labels", "a, b"])
    assert (settings.devices, settings.safety_labels) == (("cpu", "cpu"), ("a", "b"))


def test_a_variable_that_cannot_be_read_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SRPO_PROMPTS", "[")
    assert srpo(["generate"]) == 2
    assert capsys.readouterr().err.startswith('srpo generate: error parsing value for field "prompts"')
