#!/usr/bin/env python3
"""Show a converted dataset, or compare several: numbers, sizes, distributions, and a sheet of pairs with their flow."""

import os
import sys

if __name__ == "__main__":  # run as a file: import the packages, not this file's neighbours
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    from launch import environment

    environment.check()

import argparse
import base64
import collections
import concurrent.futures
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw

from launch import files, progress
from launch.arguments import Parser
from launch.errors import UserError, counted, run
from prep import flow_viz
from prep.datasets import Sample
from prep.formats import flow as flow_format
from prep.shards import FIELDS, PIXEL_BYTES, Manifest, Shard, decode_record, stored_bytes, suggest_training

SHEET_PAIRS = 8
PANEL_WIDTH = 512
"""Maximum width of an image on the sheet, in pixels."""
SAMPLED_PIXELS = 20000
"""Number of pixels per pair that are measured, evenly spaced: enough for percentiles."""
COLOURS = ((69, 117, 180), (215, 115, 40), (90, 160, 90), (150, 90, 160))
"""Colours of the bars of the first dataset, of the second and so on, RGB."""
UNKNOWN, VISIBLE, OCCLUDED = 0, 110, 255
"""Grey levels of the mask panel."""


@dataclass(frozen=True)
class Quantity:
    """Something that is measured at pixels."""

    name: str
    unit: str
    bounds: tuple[float, ...]
    """Bounds of the histogram's bins; the last bin has no upper bound if that is infinite."""
    percentiles: tuple[float, ...]


DISPLACEMENT = Quantity(
    # Displacements range over orders of magnitude.
    "displacement", "px", (0, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128, 256, np.inf), (10, 50, 90, 99, 99.9)
)  # fmt: skip
"""Length of the flow, where it is known."""
BRIGHTNESS = Quantity("brightness", "", tuple(range(0, 257, 32)), (10, 50, 90))
"""Luma of the first image, 0 to 255."""
TEXTURE = Quantity("texture", "levels/px", (0, 0.5, 1, 2, 4, 8, 16, 32, 64, np.inf), (10, 50, 90))
"""Length of the gradient of that luma, per pixel. Flow cannot be found where it is 0."""
QUANTITIES = (DISPLACEMENT, BRIGHTNESS, TEXTURE)


def main() -> None:
    options = parse_options()
    if options.pairs < 1:
        raise UserError(f"--pairs {options.pairs}: expected 1 or more")
    if len(options.folder) > len(COLOURS):
        raise UserError(f"{len(options.folder)} datasets; at most {len(COLOURS)} can be compared")
    datasets = [measure(Path(os.path.normpath(folder)), options.pairs) for folder in options.folder]
    text = compare(datasets) if len(datasets) > 1 else describe(datasets[0])
    print(text)
    charts = [chart for quantity in QUANTITIES if (chart := draw_histogram(quantity, datasets))]
    if options.png:
        panels = charts + [panel for dataset in datasets for panel in dataset.panels]
        flow_viz.save_png(options.png, flow_viz.contact_sheet([p.image for p in panels], [p.caption for p in panels]))
    if options.html:
        files.write_bytes(options.html, render_page(text, charts, datasets).encode())
    shown = sum(len(dataset.panels) for dataset in datasets)
    path = options.png or options.html
    hint = f"{path}: the sheet with {shown} pairs" if path else "see some pairs: --html OUT or --png OUT"
    print(f"{hint}; {suggest_training({dataset.folder: dataset.manifest for dataset in datasets})}")


def parse_options() -> argparse.Namespace:
    parser = Parser(
        description="Show a converted dataset: numbers, sizes, displacements, brightness and texture as text, and some "
        "pairs with their flow in colour as a web page or an image. Several datasets are compared side by side.",
    )
    parser.add_argument("folder", nargs="+", type=Path, metavar="DIR", help="the folder of a dataset, or of several")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--html", type=Path, metavar="OUT", help="write a self-contained web page (default: text only)")
    output.add_argument("--png", type=Path, metavar="OUT", help="write an image (default: text only)")
    parser.add_argument(
        "--pairs",
        type=int,
        default=400,
        metavar="N",
        help="number of pairs to measure, evenly spaced over the dataset",
    )
    return parser.parse_args()


