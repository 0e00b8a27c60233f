"""Command lines that do not let one value of an option silently replace another."""

import argparse
import typing


class Once(argparse.Action):
    """Stores an option's value, and refuses a second one."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: typing.Any,
        option_string: str | None = None,
    ) -> None:
        if option_string and self.dest in parser.given:
            raise argparse.ArgumentError(self, "given twice; give it once")
        parser.given.add(self.dest)
        setattr(namespace, self.dest, values)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose options take one value each, unless their action is another, such as
    "append"."""

    def __init__(self, *args: typing.Any, **options: typing.Any) -> None:
        super().__init__(*args, **options)
        for name in (None, "store"):
            self.register("action", name, Once)
        self.given = set()

    def parse_known_args(self, args=None, namespace=None):
        """As the base class, whose other methods call this one."""
        self.given = set()
        return super().parse_known_args(args, namespace)
