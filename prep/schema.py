"""Values from JSON files as the types that they are declared as, or an error that says where."""

import dataclasses
import functools
import re
import reprlib
import types
import typing


@dataclasses.dataclass(frozen=True)
class Whole:
    """A whole number from `low` to `high`."""

    low: int
    high: int

    def allows(self, value: int) -> bool:
        return self.low <= value <= self.high

    def __str__(self) -> str:
        return f"a whole number from {self.low} to {self.high}"


@dataclasses.dataclass(frozen=True)
class Text:
    """A text that the regular expression `pattern` matches as a whole; `name` is for the errors."""

    pattern: str
    name: str

    def allows(self, value: str) -> bool:
        return re.fullmatch(self.pattern, value) is not None

    def __str__(self) -> str:
        return self.name


def read(kind: typing.Any, value: typing.Any, place: str = "") -> typing.Any:
    """`value`, as the json module gives it, checked to be of the type `kind` and made one.

    `kind` is Annotated[int or str, Whole or Text], None or another (X | None), list[X],
    tuple[X, Y, ...], dict[X, Y], a dataclass or a TypedDict (an object with these fields and no
    others), or plain dict (an object with anything in it). Raises ValueError with the place of the
    first value that is of another type, "shards[2].bytes", and what it is.
    """
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        if type(value) is parts[0] and parts[1].allows(value):  # True and False are int too
            return value
        raise wrong(place, value, parts[1])
    if origin in (typing.Union, types.UnionType):
        return None if value is None else read(parts[0], value, place)
    if origin is list and type(value) is list:
        return [read(parts[0], item, f"{place}[{i}]") for i, item in enumerate(value)]
    if origin is tuple and type(value) is list and len(value) == len(parts):
        return tuple(read(*pair, f"{place}[{i}]") for i, pair in enumerate(zip(parts, value)))
    if origin is dict and type(value) is dict:
        return {
            read(parts[0], key, f"a key in {place}"): read(parts[1], item, f"{place}.{key:.40}")
            for key, item in value.items()
        }
    if kind is dict and type(value) is dict:
        return value
    if origin is None and kind is not dict:
        if dataclasses.is_dataclass(kind) and isinstance(value, kind):
            return value
        fields = _fields(kind)
        if type(value) is dict and value.keys() == fields.keys():
            prefix = f"{place}." if place else ""
            found = {name: read(fields[name], value[name], prefix + name) for name in fields}
            try:
                return kind(**found)
            except ValueError as error:  # of a dataclass whose fields don't fit each other
                raise ValueError(f"{place or 'it'}: {error}") from None
        raise wrong(place, value, f"an object with {', '.join(fields)}")
    expected = {list: "a list", tuple: f"a list of {len(parts)}"}
    raise wrong(place, value, expected.get(origin, "an object"))


@functools.cache
def _fields(kind: type) -> dict:
    """The types of a dataclass's or TypedDict's fields by name."""
    return typing.get_type_hints(kind, include_extras=True)


def wrong(place: str, value: typing.Any, expected: typing.Any) -> ValueError:
    """The error for a `value` that is not what is `expected` at `place`."""
    return ValueError(f"{place or 'it'} is {reprlib.repr(value)}, expected {expected}")
