"""What a terminal is shown: text of strangers without control characters, and small pictures.

Each way to show a picture is a row of `PROTOCOLS`.
"""

import base64
import io
from collections.abc import Callable, Mapping
from typing import NamedTuple

from PIL import Image
from rich.console import Console
from rich.text import Text

Renderer = Callable[[Image.Image], str]  # returns the text that makes a terminal show it
BLOCK = "▀"  # its upper half in the foreground's colour, its lower half in the background's
BLOCKS_WIDE = 48  # characters
CHUNK = 4096  # bytes of base64 in one kitty command


def escape(text: str) -> str:
    """Text from a file of a stranger, which must not control the terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def show_failure(console: Console, what: str, error: str) -> None:
    """Say in a line that something was not drawn. Neither text is taken as rich's markup."""
    console.print(Text.assemble(("not drawn:", "red"), f" {what}: {error}"), soft_wrap=True)


def encode_png(picture: Image.Image) -> str:
    with io.BytesIO() as file:
        picture.save(file, "png")
        return base64.b64encode(file.getvalue()).decode("ascii")


def kitty(picture: Image.Image) -> str:
    """The kitty graphics protocol (also Ghostty, WezTerm, Konsole)."""
    data = encode_png(picture)
    chunks = [data[start : start + CHUNK] for start in range(0, len(data), CHUNK)]
    commands = []
    for number, chunk in enumerate(chunks):
        keys = "f=100,a=T,c=32," if number == 0 else ""
        commands.append(f"\033_G{keys}m={int(number < len(chunks) - 1)};{chunk}\033\\")
    return "".join(commands)


def iterm(picture: Image.Image) -> str:
    """iTerm2's inline images."""
    return f"\033]1337;File=inline=1;width=32:{encode_png(picture)}\a"


def blocks(picture: Image.Image) -> str:
    """Two pixels a character, for every terminal with 24-bit colour."""
    width = min(BLOCKS_WIDE, picture.width)
    height = max(2, 2 * round(picture.height * width / picture.width / 2))
    pixels = picture.resize((width, height)).convert("RGB").load()
    assert pixels is not None

    def cell(x: int, y: int) -> str:
        upper, lower = (";".join(map(str, pixels[x, row])) for row in (y, y + 1))  # type: ignore[arg-type]
        return f"\033[38;2;{upper}m\033[48;2;{lower}m{BLOCK}"

    return "\n".join("".join(cell(x, y) for x in range(width)) + "\033[0m" for y in range(0, height, 2))


class Protocol(NamedTuple):
    """How a terminal is recognized by its environment variables, and how it is shown a picture."""

    matches: Callable[[Mapping[str, str]], bool]
    render: Renderer


PROTOCOLS: Mapping[str, Protocol] = {  # the first that matches is taken
    "kitty": Protocol(
        lambda env: "KITTY_WINDOW_ID" in env or env.get("TERM") in ("xterm-kitty", "xterm-ghostty"), kitty
    ),
    "iterm": Protocol(lambda env: env.get("TERM_PROGRAM") in ("iTerm.app", "WezTerm"), iterm),
    "blocks": Protocol(lambda env: env.get("COLORTERM") in ("truecolor", "24bit"), blocks),
}


def choose_renderer(environment: Mapping[str, str]) -> Renderer | None:
    """The function that turns a picture into text for this terminal; None if it cannot show one."""
    return next((protocol.render for protocol in PROTOCOLS.values() if protocol.matches(environment)), None)
