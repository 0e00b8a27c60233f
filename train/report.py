"""The report of an evaluation: a table for the terminal, JSON, Markdown and pictures."""

import contextlib
import dataclasses
import itertools
import pathlib
import textwrap
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from launch.communicator import Communicator
from launch.errors import counted
from launch.files import write_bytes, write_json
from prep.datasets import RENDER_PASSES
from prep.reader import DatasetSplit
from train.metrics import SUMS, Evaluation, Metrics


class Column(NamedTuple):
    """How a metric is shown."""

    label: str
    key: str
    """Its field in `Metrics`."""
    unit: str


COLUMNS = (
    Column("EPE, mean over pairs", "epe", "px"),
    Column("EPE, over all pixels", "epe_pixels", "px"),
    Column("zero-flow EPE", "zero_epe", "px"),
    Column("EPE / zero-flow EPE", "ratio", ""),
    Column("Fl-all, over 3 px and 5 %", "fl_all", "%"),
    Column("over 1 px", "over_1px", "%"),
    Column("over 3 px", "over_3px", "%"),
    Column("over 5 px", "over_5px", "%"),
    Column("EPE s0-10", "epe_s0_10", "px"),
    Column("EPE s10-40", "epe_s10_40", "px"),
    Column("EPE s40+", "epe_s40_plus", "px"),
    Column("EPE matched", "epe_matched", "px"),
    Column("EPE unmatched", "epe_unmatched", "px"),
)
NOTE = (
    "The zero-flow EPE is a mean over pairs. Shares, and the EPE of each kind of pixel, are over all pixels with "
    "known flow of all pairs."
)


@dataclasses.dataclass(frozen=True)
class Report:
    """The metrics of a split and of its parts."""

    split: DatasetSplit
    metrics: Metrics
    passes: dict[str, Metrics]
    """Metrics by rendering pass, clean and final; empty for a dataset that is rendered once."""
    scenes: dict[str, dict[str, Metrics]]
    """Metrics by scene and pass; empty for datasets other than Sintel."""

    def table(self) -> str:
        """A table for the terminal, with a column for each pass if there are several."""
        columns = {**self.passes, "all": self.metrics} if len(self.passes) > 1 else {"": self.metrics}
        sizes = sorted({f"{height}x{width}" for height, width in self.split.sizes.tolist()})
        left_out = (
            f"; {counted(self.metrics.unlabelled, 'pair')} without ground truth left out"
            if self.metrics.unlabelled
            else ""
        )
        lines = [
            f"{self.split.dataset} {self.split.name}: {counted(self.metrics.pairs, 'pair')} of {', '.join(sizes)}, "
            f"{self.metrics.pixels:,} pixels with known flow{left_out}",
            "",
        ]
        if len(columns) > 1:
            lines.append(table_row("", columns))
        for label, key, unit in COLUMNS:
            if getattr(self.metrics, key) is not None:
                lines.append(table_row(label, [to_text(getattr(column, key)) for column in columns.values()], unit))
        if self.scenes:
            lines += ["", table_row("EPE by scene, over pixels", [])]
        for scene, by_pass in self.scenes.items():
            values = [to_text(by_pass[name].epe_pixels) if name in by_pass else "-" for name in self.passes]
            lines.append(table_row(f"  {scene}", values, "px"))
        return "\n".join([*lines, "", *textwrap.wrap(NOTE, 76)])

    def markdown(self, title: str) -> str:
        """The same metrics as a Markdown table with a row for each pass and one for all pairs."""
        passes = self.passes if len(self.passes) > 1 else {}
        rows = [*((f"{title}, {name}", metrics) for name, metrics in passes.items()), (title, self.metrics)]
        cells = [["", "pairs", *(f"{label} ({unit})" if unit else label for label, _, unit in COLUMNS)]]
        cells.append(["---"] + ["---:"] * (len(cells[0]) - 1))
        for name, metrics in rows:
            cells.append([name, str(metrics.pairs), *(to_text(getattr(metrics, column.key)) for column in COLUMNS)])
        return "".join(f"| {' | '.join(row)} |\n" for row in cells) + f"\n{NOTE}\n"

    def to_json(self) -> dict[str, Any]:
        """The metrics as JSON stores them."""
        return {
            **dataclasses.asdict(self.metrics),
            "passes": {name: dataclasses.asdict(metrics) for name, metrics in self.passes.items()},
            "scenes": {
                scene: {name: dataclasses.asdict(metrics) for name, metrics in by_pass.items()}
                for scene, by_pass in self.scenes.items()
            },
        }


