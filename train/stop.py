"""Signals that ask a training run to stop."""

import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Signals after which the training stops at the end of its current step."""


class StopRequest:
    """Notes SIGTERM, Ctrl-C and SIGUSR1, so that the training can stop after its current step. A context manager.

    mpirun forwards SIGUSR1 and keeps waiting; after SIGTERM or Ctrl-C it soon kills the ranks. A second signal ends
    the process at once.
    """

    def __enter__(self) -> "StopRequest":
        self.received = False
        self.previous = {number: signal.signal(number, self.receive) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def receive(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = True
