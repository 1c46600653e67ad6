"""Which words of a prompt a model of few words does not know. Its tokenizer leaves them out; the client is told."""

import re
from collections.abc import Collection

MOST_WORDS, MOST_LETTERS = 8, 24  # of a note: it is there to help, not to repeat a long prompt
WORD = re.compile(r"[^\W_]+")
LAST_LATIN = "\u024f"  # other scripts set no blanks between words, so their words cannot be told apart


def describe_unknown_words(prompt: str, words: Collection[str]) -> tuple[str, ...]:
    """A note that names the words of `prompt` that are not in `words` (lower case); none where all are."""
    found = dict.fromkeys(
        word for word in WORD.findall(prompt.lower()) if max(word) <= LAST_LATIN and not word.isdigit()
    )
    unknown = [word for word in found if word not in words]
    if not unknown:
        return ()
    shown = [word if len(word) <= MOST_LETTERS else word[:MOST_LETTERS] + "..." for word in unknown[:MOST_WORDS]]
    more = f" and {len(unknown) - MOST_WORDS} more" if len(unknown) > MOST_WORDS else ""
    return (f"prompt: this model does not know {', '.join(shown)}{more}, and draws without",)
