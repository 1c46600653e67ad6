"""What the model knows: one row a concept, its icon, its other names, and whether its colour may change.

Icons are those of `fluent-emoji-flat` (Microsoft, MIT). People, skin tones, flags, religious signs and weapons are
left out.
"""

from typing import NamedTuple


class Concept(NamedTuple):
    """A thing that can be drawn. `name` is the first word for it; `other` are synonyms."""

    name: str
    icon: str
    other: tuple[str, ...] = ()
    colourable: bool = False

    @property
    def plural(self) -> str:
        if self.name in UNCOUNTED:
            return UNCOUNTED[self.name]
        if self.name.endswith("y") and self.name[-2] not in "aeiou":
            return self.name[:-1] + "ies"
        return self.name + ("es" if self.name.endswith(("s", "x", "ch", "sh", "o")) else "s")


UNCOUNTED = {"fish": "fish", "mouse": "mice", "leaf": "leaves"}


def parse_concepts(text: str) -> list[Concept]:
    """`name = icon | synonym, synonym` a line; a star before the name marks a colourable concept."""
    found = []
    for line in filter(None, map(str.strip, text.strip().splitlines())):
        left, _, names = line.partition("|")
        name, _, icon = (part.strip() for part in left.partition("="))
        colourable = name.startswith("*")
        name = name.removeprefix("*")
        other = tuple(part.strip() for part in names.split(",") if part.strip())
        found.append(Concept(name, icon or name.replace(" ", "-"), other, colourable))
    return found


CONCEPTS = parse_concepts("""
*apple = red-apple | fruit apple
banana
lemon
orange = tangerine | tangerine, mandarin
strawberry | berry
watermelon | melon slice
grapes | bunch of grapes
pineapple | ananas
cherry = cherries | cherries
*pear
peach
avocado
carrot
tomato
corn = ear-of-corn | maize
*mushroom | toadstool
pizza | slice of pizza
hamburger | burger
hot dog | hotdog
egg = egg
cheese = cheese-wedge
doughnut | donut
*cupcake | muffin
cake = birthday-cake | birthday cake
ice cream = soft-ice-cream | ice cream cone
cat = cat-face | kitten, kitty
dog = dog-face | puppy, pup
mouse = mouse-face
rabbit = rabbit-face | bunny
fox
bear | brown bear
panda | panda bear
tiger = tiger-face
lion
pig = pig-face | hog
frog
penguin
owl
*bird
duck
turtle | tortoise
*fish = tropical-fish
whale = spouting-whale
octopus
crab
snail
*butterfly
bee = honeybee | honeybee
ladybug = lady-beetle | ladybird
elephant
giraffe
horse = horse-face | pony
unicorn
dinosaur = t-rex | t-rex
tree = deciduous-tree
pine tree = evergreen-tree | fir tree
palm tree
cactus
*tulip
rose
sunflower
*leaf = leaf-fluttering-in-wind | leaves in the wind
four leaf clover = four-leaf-clover | clover
sun
moon = crescent-moon | crescent moon
*star
rainbow
cloud
snowman
snowflake
fire | flame
*droplet | drop, water drop
*heart = red-heart | love
*balloon
*gift = wrapped-gift | present
*book = closed-book
pencil
key
*umbrella | parasol
*hat = top-hat
*shirt = t-shirt | t-shirt
*shoe = running-shoe | sneaker
crown
gem = gem-stone | diamond
clock = alarm-clock | alarm clock
light bulb = light-bulb | bulb
guitar
basketball
house | home
castle
*car = automobile | automobile
*bus
*truck = delivery-truck | lorry
train = locomotive
*bicycle | bike
airplane | plane, aeroplane
rocket | spaceship
*boat = sailboat | sailing boat
ghost
robot
teddy bear
camera
""")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 44, 48),
    "orange": (246, 140, 30),
    "yellow": (250, 206, 40),
    "green": (48, 160, 72),
    "blue": (40, 104, 214),
    "purple": (134, 66, 190),
    "pink": (244, 138, 180),
    "gray": (140, 144, 150),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = COLOURS | {
    "red": (206, 52, 56),
    "yellow": (252, 222, 84),
    "green": (92, 178, 98),
    "blue": (74, 138, 226),
    "white": (255, 255, 255),
    "black": (16, 16, 20),
}
# What everybody tries first is never held out of training.
NEVER_HELD_OUT = {
    (kind, name, colour)
    for name in ("apple", "banana", "cat", "dog", "leaf", "book", "heart", "star", "car")
    for kind in ("ground", "colour", "place")
    for colour in (*BACKGROUNDS, "left", "right", "top", "bottom")
    if (kind, name, colour) not in {("ground", "cat", "pink"), ("colour", "car", "purple")}
}
