#!/usr/bin/env python3
"""Show a converted dataset: numbers, sizes, displacements, and a contact sheet of pairs with their flow."""

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
import shlex
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
from prep.shards import FIELDS, PIXEL_BYTES, Manifest, Shard, decode_record, stored_bytes

SHEET_PAIRS = 8
PANEL_WIDTH = 512
"""Maximum width of an image on the sheet, in pixels."""
SAMPLED_PIXELS = 20000
"""Per pair, evenly spaced: enough for percentiles."""
BOUNDS = np.array([0, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128, 256, np.inf])
"""Bounds of the histogram's bins in pixels; displacements range over orders of magnitude."""
PERCENTILES = (10, 50, 90, 99, 99.9)


def main() -> None:
    options = parse_options()
    if options.pairs < 1:
        raise UserError(f"--pairs {options.pairs}: expected 1 or more")
    folder = Path(os.path.normpath(options.folder))
    manifest = Manifest.load(folder)
    for shard in manifest.shards.values():
        shard.check_structure(folder)
    statistics, panels = measure(manifest, folder, options.pairs)
    text = describe(manifest, folder, statistics)
    print(text)
    panels = [Panel(draw_histogram(statistics.shares), "displacement"), *panels]
    train = f"train on it: launch/train.sh --data {shlex.quote(str(folder))}"
    if options.png:
        flow_viz.save_png(options.png, flow_viz.contact_sheet([p.image for p in panels], [p.caption for p in panels]))
    if options.html:
        files.write_bytes(options.html, render_page(folder, text, panels).encode())
    if path := options.png or options.html:
        print(f"{path}: the sheet with {len(panels) - 1} pairs; {train}")
    else:
        print(f"see some pairs: --html OUT or --png OUT; {train}")