# --- Measuring ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Panel:
    """A part of the sheet."""

    image: np.ndarray
    """uint8 (H, W, 3) RGB."""
    caption: str


@dataclass(frozen=True)
class Distribution:
    """A quantity over a dataset."""

    mean: float
    maximum: float
    percentiles: np.ndarray
    """Values at the quantity's percentiles."""
    shares: np.ndarray
    """Share of the pixels in each bin."""


@dataclass(frozen=True)
class MeasuredDataset:
    """A dataset and what was measured on a sample of its pairs."""

    folder: Path
    manifest: Manifest
    pairs: int
    """How many pairs were measured."""
    known: float | None
    """Share of pixels with known flow, in pairs with ground truth; None if there are none."""
    occluded: float | None
    """Share of occluded pixels, in the same pairs."""
    change: float
    """Mean absolute difference of the luma of both images."""
    distributions: dict[Quantity, Distribution]
    """The distribution of each quantity; that of displacements is missing if no flow is known."""
    panels: list[Panel]


@dataclass(frozen=True)
class PairStatistics:
    """Measured on one pair."""

    values: dict[Quantity, np.ndarray]
    """The values at a sample of its pixels."""
    maximum: float
    """Largest displacement in pixels."""
    known: float
    occluded: float
    change: float
    labelled: bool
    panel: Panel | None


def measure(folder: Path, pairs: int) -> MeasuredDataset:
    """Measure at most `pairs` pairs, evenly spaced over the dataset, and draw SHEET_PAIRS of them.

    Raises:
        UserError: the dataset is missing, damaged or empty.
    """
    manifest = Manifest.load(folder)
    for shard in manifest.shards.values():
        shard.check_structure(folder)
    places = [(shard, index) for shard in manifest.shards.values() for index in range(len(shard.names))]
    if not places:
        raise UserError(f"{folder}: contains no pairs; remove the dataset and convert it again")
    chosen = spread_evenly(len(places), pairs)
    drawn = set(chosen[spread_evenly(len(chosen), SHEET_PAIRS)].tolist())
    with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        results = pool.map(lambda number: measure_pair(folder, *places[number], draw=number in drawn), chosen.tolist())
        measured = list(progress.bar(results, desc="reading", total=len(chosen), unit="pair", leave=False))
    labelled = [pair for pair in measured if pair.labelled]
    distributions = {}
    for quantity in QUANTITIES:
        values = np.concatenate([pair.values[quantity] for pair in measured])
        if values.size:
            distributions[quantity] = Distribution(
                mean=float(values.mean(dtype=float)),
                maximum=max(pair.maximum for pair in measured) if quantity is DISPLACEMENT else float(values.max()),
                percentiles=np.percentile(values, quantity.percentiles),
                shares=np.histogram(values, quantity.bounds)[0] / values.size,
            )
    return MeasuredDataset(
        folder=folder,
        manifest=manifest,
        pairs=len(chosen),
        known=float(np.mean([pair.known for pair in labelled])) if labelled else None,
        occluded=float(np.mean([pair.occluded for pair in labelled])) if labelled else None,
        change=float(np.mean([pair.change for pair in measured])),
        distributions=distributions,
        panels=[pair.panel for pair in measured if pair.panel],
    )


