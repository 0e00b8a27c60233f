"""What a run shows while it runs: SummaryRecord files, TensorBoard event files, a progress bar."""

import contextlib
import math
import multiprocessing
import pathlib
import signal
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import mindspore
import numpy as np
import psutil
import tqdm
from google.protobuf.message import DecodeError
from mindspore.train.summary import _writer_pool, summary_record
from tensorboardX import summary as tensorboard
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue] - made at import
from tensorboardX.record_writer import masked_crc32c

from launch import progress
from launch.errors import describe_os_error, print_line, print_warning
from launch.files import write_bytes
from train.stop import STOP_SIGNALS

Item = TypeVar("Item")

VALIDATION_DELAY = 5
"""Seconds after which a validation shows its progress."""
CONTEXT = multiprocessing.get_context("fork")


class SummaryProcess(_writer_pool.WriterPool):
    """The process that writes SummaryRecord's files, in place of MindSpore 2.8.0's own.

    That one polls without a pause, packs events in a pool of further processes, and receives them through a queue
    on which the training blocks forever once nobody reads it. This one is a single process that reads from a pipe.
    The training keeps only the writing end and this process only the reading end, so each notices when the other is
    gone: however the training ends, the process writes what it has received and exits; if the process dies, the
    training goes on without it.
    """

    def __init__(
        self,
        base_dir: str,
        max_file_size: int | None,
        num_process: int = 1,
        raise_exception: bool = False,
        **files: Any,
    ) -> None:
        CONTEXT.Process.__init__(self)
        self._base_dir, self._filedict = base_dir, files
        self._max_file_size = max_file_size
        self._raise_exception = raise_exception
        self._writers_ = None
        self.lost = False
        self.reading, self.writing = CONTEXT.Pipe(duplex=False)
        self.start()
        self.reading.close()

    def run(self) -> None:
        self.writing.close()
        for number in STOP_SIGNALS:  # they are meant for the training, but may be sent to all processes
            signal.signal(number, signal.SIG_IGN)
        with contextlib.suppress(EOFError):
            while (message := self.reading.recv())[0] != "END":
                action, data = message
                if action == "WRITE":
                    for plugin, packed in _writer_pool._pack_data(data, time.time()):
                        self._write(plugin, packed)
                self._flush()
        for writer in self._writers:
            writer.close()

    def send(self, action: str, data: Any = None) -> None:
        """Send the process something to do, or find out that it is gone."""
        if not self.lost:
            try:
                self.writing.send((action, data))
            except BrokenPipeError:
                self.lose()

    def write(self, data: Any) -> None:
        self.send("WRITE", data)

    def flush(self) -> None:
        self.send("FLUSH")

    def close(self) -> None:
        """End the process; returns when everything is in the files."""
        self.send("END")
        self.writing.close()
        self.join()
        if not self.lost and self.exitcode:
            self.lose()

    def lose(self) -> None:
        """Note that the process is gone, and warn once."""
        self.lost = True
        self.join()
        code = self.exitcode
        why = f"was killed by signal {-code}" if code and code < 0 else f"exited with status {code}"
        print_warning(
            f"process {self.pid}, which writes SummaryRecord's files in {self._base_dir}, {why}; the run continues "
            "without these curves (TensorBoard's continue)"
        )


summary_record.WriterPool = SummaryProcess


@contextlib.contextmanager
def survived(what: str) -> Iterator[None]:
    """A context whose errors become a warning, for what only shows how a run goes; `what` describes it."""
    try:
        yield
    except OSError as error:
        print_warning(f"{what} failed: {describe_os_error(error)}; the run continues")
    except Exception as error:
        print_warning(f"{what} failed: {type(error).__name__}: {error}; the run continues")


