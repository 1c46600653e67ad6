"""Where things lie: a slot is a name for one or more squares on the grid of tokens, and a thing's size there.

The tokenizer chooses the slots (see `grammar`), so that the transformer need not find out which thing goes where.
"""

CANVAS = 8  # tokens of a side of the size that the model draws
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


def spots_of(slot: str, width: int = CANVAS, height: int = CANVAS) -> list[Spot]:
    """The squares of a slot on `width` by `height` tokens."""
    middle = ((width - AMONG) // 2, (height - AMONG) // 2)
    margin, above = (width // 2 - AMONG) // 2, (height // 2 - AMONG) // 2
    right, low = width - AMONG - margin, height - AMONG - above
    squares = {
        "left": (margin, middle[1]),
        "right": (right, middle[1]),
        "top": (middle[0], above),
        "bottom": (middle[0], low),
        "low left": (margin, low),
        "low right": (right, low),
    }
    if slot == "alone":
        return [((width - ALONE) // 2, (height - ALONE) // 2)]
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
