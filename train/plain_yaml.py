"""The part of YAML that recipes need: keys with numbers, texts, booleans and lists of these.

PyYAML's safe loader, which refuses here what no recipe needs: anchors, aliases and tags, dates, numbers in base 8 or
60, nested keys, duplicate keys, and overlong texts and files.
"""

import pathlib
import re
from collections.abc import Callable
from typing import ClassVar, NamedTuple, TypeVar

import yaml

from launch.errors import UserError

LARGEST_FILE = 64 * 1024
"""Bytes in a file at most; a recipe has about a thousand."""
LONGEST_SCALAR = 100
"""Characters in a number or text at most."""
DEPTH = 3
"""Levels of nesting at most: a mapping of lists of scalars."""
TYPES = ("bool", "int", "float", "null")
"""Types of scalars without quotes; PyYAML's others, such as dates, stay text."""
SURPRISING = re.compile(r"[-+]?0[0-7_]+$|.*:")
"""Numbers that YAML reads in base 8 or 60: 010 is 8, and 1:30 is 90."""

Value = TypeVar("Value")


class Entry(NamedTuple):
    """The value of a key, and the line of the key, from 1."""

    value: object
    line: int


class Loader(yaml.SafeLoader):
    """Constructs plain values; raises yaml.YAMLError at references, tags and deep nesting."""

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] in TYPES]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Compose a node as the base class does, which calls this for every nested one."""
        event = self.peek_event()
        problem = None
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            problem = "anchors and aliases (& and *) are not supported in recipes; write the value out"
        elif event.tag is not None:
            problem = "tags (!) are not supported in recipes; remove it"
        elif isinstance(event, yaml.ScalarEvent) and len(event.value) > LONGEST_SCALAR:
            problem = f"a value of {len(event.value)} characters, expected at most {LONGEST_SCALAR}"
        elif self.depth == DEPTH:
            problem = "nested too deeply, expected `key: value` or `key: [a, b]`"
        if problem:
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        if isinstance(node, yaml.ScalarNode) and node.tag.endswith((":int", ":float")) and SURPRISING.match(node.value):
            problem = f"{node.value} is a number in base 8 or 60 to YAML; write a decimal number without leading zeros"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return node

    def construct(self, node: yaml.Node) -> object:
        """The plain value of a node."""
        try:
            return self.construct_object(node, deep=True)
        except ValueError as error:  # a number without digits: 0x_
            raise yaml.MarkedYAMLError(problem=str(error), problem_mark=node.start_mark) from None


def read_file(path: pathlib.Path) -> dict[str, Entry]:
    """Read a YAML file of lines `key: value`; returns its entries in order.

    Raises:
        UserError: it is not such a file; the message names the line.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        data = file.read(LARGEST_FILE + 1)
    if len(data) > LARGEST_FILE:
        raise UserError(f"{path}: has more than {LARGEST_FILE} bytes, too many for a recipe; give another file")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not UTF-8; save it as UTF-8 text") from None

    def entries(loader: Loader, root: yaml.Node | None) -> dict[str, Entry]:
        if not isinstance(root, yaml.MappingNode):
            found = {yaml.SequenceNode: "a list", yaml.ScalarNode: "one value"}.get(type(root), "nothing")
            raise UserError(f"{path}: contains {found}; expected lines of `key: value`")
        found = {}
        for key_node, value_node in root.value:
            line = key_node.start_mark.line + 1
            key = loader.construct(key_node)
            if not isinstance(key, str):
                raise UserError(f"{path}, line {line}: the key is {key!r}; expected text")
            if key in found:
                raise UserError(
                    f"{path}, line {line}: {key} is already set in line {found[key].line}; remove one of them"
                )
            found[key] = Entry(loader.construct(value_node), line)
        return found

    return parse(text, str(path), entries)


def read_value(text: str, where: str) -> object:
    """The value of a one-line YAML text; raises UserError, which begins with `where`, if it is not YAML."""
    if len(text) > LARGEST_FILE:
        raise UserError(f"{where}: a value of {len(text)} characters; give a shorter one")
    return parse(text, where, lambda loader, root: root and loader.construct(root))


def parse(text: str, where: str, convert: Callable[[Loader, yaml.Node | None], Value]) -> Value:
    """Compose a YAML text and convert its root node, which is None for empty text."""
    try:
        loader = Loader(text)  # raises ReaderError at control characters
        return convert(loader, loader.get_single_node())
    except yaml.reader.ReaderError as error:
        line, problem = text.count("\n", 0, error.position), error.reason
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line if error.problem_mark else None
        problem = f"{error.context}: {error.problem}" if error.context else error.problem
    except (ValueError, OverflowError) as error:  # an escape beyond Unicode: "\UFFFFFFFF"
        line, problem = None, str(error)
    line = "" if line is None or where.endswith("command line") else f", line {line + 1}"
    raise UserError(f"{where}{line}: not YAML ({problem})") from None
