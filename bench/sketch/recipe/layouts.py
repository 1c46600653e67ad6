"""Where things lie: a slot is a name for one or more squares on the grid of tokens, and a thing's size there.

The tokenizer chooses the slots (see `grammar`), so that the transformer need not find out which thing goes where.
A picture of another shape is a window on the same plane: the canvas is in its middle, with things on it, and the ground
goes on around it. So nothing but the position ids says what shape a picture has.
"""

CANVAS = 8  # tokens of the canvas' side
WINDOWS = ((8, 8), (12, 8), (8, 12), (16, 8), (8, 16), (24, 8), (8, 24))  # tokens, width and height, of trained shapes
ALONE, AMONG = 6, 4  # tokens of a thing's side: the same in every picture, since each size is drawn anew
PLACES = ("left", "right", "top", "bottom")
SLOTS = ("alone", *PLACES, "low left", "low right", "pair", "three")
SKY = {
    "sun",
    "moon",
    "star",
    "rainbow",
    "cloud",
    "airplane",
    "rocket",
    "balloon",
    "bat",
    "eagle",
    "helicopter",
    "ufo",
    "planet",
    "earth",
    "lightning",
    "snowflake",
    "bird",
    "butterfly",
    "bee",
    "dove",
    "crow",
    "phoenix",
    "kite",
    "full moon",
    "smiling sun",
    "rain",
    "comet",
    "fireworks",
}
Spot = tuple[int, int]  # left, top


def side_of(slot: str) -> int:
    return ALONE if slot == "alone" else AMONG


def window_start(tokens: int) -> int:
    """The first row or column of a picture of so many, counted from the canvas' own."""
    return (CANVAS - tokens) // 2


def spots_of(slot: str) -> list[Spot]:
    """The squares of a slot on the canvas."""
    middle, far = (CANVAS - AMONG) // 2, CANVAS - AMONG
    squares = {
        "left": (0, middle),
        "right": (far, middle),
        "top": (middle, 0),
        "bottom": (middle, far),
        "low left": (0, far),
        "low right": (far, far),
    }
    if slot == "alone":
        return [((CANVAS - ALONE) // 2,) * 2]
    if slot == "pair":
        return [squares["left"], squares["right"]]
    if slot == "three":
        return [squares["top"], squares["low left"], squares["low right"]]
    return [squares[slot]]


def assign_slots(names: list[str], on_scene: bool, above: bool = False, place: str | None = None) -> list[str]:
    """The slots of one to three unlike things, in the order of the prompt."""
    if len(names) == 1:
        if place:
            return [place]
        return [("top" if names[0] in SKY else "bottom") if on_scene else "alone"]
    if len(names) == 2 and above:
        return ["top", "bottom"]
    if len(names) == 2:
        flying = [name in SKY for name in names]
        if on_scene and sum(flying) == 1:
            return ["top" if flies else "bottom" for flies in flying]
        return ["low left", "low right"] if on_scene else ["left", "right"]
    highest = next((index for index, name in enumerate(names) if name in SKY), 0)
    rest = iter(("low left", "low right"))
    return ["top" if index == highest else next(rest) for index in range(3)]
