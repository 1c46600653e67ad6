"""Parameters of a query string: text that is one of the kinds of `pipelines.fields`, or a 400 that names it."""

from typing import Any

from pipelines.fields import Choice, Integer, Invalid


class QueryInteger(Integer):
    """An integer from `low` to `high` in decimal digits."""

    code = "invalid_query"

    def parse(self, value: Any) -> int:
        try:
            return super().parse(int(value[:9]) if value.isascii() and value.isdecimal() else None)
        except Invalid:
            raise self.refuse(value) from None


class QueryChoice(Choice):
    """One of a few names."""

    code = "invalid_query"