def make_report(split: DatasetSplit, evaluation: Evaluation) -> Report:
    """Compute the metrics of a split, of its passes and of its scenes."""
    parts = [name.split("/") for name in split.names]
    passes = [name for name in RENDER_PASSES if any(part[0] == name for part in parts)]
    scenes = sorted({part[1] for part in parts}) if split.dataset == "sintel" else []

    def metrics_of(*prefix: str) -> Metrics:
        return evaluation.metrics([i for i, part in enumerate(parts) if tuple(part[: len(prefix)]) == prefix])

    by_scene = {
        scene: {name: metrics_of(name, scene) for name in passes if [name, scene] in [part[:2] for part in parts]}
        for scene in scenes
    }
    return Report(split, evaluation.metrics(), {name: metrics_of(name) for name in passes}, by_scene)


def table_row(label: str, values: Iterable[str], unit: str = "") -> str:
    return f"  {label:<26}{''.join(f'{value:>12}' for value in values)}  {unit}".rstrip()


def to_text(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def write_metrics(folder: pathlib.Path, report: Report, evaluation: Evaluation, checkpoint: pathlib.Path) -> None:
    """Write evaluation.json, with the sums of every pair, and evaluation.md.

    Raises:
        OSError: a file cannot be written.
    """
    split = report.split
    by_pair = [
        {"pair": name, "epe": epe, "zero_epe": zero_epe, "sums": dict(zip(SUMS, sums, strict=True))}
        for name, epe, zero_epe, sums in zip(
            split.names, evaluation.epe.tolist(), evaluation.zero_epe.tolist(), evaluation.sums.tolist(), strict=True
        )
    ]
    source = {"data": str(split.folder), "split": split.name, "checkpoint": str(checkpoint)}
    write_json(folder / "evaluation.json", {**source, **report.to_json(), "by_pair": by_pair})
    title = f"{split.dataset} {split.name}, {checkpoint.name}"
    write_bytes(folder / "evaluation.md", report.markdown(title).encode())


# --- Pictures -------------------------------------------------------------------------------------


def gather_strips(
    evaluation: Evaluation,
    comm: Communicator,
    guard: Callable[[str], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
) -> dict[int, np.ndarray]:
    """Draw the samples of all ranks; all ranks must call this.

    Args:
        evaluation: of the split.
        comm: the ranks.
        guard: makes a context for the drawing, from its description; if that swallows an error, the pictures of
            this rank are missing.

    Returns:
        On every rank, by position in the split: (H, 4W, 3) uint8 RGB, from `prep.flow_viz.draw_prediction`.
    """
    from prep.flow_viz import draw_prediction

    drawn = []
    with guard("drawing flow"):
        drawn = [[position, draw_prediction(*sample)] for position, sample in evaluation.samples.items()]
    return dict(itertools.chain(*comm.gather(drawn)))


def draw_pairs(
    split: DatasetSplit, evaluation: Evaluation, strips: dict[int, np.ndarray], positions: Iterable[int]
) -> np.ndarray:
    """One picture of several pairs, which may differ in size, with captions.

    Args:
        split: of the pairs.
        evaluation: of the split.
        strips: from `gather_strips`.
        positions: of the pairs in the split, top to bottom.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    from prep.flow_viz import contact_sheet

    positions = list(positions)
    epe, zero_epe = evaluation.epe, evaluation.zero_epe
    errors = [f"EPE {epe[i]:.2f} px, zero flow {zero_epe[i]:.2f} px" for i in positions]
    errors = ["no ground truth" if np.isnan(zero_epe[i]) else error for i, error in zip(positions, errors, strict=True)]
    captions = [f"{split.names[i]}: {error}" for i, error in zip(positions, errors, strict=True)]
    return contact_sheet([strips[i] for i in positions], captions)