def measure_pair(folder: Path, shard: Shard, index: int, *, draw: bool) -> PairStatistics:
    """Measure one pair of a shard."""
    (record,) = shard.records(folder, [index])
    name, path = shard.names[index], folder / shard.file
    sample = decode_record(record.data, FIELDS, size=shard.pair_sizes()[index], pair=name, source=path)
    known = (sample["valid"] & flow_format.find_known(sample["flow"])) != 0
    displacements = np.hypot(sample["flow"][..., 0], sample["flow"][..., 1])[known]
    luma1, luma2 = (cv2.cvtColor(sample[field], cv2.COLOR_RGB2GRAY) for field in ("image1", "image2"))
    panel = None
    if draw:
        height, width = known.shape
        motion = "no known flow" if shard.labelled else "no ground truth"
        if displacements.size:
            motion = f"mean {displacements.mean():.1f}, maximum {displacements.max():.1f} px"
        image = draw_pair(sample, shard.labelled)
        panel = Panel(image, f"{name} ({shard.file.split('-0')[0]}), {width}x{height}, {motion}")
    return PairStatistics(
        values={
            DISPLACEMENT: sample_pixels(displacements),
            BRIGHTNESS: sample_pixels(luma1.ravel()),
            TEXTURE: sample_pixels(gradient_length(luma1).ravel()),
        },
        maximum=float(displacements.max(initial=0)),
        known=float(known.mean()),
        occluded=float(sample["occluded"].mean()),
        change=float(cv2.absdiff(luma1, luma2).mean()),
        labelled=shard.labelled,
        panel=panel,
    )


def sample_pixels(values: np.ndarray) -> np.ndarray:
    """About SAMPLED_PIXELS of many values, evenly spaced."""
    return values[:: max(1, values.size // SAMPLED_PIXELS)]


def gradient_length(luma: np.ndarray) -> np.ndarray:
    """Length of an image's gradient by central differences, per pixel: uint8 (H, W) -> float32 (H, W)."""
    x, y = (cv2.Sobel(luma, cv2.CV_32F, *order, ksize=1, scale=0.5) for order in ((1, 0), (0, 1)))
    return cv2.magnitude(x, y)


def spread_evenly(total: int, number: int) -> np.ndarray:
    """At most `number` of range(total), evenly spaced from first to last: int64, in order."""
    return np.unique(np.linspace(0, total - 1, min(number, total)).round().astype(int))


# --- Text -----------------------------------------------------------------------------------------


def describe(dataset: MeasuredDataset) -> str:
    """A dataset and its statistics as lines of text."""
    manifest, shards = dataset.manifest, dataset.manifest.shards.values()
    stored = stored_bytes(shards, dataset.folder)
    # Without the masks, of one byte each.
    raw = sum(
        number * height * width * (PIXEL_BYTES - 2 if shard.labelled else 6)
        for shard in shards
        for number, height, width in shard.sizes
    )
    validation = "pairs held out by the dataset itself" if manifest.splits.get("val") else "none"
    measured = "all pairs"
    if dataset.pairs < len(manifest):
        measured = f"a sample of {dataset.pairs:,} of the {len(manifest):,} pairs"
    unlabelled = f", {manifest.unlabelled:,} without ground truth" if manifest.unlabelled else ""
    lines = [
        f"{dataset.folder}: {manifest.dataset}, {counted(len(manifest), 'pair')} in {counted(len(shards), 'shard')}"
        f"{unlabelled}",
        f"on disk      {stored / 1e6:,.1f} MB, {stored / raw:.2f} of the uncompressed images and flow",
        f"splits       {describe_splits(manifest)}",
        f"validation   {manifest.validation['file'] or validation}",
        f"sizes        {describe_sizes(manifest)}",
        f"measured on  {measured}",
    ]
    if dataset.known is not None and dataset.occluded is not None:
        of_pairs = " of pairs with ground truth" if manifest.unlabelled else ""
        lines.append(
            f"pixels       {100 * dataset.known:.1f} % with known flow, {100 * dataset.occluded:.1f} % occluded"
            f"{of_pairs}"
        )
    for quantity, found in dataset.distributions.items():
        unit = quantity.unit and f" {quantity.unit}"
        percentiles = ", ".join(
            f"{rank:g} % below {value:.2f}" for rank, value in zip(quantity.percentiles, found.percentiles, strict=True)
        )
        lines.append(
            f"{quantity.name:12} mean {found.mean:.2f}{unit}, maximum {found.maximum:.1f}{unit}; {percentiles}"
        )
        lines += [
            f"  {bin_name(quantity, i):>8}{unit} {100 * share:5.1f} % {'#' * round(100 * share)}"
            for i, share in enumerate(found.shares)
        ]
    lines.append(f"change       mean difference of both images' brightness {dataset.change:.2f}")
    return "\n".join(lines)


def describe_sizes(manifest: Manifest, most: int = 5) -> str:
    """The most common sizes of a dataset's pairs."""
    sizes: collections.Counter[tuple[int, int]] = collections.Counter()
    for shard in manifest.shards.values():
        for number, height, width in shard.sizes:
            sizes[height, width] += number
    common = ", ".join(f"{number:,} of {width}x{height}" for (height, width), number in sizes.most_common(most))
    others = sum(number for _, number in sizes.most_common()[most:])
    return common + (f", {others:,} of {len(sizes) - most} other sizes" if others else "")


def describe_splits(manifest: Manifest) -> str:
    """The splits of a dataset with their numbers of pairs."""
    return ", ".join(
        f"{name} {sum(len(manifest.shards[file].names) for file in files):,}" for name, files in manifest.splits.items()
    )


def compare(datasets: Sequence[MeasuredDataset]) -> str:
    """The statistics of several datasets, a column for each."""

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f} %"

    rows = [
        ("", [str(dataset.folder) for dataset in datasets]),
        ("dataset", [dataset.manifest.dataset for dataset in datasets]),
        ("pairs", [f"{len(dataset.manifest):,}" for dataset in datasets]),
        ("without ground truth", [f"{dataset.manifest.unlabelled:,}" for dataset in datasets]),
        ("splits", [describe_splits(dataset.manifest) for dataset in datasets]),
        ("sizes", [describe_sizes(dataset.manifest, 1) for dataset in datasets]),
        ("pairs measured", [f"{dataset.pairs:,}" for dataset in datasets]),
        ("known flow", [percent(dataset.known) for dataset in datasets]),
        ("occluded", [percent(dataset.occluded) for dataset in datasets]),
        ("change between images", [f"{dataset.change:.2f}" for dataset in datasets]),
    ]
    for quantity in QUANTITIES:
        found = [dataset.distributions.get(quantity) for dataset in datasets]
        unit = quantity.unit and f" {quantity.unit}"
        rows.append(("", []))
        rows.append((quantity.name, [f"mean {d.mean:.2f}{unit}" if d else "-" for d in found]))
        for i, rank in enumerate(quantity.percentiles):
            rows.append((f"  {rank:g} % below", [f"{d.percentiles[i]:.2f}{unit}" if d else "-" for d in found]))
        for i in range(len(quantity.bounds) - 1):
            rows.append((f"  {bin_name(quantity, i):>8}{unit}", [percent(d.shares[i]) if d else "-" for d in found]))
    widths = [max(len(row[i]) for _, row in rows if row) for i in range(len(datasets))]
    label = max(len(name) for name, _ in rows)
    return "\n".join(
        "  ".join([f"{name:{label}}", *(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=False))]).rstrip()
        for name, row in rows
    )


