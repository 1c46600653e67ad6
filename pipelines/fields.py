"""The kinds of value a generation parameter can have.

A kind is the one place that knows what a value may look like: it parses strictly (no `"28"` for 28, no `true` for 1),
says in words what it expects, and gives its JSON schema. `pipelines.request.GenerationParams` is written in kinds;
validation, error text, OpenAPI, the table in docs/api.md and the command line follow from them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt
from typing import Any, NamedTuple

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

MAX_EXACT_INTEGER = 2**53  # every integer up to here is exact as a JSON (IEEE double) number


class Issue(NamedTuple):
    """One thing wrong with a value: where below the field, what was expected, what came."""

    path: tuple[str, ...]
    expected: str
    received: Any


class Invalid(ValueError):
    """A value its kind refuses. Carries one or more issues."""

    def __init__(self, *issues: Issue) -> None:
        super().__init__("; ".join(issue.expected for issue in issues))
        self.issues = issues


class ParamType:
    """A kind of value. Usable as pydantic metadata: `Annotated[int, Integer(1, 50)]`."""

    code = "invalid"

    @property
    def expected(self) -> str:
        raise NotImplementedError

    def schema(self) -> dict[str, Any]:
        """JSON schema of the accepted values (description and default are the field's)."""
        raise NotImplementedError

    def parse(self, value: Any) -> Any:
        """The value in its final form; raises `Invalid`."""
        raise NotImplementedError

    def refuse(self, value: Any) -> Invalid:
        return Invalid(Issue((), self.expected, value))

    def _validate(self, value: Any) -> Any:
        try:
            return self.parse(value)
        except Invalid as error:
            raise PydanticCustomError(
                self.code, "{expected}", {"expected": self.expected, "issues": error.issues}
            ) from None

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._validate)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return self.schema()


@dataclass(frozen=True)
class Integer(ParamType):
    """An integer from `low` to `high`, or an integral float no larger than 2^53."""

    low: int
    high: int
    multiple_of: int = 1
    code = "invalid_integer"

    @property
    def expected(self) -> str:
        what = "an integer" if self.multiple_of == 1 else f"a multiple of {self.multiple_of}"
        return f"{what} from {self.low} to {self.high}"

    def schema(self) -> dict[str, Any]:
        steps = {} if self.multiple_of == 1 else {"multipleOf": self.multiple_of}
        return {"type": "integer", "minimum": self.low, "maximum": self.high, **steps}

    def parse(self, value: Any) -> int:
        if isinstance(value, float) and value.is_integer() and abs(value) <= MAX_EXACT_INTEGER:
            value = int(value)
        if type(value) is not int or not self.low <= value <= self.high or value % self.multiple_of:
            raise self.refuse(value)
        return value


@dataclass(frozen=True)
class Number(ParamType):
    """A finite number from `low` to `high`."""

    low: float
    high: float
    code = "invalid_number"

    @property
    def expected(self) -> str:
        return f"a number from {self.low:.12g} to {self.high:.12g}"

    def schema(self) -> dict[str, Any]:
        return {"type": "number", "minimum": self.low, "maximum": self.high}

    def parse(self, value: Any) -> float:
        if type(value) not in (int, float) or not self.low <= value <= self.high:  # NaN fails the comparison
            raise self.refuse(value)
        return float(value)


@dataclass(frozen=True)
class Text(ParamType):
    """A string of `low` to `high` Unicode characters."""

    low: int
    high: int
    code = "invalid_string"

    @property
    def expected(self) -> str:
        return f"a string of {self.low} to {self.high} characters"

    def schema(self) -> dict[str, Any]:
        return {"type": "string", "minLength": self.low, "maxLength": self.high}

    def parse(self, value: Any) -> str:
        if not isinstance(value, str) or not self.low <= len(value) <= self.high:
            raise self.refuse(value)
        return value


@dataclass(frozen=True)
class Url(ParamType):
    """Where a file is, as an http(s) address; or the file itself, as a data URI."""

    code = "invalid_url"
    schemes = ("http://", "https://", "data:")

    @property
    def expected(self) -> str:
        return "an http:// or https:// address, or a data URI"

    def schema(self) -> dict[str, Any]:
        return {"type": "string", "format": "uri"}

    def parse(self, value: Any) -> str:
        if not isinstance(value, str) or not value[:8].lower().startswith(self.schemes):
            raise self.refuse(value)
        return value


@dataclass(frozen=True)
class Choice(ParamType):
    """One of a few names."""

    names: tuple[str, ...]
    code = "invalid_choice"

    @property
    def expected(self) -> str:
        return "one of " + ", ".join(self.names)

    def schema(self) -> dict[str, Any]:
        return {"type": "string", "enum": list(self.names)}

    def parse(self, value: Any) -> str:
        if not isinstance(value, str) or value not in self.names:
            raise self.refuse(value)
        return value


@dataclass(frozen=True)
class Boolean(ParamType):
    """true or false, nothing else."""

    code = "invalid_boolean"

    @property
    def expected(self) -> str:
        return "true or false"

    def schema(self) -> dict[str, Any]:
        return {"type": "boolean"}

    def parse(self, value: Any) -> bool:
        if not isinstance(value, bool):
            raise self.refuse(value)
        return value


class Size(NamedTuple):
    """Width and height in pixels."""

    width: int
    height: int

    @classmethod
    def largest_square(cls, pixels: int) -> "Size":
        """The largest square of at most so many pixels, its sides multiples of 32 as every model takes them."""
        side = isqrt(pixels) // 32 * 32
        return cls(side, side)


@dataclass(frozen=True)
class ImageSize(ParamType):
    """A preset's name, or an object whose absent sides take the default size's."""

    presets: Mapping[str, Size]
    side: Integer
    default: Size
    code = "invalid_image_size"

    @property
    def expected(self) -> str:
        return f"one of {', '.join(self.presets)}, or an object with width and height, each {self.side.expected}"

    def schema(self) -> dict[str, Any]:
        sides = {name: self.side.schema() | {"default": value} for name, value in self.default._asdict().items()}
        note = f"For both height and width, the value must be a multiple of {self.side.multiple_of}."
        return {
            "anyOf": [
                {"type": "object", "properties": sides, "description": note},
                {"type": "string", "enum": list(self.presets), "description": "The size of the generated image."},
            ]
        }

    def parse(self, value: Any) -> Size:
        if isinstance(value, str) and value in self.presets:
            return self.presets[value]
        if not isinstance(value, dict):
            raise self.refuse(value)
        sides: dict[str, int] = {}
        issues: list[Issue] = []
        for name, default in self.default._asdict().items():
            given = value.get(name)
            try:
                sides[name] = default if given is None else self.side.parse(given)
            except Invalid:
                issues.append(Issue((name,), self.side.expected, given))
        if issues:
            raise Invalid(*issues)
        return Size(**sides)

    def nearest(self, width: int, height: int) -> Size:
        """The valid size nearest to this shape, of two positive lengths. Proportions are kept as far as the bounds go.

        A size within the bounds keeps its lengths, rounded to the multiple; a larger or smaller one is scaled.
        """
        low, high, step = self.side.low, self.side.high, self.side.multiple_of
        scale = min(max(1.0, low / min(width, height)), high / max(width, height))
        sides = (round(length * scale / step) * step for length in (width, height))
        return Size(*(int(min(max(length, low), high)) for length in sides))
