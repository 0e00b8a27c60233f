"""The parser that every command uses: usage as typed, defaults in --help, and no option given twice."""

import argparse
import os
import sys
from collections.abc import Iterable
from typing import Any

from launch.logs import print_note

COMMAND = "PWCNET_COMMAND"
"""Environment variable with the name that usage shows, for commands started by a script."""


def command_name() -> str:
    """The command as the user typed it."""
    module = sys.modules["__main__"].__spec__  # None for a file
    if module:
        return f"python -m {module.name.removesuffix('.__main__')}"
    return os.environ.get(COMMAND) or f"python {sys.argv[0]}"


class Once(argparse.Action):
    """Stores an option's value, and refuses a second one."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        if option and isinstance(parser, Parser):
            if self.dest in parser.given:
                raise argparse.ArgumentError(self, "given twice; give it once")
            parser.given.add(self.dest)
        setattr(namespace, self.dest, values)


class Formatter(argparse.HelpFormatter):
    """Adds the default to each option's help, unless it is empty or the help mentions a default."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        if (
            not action.help
            or "default" in action.help
            or action.required
            or isinstance(default, bool)
            or default in (None, "", [], argparse.SUPPRESS)
        ):
            return action.help
        text = " ".join(map(str, default)) if isinstance(default, (list, tuple)) else str(default)
        text = text.replace("%", "%%")  # argparse formats the result
        return f"{action.help} (default: {text})"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose options take one value each, unless they have another action, such as "append"."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"prog": command_name(), "formatter_class": Formatter, **options})
        for name in (None, "store"):
            self.register("action", name, Once)
        self.given: set[str] = set()
        """Names of the options found so far."""
        self._renamed: dict[str, str] = {}

    def rename_option(self, old: str, new: str) -> None:
        """Accept an option's former name, with a note but not in --help; remove the call after one release."""
        self._renamed[old] = new

    def parse_known_args(  # pyright: ignore[reportIncompatibleMethodOverride] - it has overloads
        self, args: Iterable[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """Parse as the base class does, whose other methods call this one."""
        self.given = set()
        words = list(sys.argv[1:] if args is None else args)
        for index, word in enumerate(words[: words.index("--")] if "--" in words else words):
            name, *value = word.split("=", 1)
            if name in self._renamed:
                words[index] = "=".join([self._renamed[name], *value])
                print_note(f"{name} is now called {self._renamed[name]}")
        return super().parse_known_args(words, namespace)
