"""The operator's prompt list: what it refuses, what it lets pass, and that it tells nobody the prompt."""

from pathlib import Path
from typing import Any, NoReturn

import pytest
from support.canaries import Canaries, post
from support.server import LiveServer

from pipelines.errors import PromptRefused, SafetyUnavailable
from pipelines.safety import prompts
from pipelines.safety.prompts import PromptGuard, make_prompt_guard

LIST = """\
# the operator's words
Straße
blue  cheese

/gr[ae]y\\s+goo/
猫
"""


@pytest.fixture
def words(tmp_path: Path) -> Path:
    file = tmp_path / "words.txt"
    file.write_text(LIST)
    return file


@pytest.mark.parametrize(
    "prompt",
    [
        "a straße at night",
        "STRASSE",
        "ｓｔｒａｓｓｅ",
        "stra\u200bs\u2060s\u00ade",
        "stra\ufe0fss\u034fe",
        "stra\U000e0100ss\u180de",
        "stra\x00sse",
        "some (blue cheese), please",
        "blue\n\t cheese",
        "𝐁𝐋𝐔𝐄 𝐂𝐇𝐄𝐄𝐒𝐄",
        "Grey Goo everywhere",
        "a GRAY  goo",
        "猫",
    ],
)
def test_what_a_reader_would_see_is_refused(words: Path, prompt: str) -> None:
    with pytest.raises(PromptRefused) as refused:
        make_prompt_guard(words).check(prompt)
    assert prompt not in str(refused.value)


@pytest.mark.parametrize("prompt", ["a strasser", "blue sky, no cheese", "bluecheese", "groy goo", "# the operator's"])
def test_other_words_pass(words: Path, prompt: str) -> None:
    make_prompt_guard(words).check(prompt)


class NoWork(Canaries):
    def submit(self, *_: Any, **__: Any) -> NoReturn:
        raise AssertionError("work was admitted")


async def test_a_refused_prompt_is_a_400_before_any_work_and_is_counted(words: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"prompt_list": words, "pool": NoWork}
    reply = await post(tmp_path, prompt="STRASSE", enable_safety_checker=False, **options)
    assert reply.status_code == 400
    assert reply.json()["error"]["code"] == "prompt_refused"
    assert reply.extensions["health"]["safety"]["prompts"] == {"rules": 4, "hook": False, "refused": 1}


@pytest.mark.long
def test_the_log_names_the_line_and_never_the_prompt(words: Path, serve: Any) -> None:
    server: LiveServer = serve("--prompt-list", str(words))
    assert server.generate(prompt="a zebra on a STRASSE").status_code == 400
    log = server.settled_log()
    assert "line 2 of the prompt list" in log
    assert "zebra" not in log


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("/(/", "not a regular expression"),
        ("//", "every"),
        ("/a*/", "every"),
        ("\u200b", "every"),
        ("/Straße/", "in no prompt"),
        ("/ｅ+/", "in no prompt"),
    ],
)
def test_a_list_that_cannot_be_meant_is_refused_with_its_line(tmp_path: Path, line: str, complaint: str) -> None:
    file = tmp_path / "list"
    file.write_text(f"fine\n{line}\n")
    with pytest.raises(ValueError, match=rf"line 2: .*{complaint}"):
        make_prompt_guard(file)


@pytest.mark.parametrize("expression", ["ΟΔΟΣ", "οδος", "ÉTÉ [a-z]+"])
def test_an_expression_may_have_capitals_and_final_letters(tmp_path: Path, expression: str) -> None:
    file = tmp_path / "list"
    file.write_text(f"/{expression}/")
    with pytest.raises(PromptRefused):
        make_prompt_guard(file).check(f"an {expression.replace('[a-z]+', 'x')}")


def test_a_runaway_expression_shows_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "REGEX_SECONDS", 0.01)
    file = tmp_path / "list"
    file.write_text("/(?:a|b|ab)+[cd]$/\n")
    guard: PromptGuard = make_prompt_guard(file)
    with pytest.raises(SafetyUnavailable):
        guard.check("ab" * 1900 + "c!")
