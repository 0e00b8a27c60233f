"""The progress bar of every long command: a moving line on a terminal, else a line now and then."""

import sys

import tqdm


class Lines:
    """Gives a bar's drawings to a file that is no terminal, each as a line of its own.

    mpirun passes on whole lines only, and a log of carriage returns is one long line.
    """

    def __init__(self, file) -> None:
        self.file = file

    def write(self, text) -> None:
        if text := text.strip("\r\n "):
            self.file.write(text + "\n")

    def flush(self) -> None:
        self.file.flush()


def bar(values=None, **options):
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