def bin_name(quantity: Quantity, index: int) -> str:
    """The bounds of a histogram's bin as text."""
    low, high = quantity.bounds[index : index + 2]
    return f"{low:g}-{high:g}" if np.isfinite(high) else f"{low:g}-"


# --- Pictures -------------------------------------------------------------------------------------


def draw_pair(sample: Sample, labelled: bool = True) -> np.ndarray:
    """A pair's images and flow in colour, side by side, scaled down to PANEL_WIDTH: uint8 (h, n w, 3) RGB.

    Without ground truth, the difference of the images stands for the flow. Occluded pixels get a panel of their own.
    """
    panels = {"first image": sample["image1"], "second image": sample["image2"]}
    sparse = []
    if labelled:
        flow = np.where(sample["valid"][..., None] != 0, sample["flow"], np.float32(np.nan))
        length = np.hypot(flow[..., 0], flow[..., 1])
        length = length[np.isfinite(length)]
        scale = float(np.percentile(length, 99)) if length.size else 0.0
        sparse = [title := f"flow, to {scale:.1f} px"]
        panels[title] = flow_viz.flow_to_color(flow, scale)
    else:
        panels["difference; no ground truth"] = cv2.absdiff(sample["image1"], sample["image2"])
    if sample["occluded"].any():
        mask = np.where(sample["occluded"] != 0, OCCLUDED, np.where(sample["valid"] != 0, VISIBLE, UNKNOWN))
        sparse.append(title := "occluded (white), unknown (black)")
        panels[title] = np.repeat(mask[..., None], 3, 2).astype(np.uint8)
    height, width = sample["valid"].shape
    if width > PANEL_WIDTH:
        size = PANEL_WIDTH, max(1, round(height * PANEL_WIDTH / width))
        for title, panel in panels.items():
            # Sparse flow has no neighbours to average with.
            panels[title] = cv2.resize(
                panel, size, interpolation=cv2.INTER_NEAREST if title in sparse else cv2.INTER_AREA
            )
    return np.concatenate([flow_viz.draw_label(panel, title) for title, panel in panels.items()], axis=1)


