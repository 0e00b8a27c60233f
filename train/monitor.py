"""What a run shows while it runs: SummaryRecord files, TensorBoard event files, a progress line."""

import contextlib
import multiprocessing
import pathlib
import resource
import signal
import sys
import time
from collections.abc import Iterator

import mindspore
import numpy as np
from mindspore.train.summary import _writer_pool, summary_record
from tensorboardX import summary as tensorboard
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event

from launch import progress
from launch.errors import describe_os_error
from launch.files import write_bytes

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Signals after which a training ends with the step that it is in."""


CONTEXT = multiprocessing.get_context("fork")


class SummaryProcess(_writer_pool.WriterPool):
    """The process that writes SummaryRecord's files, in place of MindSpore 2.8.0's own.

    That one asks for work in a loop without a pause, packs events in a pool of further processes, and
    gets them through a queue at whose end the training waits for ever once nobody reads it. This one is
    a single process at the end of a pipe, of which the training keeps only the writing end and it only
    the reading end: each sees when the other is gone. When the training ends, in whatever way, it
    writes what it was given and ends; when it ends itself, the training goes on without it.
    """

    def __init__(self, base_dir, max_file_size, num_process=1, raise_exception=False, **files) -> None:
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
        for number in STOP_SIGNALS:  # they are for the training, and may be sent to all processes
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

    def send(self, action, data=None) -> None:
        """Give the process something to do, or find out that it is gone."""
        if not self.lost:
            try:
                self.writing.send((action, data))
            except BrokenPipeError:
                self.lose()

    def write(self, data) -> None:
        self.send("WRITE", data)

    def flush(self) -> None:
        self.send("FLUSH")

    def close(self) -> None:
        """Have it end; returns when everything is in the files."""
        self.send("END")
        self.writing.close()
        self.join()
        if not self.lost and self.exitcode:
            self.lose()

    def lose(self) -> None:
        """Note that the process is gone, and say so once."""
        self.lost = True
        self.join()
        code = self.exitcode
        why = f"was ended by signal {-code}" if code < 0 else f"ended with status {code}"
        warn(
            f"process {self.pid}, which writes SummaryRecord's files in {self._base_dir}, {why}; the run "
            "goes on without these curves (TensorBoard's go on)"
        )


summary_record.WriterPool = SummaryProcess


def warn(text: str) -> None:
    """Print a warning as one line on stderr."""
    print(f"warning: {' '.join(text.split())}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def survived(what: str) -> Iterator[None]:
    """A context whose errors become a warning: for what only shows how a run goes.

    Args:
        what: what is done inside, for the warning.
    """
    try:
        yield
    except OSError as error:
        warn(f"{what} failed: {describe_os_error(error)}; the run goes on")
    except Exception as error:
        warn(f"{what} failed: {type(error).__name__}: {error}; the run goes on")


class EventFile:
    """A TensorBoard event file, written at once and not by tensorboardX's thread.

    For that thread, once it could not write, everyone else would wait for ever. This one says so, once,
    and leaves out the rest.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self.file = None
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
            warn(
                f"{self.folder}: cannot write TensorBoard's events ({error.strerror}); the run goes on "
                "without these curves"
            )


class Clock:
    """Measures the loop's speed and how much of its time went by waiting for data, from a step on."""

    def __init__(self, step) -> None:
        self.restart(step)

    def restart(self, step) -> None:
        """Measure from this step on."""
        self.step, self.start, self.waited = step, time.perf_counter(), 0.0

    def waiting(self, batches):
        """Go through batches and add up the time that each took to come."""
        batches = iter(batches)
        while True:
            start = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.waited += time.perf_counter() - start
            yield batch

    def lap(self, step, pairs_per_step):
        """Pairs per second, and the share of time spent waiting, since the last lap."""
        seconds = time.perf_counter() - self.start
        result = (step - self.step) * pairs_per_step / seconds, self.waited / seconds
        self.restart(step)
        return result


def resident_memory():
    """Bytes of memory that this process has now."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def forget_after(folder, step) -> None:
    """Take what was recorded after a step out of the event files in a folder, of either kind.

    An interrupted run goes on from its last checkpoint, and so passes again through the steps that it
    made after that. Both kinds of file are a row of records: length (8 bytes), its checksum (4), the
    event, its checksum (4); what a killed run left half written ends the row.
    """
    for path in pathlib.Path(folder).glob("events.out.*"):
        if step == 0 or ".partial-" in path.name:  # killed right here, the last time
            path.unlink()
            continue
        data, kept, position = path.read_bytes(), [], 0
        while position + 12 <= len(data):
            end = position + 16 + int.from_bytes(data[position : position + 8], "little")
            if end > len(data):
                break
            if Event.FromString(data[position + 12 : end - 4]).step <= step:
                kept.append(data[position:end])
            position = end
        write_bytes(path, b"".join(kept))


class Monitor:
    """Writes the same tags to MindSpore's SummaryRecord and to TensorBoard. A context manager.

    TensorBoard does not read SummaryRecord's files and MindInsight not TensorBoard's, so there are
    both. Only rank 0 has one; on other ranks, `enabled=False`, it does nothing.

    Args:
        folder: the run's; gets `summary/` and `tensorboard/`.
        first_step: the run (re)starts after this many steps; what it recorded beyond is forgotten.
        steps: how many there are in all.
    """

    def __init__(self, folder, first_step, steps, enabled=True) -> None:
        self.enabled = enabled
        if not enabled:
            return
        folder = pathlib.Path(folder)
        for kind in ("summary", "tensorboard"):
            forget_after(folder / kind, first_step)
        self.summary = mindspore.SummaryRecord(str(folder / "summary"))
        self.events = EventFile(folder / "tensorboard")
        self.bar = progress.bar(total=steps, initial=first_step, unit="step", smoothing=0.1)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.enabled:
            self.bar.close()
            self.events.close()
            self.summary.close()

    def text(self, tag, text) -> None:
        """Show a text in TensorBoard as it stands."""
        if self.enabled:
            self.events.add(0, tensorboard.text(tag, f"```\n{text}\n```"))

    def scalars(self, step, values) -> None:
        """Add one point to each of several curves, tag to number."""
        if self.enabled:
            self.events.add(step, *(tensorboard.scalar(tag, value) for tag, value in values.items()))
            for tag, value in values.items():
                self.summary.add_value("scalar", tag, mindspore.Tensor(value, mindspore.float32))
            self.summary.record(step)

    def picture(self, step, tag, image) -> None:
        """Add a picture, (H, W, 3) uint8."""
        if self.enabled:
            self.events.add(step, tensorboard.image(tag, image, dataformats="HWC"))
            planar = np.ascontiguousarray(image.transpose(2, 0, 1)[None])
            self.summary.add_value("image", tag, mindspore.Tensor(planar))
            self.summary.record(step)

    def advance(self, step, **values) -> None:
        """Move the progress line to a step and show these figures on it."""
        if self.enabled:
            self.bar.set_postfix(values, refresh=False)
            self.bar.update(step - self.bar.n)

    def say(self, line) -> None:
        """Print a line above the progress line."""
        if self.enabled:
            self.bar.clear()
            print(line, file=sys.stderr, flush=True)