class EventFile:
    """A TensorBoard event file, written directly and not by tensorboardX's thread.

    Once that thread fails to write, its callers block forever. This class warns once and drops what follows.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self.file: EventsWriter | None = None
        with self.guarded():
            folder.mkdir(parents=True, exist_ok=True)
            self.file = EventsWriter(str(folder / "events"))

    def add(self, step: int, *summaries: tensorboard.Summary) -> None:
        """Add summaries of a step."""
        if self.file:
            with self.guarded():
                for value in summaries:
                    self.file.write_event(Event(summary=value, step=step, wall_time=time.time()))
                self.file.flush()

    def close(self) -> None:
        if self.file:
            with self.guarded():
                self.file.close()

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.file = None
            print_warning(
                f"{self.folder}: cannot write TensorBoard's events ({error.strerror}); the run continues without "
                "these curves"
            )


class Lap(NamedTuple):
    """Measurements since the last lap."""

    pairs_per_second: float
    data_wait: float
    """Share of the time spent waiting for data, in [0, 1]."""


class Stopwatch:
    """Measures the speed of the training loop, and the share of its time spent waiting for data."""

    def __init__(self, step: int) -> None:
        self.restart(step)

    def restart(self, step: int) -> None:
        """Measure from this step on."""
        self.step, self.start, self.waited = step, time.perf_counter(), 0.0

    def waiting(self, batches: Iterable[Item]) -> Iterator[Item]:
        """Iterate over batches and add up the time that each took to arrive."""
        batches = iter(batches)
        while True:
            start = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.waited += time.perf_counter() - start
            yield batch

    def lap(self, step: int, pairs_per_step: int) -> Lap:
        """Measure since the last lap, and restart."""
        seconds = time.perf_counter() - self.start
        result = Lap((step - self.step) * pairs_per_step / seconds, self.waited / seconds)
        self.restart(step)
        return result


def resident_memory() -> int:
    """Bytes of memory that this process occupies now."""
    return psutil.Process().memory_info().rss


def drop_events_after(folder: pathlib.Path, step: int) -> None:
    """Remove what was recorded after a step from the event files in a folder, of either kind.

    An interrupted run resumes from its last checkpoint and so repeats the steps after that. Both kinds of file are a
    sequence of records: length (8 bytes), its checksum (4), the event, its checksum (4). A record that a killed run
    left incomplete is dropped; so is all from a damaged record on, with a warning.
    """
    for path in folder.glob("events.out.*"):
        if step == 0 or ".partial-" in path.name:  # left by a run that was killed in this function
            path.unlink()
            continue
        data, kept, position = path.read_bytes(), [], 0
        while position + 12 <= len(data):
            length, checksum = data[position : position + 8], data[position + 8 : position + 12]
            end = position + 16 + int.from_bytes(length, "little")
            try:
                if masked_crc32c(length) != int.from_bytes(checksum, "little"):
                    raise DecodeError
                if end > len(data):
                    break
                if Event.FromString(data[position + 12 : end - 4]).step <= step:
                    kept.append(data[position:end])
            except DecodeError:
                print_warning(
                    f"{path}: damaged after {position:,} of {len(data):,} bytes; the run continues without the "
                    "curves from there to this start"
                )
                break
            position = end
        write_bytes(path, b"".join(kept))


class Monitor:
    """Writes the same tags to MindSpore's SummaryRecord and to TensorBoard. A context manager.

    There are both because TensorBoard does not read SummaryRecord's files, nor MindInsight TensorBoard's.

    Args:
        folder: of the run, gets `summary/` and `tensorboard/`; None on ranks other than 0, where nothing is written.
        first_step: steps done before this start; what was recorded after that is dropped.
        steps: of the whole run.
    """

    def __init__(self, folder: pathlib.Path | None, first_step: int, steps: int) -> None:
        self.enabled = folder is not None
        if folder is None:
            return
        for kind in ("summary", "tensorboard"):
            drop_events_after(folder / kind, first_step)
        self.summary = summary_record.SummaryRecord(str(folder / "summary"))
        self.events = EventFile(folder / "tensorboard")
        self.bar = progress.bar(total=steps, initial=first_step, unit="step", smoothing=0.1)

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, *_: object) -> None:
        if self.enabled:
            self.bar.close()
            self.events.close()
            self.summary.close()

    def text(self, tag: str, text: str) -> None:
        """Show preformatted text in TensorBoard."""
        if self.enabled:
            self.events.add(0, tensorboard.text(tag, f"```\n{text}\n```"))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point to each of several curves; `values` are by tag."""
        if self.enabled:
            # tensorboardX warns on the terminal about other values, such as the gradient norm after an overflow.
            finite = {tag: value for tag, value in values.items() if math.isfinite(value)}
            self.events.add(step, *(tensorboard.scalar(tag, value) for tag, value in finite.items()))
            for tag, value in values.items():
                self.summary.add_value("scalar", tag, mindspore.Tensor(value, mindspore.float32))
            self.summary.record(step)

    def picture(self, step: int, tag: str, image: np.ndarray) -> None:
        """Add a picture, (H, W, 3) uint8 RGB."""
        if self.enabled:
            self.events.add(step, tensorboard.image(tag, image, dataformats="HWC"))
            planar = np.ascontiguousarray(image.transpose(2, 0, 1)[None])
            self.summary.add_value("image", tag, mindspore.Tensor(planar))
            self.summary.record(step)

    def advance(self, step: int, **values: str) -> None:
        """Move the progress bar to a step and show these values beside it."""
        if self.enabled:
            if values:
                self.bar.set_postfix(values, refresh=False)
            self.bar.update(step - self.bar.n)

    def validation_bar(self, name: str, pairs: int) -> tqdm.tqdm:
        """A second bar for a validation of so many pairs, shown while it runs if that takes long."""
        return progress.bar(
            total=pairs, desc=name, unit="pair", leave=False, delay=VALIDATION_DELAY, disable=not self.enabled
        )

    def say(self, line: str) -> None:
        """Print a line above the progress bar."""
        if self.enabled:
            self.bar.clear()
            print_line(line)