def draw_histogram(quantity: Quantity, datasets: Sequence[MeasuredDataset]) -> Panel | None:
    """A bar chart with the bounds and shares of the bins; None if the quantity is known in no dataset."""
    found = [(i, d.distributions[quantity].shares) for i, d in enumerate(datasets) if quantity in d.distributions]
    if not found:
        return None
    bar, tall, line = 56, 160, flow_viz.TEXT_SIZE + 4
    bins, group = len(quantity.bounds) - 1, bar * len(found) + 12
    top, highest = line * (1 + len(found) * (len(datasets) > 1)), max(shares.max() for _, shares in found)
    canvas = Image.new("RGB", (group * bins, top + tall + line + 8), "white")
    draw = ImageDraw.Draw(canvas)

    def write(text: str, middle: float, y: float) -> None:
        draw.text(
            (middle - draw.textlength(text, font=flow_viz.font()) / 2, y), text, fill="black", font=flow_viz.font()
        )

    for row, (number, shares) in enumerate(found):
        if len(datasets) > 1:  # the legend
            draw.rectangle((6, row * line + 2, 6 + line - 6, row * line + line - 4), fill=COLOURS[number])
            draw.text((6 + line, row * line), str(datasets[number].folder), fill="black", font=flow_viz.font())
        for i, share in enumerate(shares):
            left, height = i * group + row * bar + 6, tall * share / highest
            draw.rectangle((left + 4, top + tall - height, left + bar - 4, top + tall), fill=COLOURS[number])
            write(f"{100 * share:.1f} %", left + bar / 2, top + tall - height - line)
    for i in range(bins):
        write(bin_name(quantity, i), (i + 0.5) * group, top + tall + 4)
    unit = f" ({quantity.unit})" if quantity.unit else " (0 to 255)"
    return Panel(np.asarray(canvas), quantity.name + unit)


def render_page(text: str, charts: Sequence[Panel], datasets: Sequence[MeasuredDataset]) -> str:
    """A web page with the text and all images embedded; the pairs of each dataset in a column."""

    def figure(panel: Panel) -> str:
        data = io.BytesIO()
        Image.fromarray(panel.image).save(data, "PNG")
        source = base64.b64encode(data.getvalue()).decode()
        return (
            f"<figure><figcaption>{html.escape(panel.caption)}</figcaption>"
            f'<img src="data:image/png;base64,{source}" alt=""></figure>'
        )

    title = html.escape(" and ".join(dataset.folder.absolute().name for dataset in datasets))
    columns = []
    for dataset in datasets:
        heading = f"<h2>{html.escape(str(dataset.folder))}</h2>" if len(datasets) > 1 else ""
        columns += [f"<section>{heading}", *map(figure, dataset.panels), "</section>"]
    return "\n".join([
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
        "<style>body{font-family:sans-serif;margin:2em}figure{margin:0 0 1.5em}pre{overflow-x:auto}",
        f"main{{display:grid;grid-template-columns:repeat({len(datasets)},minmax(0,1fr));gap:1.5em}}",
        "img{max-width:100%}</style>",
        f"</head><body>\n<h1>{title}</h1>\n<pre>{html.escape(text)}</pre>",
        *map(figure, charts),
        "<main>",
        *columns,
        "</main></body></html>\n",
    ])  # fmt: skip


if __name__ == "__main__":
    run(main)
