"""The progress bar of every long command: a moving line on a terminal, else a line every ten seconds."""

import sys
from collections.abc import Iterable
from typing import Any, TextIO

import tqdm


class Lines:
    """Writes each state of a bar to a stream as a separate line.

    mpirun forwards whole lines only, and with carriage returns a log would be one long line.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> None:
        if text := text.strip("\r\n "):
            self.stream.write(text + "\n")

    def flush(self) -> None:
        self.stream.flush()


def bar(values: Iterable[Any] | None = None, **options: Any) -> tqdm.tqdm:
    """A tqdm bar on stderr, with rate and time left; the options are tqdm's."""
    terminal = sys.stderr.isatty()
    return tqdm.tqdm(
        values,
        file=sys.stderr if terminal else Lines(sys.stderr),
        mininterval=0.2 if terminal else 10,
        maxinterval=float("inf"),
        dynamic_ncols=terminal,
        **options,
    )
