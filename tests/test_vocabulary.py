"""What a model of few words says of those it does not know."""

import pytest

from pipelines.engine.vocabulary import describe_unknown_words

WORDS = {"a", "cat", "red", "t", "rex"}


@pytest.mark.parametrize("prompt", ["a red cat", "A Cat!", "a T-Rex", "2 cat", "", "...", "一只猫"])
def test_known_words_numbers_and_scripts_without_blanks_need_no_note(prompt: str) -> None:
    assert describe_unknown_words(prompt, WORDS) == ()


def test_unknown_words_are_named_once_in_their_order() -> None:
    (note,) = describe_unknown_words("a Fluffy cat, fluffy; très belle", WORDS)
    assert note == "prompt: this model does not know fluffy, très, belle, and draws without"


def test_a_note_is_short_however_long_the_prompt() -> None:
    (note,) = describe_unknown_words(" ".join("abcdefghijklmnopqrstuvwxyz" * 3 + "z" * i for i in range(500)), WORDS)
    assert len(note) < 320
    assert "and 492 more" in note
