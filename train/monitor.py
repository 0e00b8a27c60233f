"""What a run shows while it runs: SummaryRecord files, TensorBoard event files, a progress line."""

import pathlib
import resource
import signal
import sys
import time

import mindspore
import numpy as np
import tensorboardX
from mindspore.train.summary import _writer_pool, summary_record
from tensorboardX.proto.event_pb2 import Event

from launch import keeper
from prep import progress
from prep.flowio import write_whole


class PatientWriterPool(_writer_pool.WriterPool):
    """SummaryRecord's writing process, waiting for work.

    MindSpore 2.8.0's own asks for it in a loop without a pause, and so takes a whole core from the
    training for as long as it lasts.
    """

    def run(self):
        keeper.prctl(keeper.PR_SET_PDEATHSIG, signal.SIGKILL)  # it must not outlive its rank
        get = self._queue.get
        self._queue.get = lambda block=True: get(timeout=0.2)  # raises the same queue.Empty
        super().run()


summary_record.WriterPool = PatientWriterPool


class Clock:
    """Measures the loop's speed and how much of its time went by waiting for data, from a step on."""

    def __init__(self, step):
        self.restart(step)

    def restart(self, step):
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


def forget_after(folder, step):
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
            end = position + 16 + int.from_bytes(data[position:position + 8], "little")
            if end > len(data):
                break
            if Event.FromString(data[position + 12:end - 4]).step <= step:
                kept.append(data[position:end])
            position = end
        write_whole(path, b"".join(kept))


class Monitor:
    """Writes the same tags to MindSpore's SummaryRecord and to TensorBoard. A context manager.

    TensorBoard does not read SummaryRecord's files and MindInsight not TensorBoard's, so there are
    both. Only rank 0 has one; on other ranks, `enabled=False`, it does nothing.

    Args:
        folder: the run's; gets `summary/` and `tensorboard/`.
        first_step: the run (re)starts after this many steps; what it recorded beyond is forgotten.
        steps: how many there are in all.
    """

    def __init__(self, folder, first_step, steps, enabled=True):
        self.enabled = enabled
        if not enabled:
            return
        folder = pathlib.Path(folder)
        for kind in ("summary", "tensorboard"):
            forget_after(folder / kind, first_step)
        self.summary = mindspore.SummaryRecord(str(folder / "summary"))
        self.events = tensorboardX.SummaryWriter(str(folder / "tensorboard"))
        self.bar = progress.bar(total=steps, initial=first_step, unit="step", smoothing=0.1)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.enabled:
            self.bar.close()
            self.events.close()
            self.summary.close()

    def text(self, tag, text):
        """Show a text in TensorBoard as it stands."""
        if self.enabled:
            self.events.add_text(tag, f"```\n{text}\n```", 0)

    def scalars(self, step, values):
        """Add one point to each of several curves, tag to number."""
        if self.enabled:
            for tag, value in values.items():
                self.events.add_scalar(tag, value, step)
                self.summary.add_value("scalar", tag, mindspore.Tensor(value, mindspore.float32))
            self.summary.record(step)
            self.events.flush()

    def picture(self, step, tag, image):
        """Add a picture, (H, W, 3) uint8."""
        if self.enabled:
            self.events.add_image(tag, image, step, dataformats="HWC")
            planar = np.ascontiguousarray(image.transpose(2, 0, 1)[None])
            self.summary.add_value("image", tag, mindspore.Tensor(planar))
            self.summary.record(step)

    def advance(self, step, **values):
        """Move the progress line to a step and show these figures on it."""
        if self.enabled:
            self.bar.set_postfix(values, refresh=False)
            self.bar.update(step - self.bar.n)

    def say(self, line):
        """Print a line above the progress line."""
        if self.enabled:
            self.bar.clear()
            print(line, file=sys.stderr, flush=True)
