"""Small pictures in terminals that can show them: one row of PROTOCOLS each."""

import base64
import io
from collections.abc import Callable, Mapping
from typing import NamedTuple

from PIL import Image

Show = Callable[[Image.Image], str]  # to the text that makes a terminal show it
BLOCK = "▀"  # its upper half in the foreground's colour, its lower half in the background's
BLOCKS_WIDE = 48  # characters
CHUNK = 4096  # bytes of base64 in one kitty command


def png(picture: Image.Image) -> str:
    with io.BytesIO() as file:
        picture.save(file, "png")
        return base64.b64encode(file.getvalue()).decode("ascii")


def kitty(picture: Image.Image) -> str:
    """The kitty graphics protocol (also Ghostty, WezTerm, Konsole)."""
    data = png(picture)
    chunks = [data[start : start + CHUNK] for start in range(0, len(data), CHUNK)]
    commands = []
    for number, chunk in enumerate(chunks):
        keys = "f=100,a=T,c=32," if number == 0 else ""
        commands.append(f"\033_G{keys}m={int(number < len(chunks) - 1)};{chunk}\033\\")
    return "".join(commands)


def iterm(picture: Image.Image) -> str:
    """iTerm2's inline images."""
    return f"\033]1337;File=inline=1;width=32:{png(picture)}\a"


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
    """How a terminal is known by its environment, and how it is shown a picture."""

    known: Callable[[Mapping[str, str]], bool]
    show: Show


PROTOCOLS: Mapping[str, Protocol] = {  # the first that fits
    "kitty": Protocol(
        lambda env: "KITTY_WINDOW_ID" in env or env.get("TERM") in ("xterm-kitty", "xterm-ghostty"), kitty
    ),
    "iterm": Protocol(lambda env: env.get("TERM_PROGRAM") in ("iTerm.app", "WezTerm"), iterm),
    "blocks": Protocol(lambda env: env.get("COLORTERM") in ("truecolor", "24bit"), blocks),
}


def shower(environment: Mapping[str, str]) -> Show | None:
    """What turns a picture into text for this terminal; None if it cannot show one."""
    return next((protocol.show for protocol in PROTOCOLS.values() if protocol.known(environment)), None)
