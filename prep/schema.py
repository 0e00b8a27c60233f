"""Check values from JSON files against declared types, with errors that say where a value is wrong."""

import dataclasses
import functools
import re
import reprlib
import types
import typing


@dataclasses.dataclass(frozen=True)
class IntRange:
    """An integer from `low` to `high`."""

    low: int
    high: int

    def allows(self, value: int) -> bool:
        """Whether a value is in the range."""
        return self.low <= value <= self.high

    def __str__(self) -> str:
        return f"an integer from {self.low} to {self.high}"


@dataclasses.dataclass(frozen=True)
class Pattern:
    """A string that matches a regular expression as a whole; `description` is for errors."""

    pattern: str
    description: str

    def allows(self, value: str) -> bool:
        """Whether a string matches."""
        return re.fullmatch(self.pattern, value) is not None

    def __str__(self) -> str:
        return self.description


def read(kind: typing.Any, value: typing.Any, path: str = "") -> typing.Any:
    """Check a value as the json module returns it, and convert it to the declared type.

    Args:
        kind: Annotated[int, IntRange], Annotated[str, Pattern], bool, X | None, list[X], tuple[X, Y, ...], dict[X, Y],
            a dataclass or TypedDict (an object with exactly these fields, where those with a default may be missing),
            or plain dict (an object with any content).
        path: the path of the value in its file, such as "shards[2].bytes".

    Raises:
        ValueError: a value is of another type; the message has its path, the value and the expected type.
    """
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        if type(value) is parts[0] and parts[1].allows(value):  # True and False are instances of int
            return value
        raise mismatch(path, value, parts[1])
    if origin in (typing.Union, types.UnionType):
        return None if value is None else read(parts[0], value, path)
    if origin is list and type(value) is list:
        return [read(parts[0], item, f"{path}[{i}]") for i, item in enumerate(value)]
    if origin is tuple and type(value) is list and len(value) == len(parts):
        return tuple(read(part, item, f"{path}[{i}]") for i, (part, item) in enumerate(zip(parts, value, strict=True)))
    if origin is dict and type(value) is dict:
        return {
            read(parts[0], key, f"a key in {path}"): read(parts[1], item, f"{path}.{key:.40}")
            for key, item in value.items()
        }
    if kind in (dict, bool) and type(value) is kind:
        return value
    if origin is None and kind not in (dict, bool):
        if dataclasses.is_dataclass(kind) and type(value) is kind:
            return value
        fields = _fields(kind)
        if type(value) is dict and _required(kind) <= value.keys() <= fields.keys():
            prefix = f"{path}." if path else ""
            values = {name: read(fields[name], value[name], prefix + name) for name in fields if name in value}
            try:
                return kind(**values)
            except ValueError as error:  # from a dataclass whose fields contradict each other
                raise ValueError(f"{path or 'content'}: {error}") from None
        raise mismatch(path, value, f"an object with {', '.join(fields)}")
    expected = {list: "a list", tuple: f"a list of {len(parts)}"}
    raise mismatch(path, value, "true or false" if kind is bool else expected.get(origin, "an object"))


@functools.cache
def _fields(kind: type) -> dict[str, typing.Any]:
    """The declared types of a dataclass's or TypedDict's fields."""
    return typing.get_type_hints(kind, include_extras=True)


@functools.cache
def _required(kind: type) -> frozenset[str]:
    """The names of those fields that have no default."""
    fields = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()
    optional = {field.name for field in fields if field.default is not dataclasses.MISSING}
    return frozenset(_fields(kind).keys() - optional)


def mismatch(path: str, value: typing.Any, expected: typing.Any) -> ValueError:
    """The error for a value that is not what is expected at `path`."""
    return ValueError(f"{path or 'content'} is {reprlib.repr(value)}, expected {expected}")