def parse_options() -> argparse.Namespace:
    parser = Parser(
        description="Show a converted dataset: numbers, sizes and displacements as text, and some pairs with their "
        "flow in colour as a web page or an image.",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="the folder of the dataset")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--html", type=Path, metavar="OUT", help="write a self-contained web page (default: text only)")
    output.add_argument("--png", type=Path, metavar="OUT", help="write an image (default: text only)")
    parser.add_argument(
        "--pairs",
        type=int,
        default=400,
        metavar="N",
        help="number of pairs to measure, evenly spaced over the dataset (default: %(default)s)",
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
class Statistics:
    """Measured on a sample of the pairs; displacements in pixels, where the flow is known."""

    pairs: int
    known: float
    """Share of pixels with known flow."""
    occluded: float
    """Share of occluded pixels."""
    mean: float
    maximum: float
    percentiles: np.ndarray
    """Displacements at PERCENTILES."""
    shares: np.ndarray
    """Share of the pixels in each bin of BOUNDS."""


@dataclass(frozen=True)
class PairStatistics:
    """Measured on one pair."""

    displacements: np.ndarray
    """Of some of the known pixels, in pixels."""
    maximum: float
    known: float
    occluded: float
    panel: Panel | None


def measure(manifest: Manifest, folder: Path, pairs: int) -> tuple[Statistics, list[Panel]]:
    """Measure at most `pairs` pairs, evenly spaced over the dataset, and draw SHEET_PAIRS of them."""
    places = [(shard, index) for shard in manifest.shards.values() for index in range(len(shard.names))]
    if not places:
        raise UserError(f"{folder}: contains no pairs; convert the dataset again")
    chosen = spread_evenly(len(places), pairs)
    drawn = set(chosen[spread_evenly(len(chosen), SHEET_PAIRS)].tolist())
    with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        results = pool.map(lambda number: measure_pair(folder, *places[number], draw=number in drawn), chosen.tolist())
        measured = list(progress.bar(results, desc="reading", total=len(chosen), unit="pair", leave=False))
    displacements = np.concatenate([pair.displacements for pair in measured])
    if not displacements.size:
        raise UserError(f"{folder}: none of the {len(chosen)} measured pairs has known flow; measure more with --pairs")
    statistics = Statistics(
        pairs=len(chosen),
        known=float(np.mean([pair.known for pair in measured])),
        occluded=float(np.mean([pair.occluded for pair in measured])),
        mean=float(displacements.mean(dtype=float)),
        maximum=max(pair.maximum for pair in measured),
        percentiles=np.percentile(displacements, PERCENTILES),
        shares=np.histogram(displacements, BOUNDS)[0] / displacements.size,
    )
    return statistics, [pair.panel for pair in measured if pair.panel]


def measure_pair(folder: Path, shard: Shard, index: int, *, draw: bool) -> PairStatistics:
    """Measure one pair of a shard."""
    (record,) = shard.records(folder, [index])
    name, path = shard.names[index], folder / shard.file
    sample = decode_record(record.data, FIELDS, size=shard.pair_sizes()[index], pair=name, source=path)
    known = (sample["valid"] & flow_format.find_known(sample["flow"])) != 0
    displacements = np.hypot(sample["flow"][..., 0], sample["flow"][..., 1])[known]
    panel = None
    if draw:
        height, width = known.shape
        motion = "no known flow"
        if displacements.size:
            motion = f"mean {displacements.mean():.1f}, maximum {displacements.max():.1f} px"
        panel = Panel(draw_pair(sample), f"{name} ({shard.file.split('-0')[0]}), {width}x{height}, {motion}")
    return PairStatistics(
        displacements=displacements[:: max(1, displacements.size // SAMPLED_PIXELS)],
        maximum=float(displacements.max(initial=0)),
        known=float(known.mean()),
        occluded=float(sample["occluded"].mean()),
        panel=panel,
    )


def spread_evenly(total: int, number: int) -> np.ndarray:
    """At most `number` of range(total), evenly spaced from first to last: int64, in order."""
    return np.unique(np.linspace(0, total - 1, min(number, total)).round().astype(int))


# --- Output ---------------------------------------------------------------------------------------


def describe(manifest: Manifest, folder: Path, statistics: Statistics) -> str:
    """The dataset and its statistics as lines of text."""
    shards = manifest.shards.values()
    stored = stored_bytes(shards, folder)
    sizes: collections.Counter[tuple[int, int]] = collections.Counter()
    for shard in shards:
        for number, height, width in shard.sizes:
            sizes[height, width] += number
    # Without the masks, of one byte each.
    raw = sum(number * height * width * (PIXEL_BYTES - 2) for (height, width), number in sizes.items())
    common = ", ".join(f"{number:,} of {width}x{height}" for (height, width), number in sizes.most_common(5))
    others = sum(number for _, number in sizes.most_common()[5:])
    splits = ", ".join(
        f"{name} {sum(len(manifest.shards[file].names) for file in files):,}" for name, files in manifest.splits.items()
    )
    measured = "all pairs"
    if statistics.pairs < len(manifest):
        measured = f"a sample of {statistics.pairs:,} of the {len(manifest):,} pairs"
    percentiles = ", ".join(
        f"{rank:g} % below {value:.2f}" for rank, value in zip(PERCENTILES, statistics.percentiles, strict=True)
    )
    return "\n".join([
        f"{folder}: {manifest.dataset}, {counted(len(manifest), 'pair')} in {counted(len(shards), 'shard')}",
        f"on disk      {stored / 1e6:,.1f} MB, {stored / raw:.2f} of the uncompressed images and flow",
        f"splits       {splits}",
        f"validation   {manifest.validation['file'] or 'pairs held out by the dataset itself'}",
        f"sizes        {common}" + (f", {others:,} of {len(sizes) - 5} other sizes" if others else ""),
        f"measured on  {measured}",
        f"pixels       {100 * statistics.known:.1f} % with known flow, {100 * statistics.occluded:.1f} % occluded",
        f"displacement mean {statistics.mean:.2f} px, maximum {statistics.maximum:.1f} px; {percentiles}",
        *(
            f"  {bin_name(i):>8} px {100 * share:5.1f} % {'#' * round(100 * share)}"
            for i, share in enumerate(statistics.shares)
        ),
    ])  # fmt: skip


def bin_name(index: int) -> str:
    """The bounds of a histogram's bin as text."""
    low, high = BOUNDS[index : index + 2]
    return f"{low:g}-{high:g}" if np.isfinite(high) else f"{low:g}-"


def draw_pair(sample: Sample) -> np.ndarray:
    """A pair's images and flow in colour, side by side, scaled down to PANEL_WIDTH: uint8 (h, 3w, 3) RGB."""
    flow = np.where(sample["valid"][..., None] != 0, sample["flow"], np.float32(np.nan))
    length = np.hypot(flow[..., 0], flow[..., 1])
    length = length[np.isfinite(length)]
    scale = float(np.percentile(length, 99)) if length.size else 0.0
    panels = [sample["image1"], sample["image2"], flow_viz.flow_to_color(flow, scale)]
    height, width = sample["valid"].shape
    if width > PANEL_WIDTH:
        size = PANEL_WIDTH, max(1, round(height * PANEL_WIDTH / width))
        # Sparse flow has no neighbours to average with.
        modes = cv2.INTER_AREA, cv2.INTER_AREA, cv2.INTER_NEAREST
        panels = [cv2.resize(panel, size, interpolation=mode) for panel, mode in zip(panels, modes, strict=True)]
    titles = ["first image", "second image", f"flow, to {scale:.1f} px"]
    return np.concatenate([flow_viz.draw_label(p, t) for p, t in zip(panels, titles, strict=True)], axis=1)


def draw_histogram(shares: np.ndarray) -> np.ndarray:
    """A bar chart with the bounds and shares of the bins: uint8 (H, W, 3) RGB."""
    bar, tall, line = 64, 160, flow_viz.TEXT_SIZE + 4
    canvas = Image.new("RGB", (bar * len(shares), tall + 3 * line), "white")
    draw = ImageDraw.Draw(canvas)
    for i, share in enumerate(shares):
        left, top = i * bar, line + tall * (1 - share / max(shares))
        draw.rectangle((left + 6, top, left + bar - 6, line + tall), fill=(69, 117, 180))
        for text, y in ((f"{100 * share:.1f} %", top - line), (f"{bin_name(i)} px", line + tall + 4)):
            offset = (bar - draw.textlength(text, font=flow_viz.font())) / 2
            draw.text((left + offset, y), text, fill="black", font=flow_viz.font())
    return np.asarray(canvas)


def render_page(folder: Path, text: str, panels: list[Panel]) -> str:
    """A web page with the text and all images embedded."""

    def figure(panel: Panel) -> str:
        data = io.BytesIO()
        Image.fromarray(panel.image).save(data, "PNG")
        source = base64.b64encode(data.getvalue()).decode()
        return (
            f"<figure><figcaption>{html.escape(panel.caption)}</figcaption>"
            f'<img src="data:image/png;base64,{source}" alt=""></figure>'
        )

    title = html.escape(folder.absolute().name)
    return "\n".join([
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
        "<style>body{font-family:sans-serif;margin:2em}figure{margin:0 0 1.5em}",
        "img{max-width:100%}</style>",
        f"</head><body>\n<h1>{title}</h1>\n<pre>{html.escape(text)}</pre>",
        *map(figure, panels),
        "</body></html>\n",
    ])  # fmt: skip


if __name__ == "__main__":
    run(main)
