#!/usr/bin/env python3
"""Look at a converted set: counts, sizes, displacements, and a sheet of pairs in colour."""

import os
import sys

if __name__ == "__main__":  # run as a file: import the packages, not this file's neighbours
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    from launch import environment

    environment.check()

import base64
import collections
import concurrent.futures
import html
import io

import cv2
import numpy as np
from PIL import Image, ImageDraw

from launch import files, progress
from launch.arguments import Parser
from launch.errors import UserError, run
from prep import flow_viz
from prep.formats import flow as flow_format
from prep.shards import FIELDS, Manifest, decode_record

SHOWN = 8  # pairs on the sheet
PANEL = 512  # pixels, the widest that one picture of a sheet is
PIXELS = 20000  # of a pair, evenly spaced, are enough for percentiles

# The bounds of the histogram's bars in pixels; motion is spread over orders of magnitude.
BOUNDS = np.array([0, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128, 256, np.inf])
PERCENTILES = (10, 50, 90, 99, 99.9)


def main() -> None:
    options = parse_options()
    if options.pairs < 1:
        raise UserError(f"--pairs {options.pairs}: expected 1 or more")
    folder = os.path.normpath(options.folder)
    manifest = Manifest.load(folder)
    for shard in manifest.shards.values():
        shard.check_structure(folder)
    found = measure(manifest, folder, options.pairs)
    text = describe(manifest, folder, found)
    print(text)
    if options.png:
        rows = [draw_histogram(found.shares)] + found.strips
        flow_viz.save_png(options.png, flow_viz.contact_sheet(rows, ["displacement", *found.captions]))
    if options.html:
        files.write_bytes(options.html, write_page(folder, text, found).encode())


def parse_options():
    parser = Parser(
        prog="inspect.py",
        description="Show what is in a converted set: counts, sizes and displacements as text, and "
        "pairs with their flow in colour as a page or a picture.",
    )
    parser.add_argument("folder", metavar="DIR", help="the set's folder")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--html", metavar="OUT", help="write a page, one file with all in it")
    output.add_argument("--png", metavar="OUT", help="write a picture")
    parser.add_argument(
        "--pairs", type=int, default=400, metavar="N",
        help="how many pairs to measure, evenly spaced over the set (default %(default)s)",
    )  # fmt: skip
    return parser.parse_args()


Measured = collections.namedtuple("Measured", "pairs known occluded mean longest percentiles shares strips captions")
Measured.__doc__ = """What was measured on a sample: how many pairs, the shares of their pixels with
known and with occluded flow, statistics of the known displacements in pixels (shares: of the bars
between BOUNDS), and for the sheet some pairs drawn, with their captions."""


def measure(manifest, folder, pairs):
    """Measure at most `pairs` pairs, evenly spaced over the set; returns a Measured."""
    places = []  # (shard, index in it, its size) of every pair
    for shard in manifest.shards.values():
        sizes = [size for number, *size in shard.sizes for _ in range(number)]
        places += [(shard, i, size) for i, size in enumerate(sizes)]
    if not places:
        raise UserError(f"{folder}: has no pair")
    chosen = evenly(len(places), pairs)
    shown = set(chosen[evenly(len(chosen), SHOWN)].tolist())

    def look(index):
        shard, within, size = places[index]
        ((_, record),) = shard.records(folder, [within])
        name, path = shard.names[within], os.path.join(folder, shard.file)
        sample = decode_record(record, FIELDS, size=size, pair=name, source=path)
        known = (sample["valid"] & flow_format.known(sample["flow"])) != 0
        length = np.hypot(*np.moveaxis(sample["flow"], 2, 0))[known]
        strip = caption = None
        if index in shown:
            strip = draw_pair(sample)
            caption = caption_of(name, shard.file, length, known)
        lengths = length[:: max(1, length.size // PIXELS)]
        return (
            lengths,
            length.max(initial=0),
            known.mean(),
            sample["occluded"].mean(),
            strip,
            caption,
        )

    with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        results = pool.map(look, chosen.tolist())
        bar = progress.bar(results, desc="reading", total=len(chosen), unit="pair", leave=False)
        seen = list(bar)
    lengths, longest, known, occluded, strips, captions = zip(*seen)
    lengths = np.concatenate(lengths)
    if not lengths.size:
        raise UserError(f"{folder}: the flow is known nowhere in {len(chosen)} of its pairs")
    return Measured(
        pairs=len(chosen),
        known=np.mean(known),
        occluded=np.mean(occluded),
        mean=lengths.mean(dtype=float),
        longest=max(longest),
        percentiles=np.percentile(lengths, PERCENTILES),
        shares=np.histogram(lengths, BOUNDS)[0] / lengths.size,
        strips=[strip for strip in strips if strip is not None],
        captions=[caption for caption in captions if caption],
    )


def evenly(total, wanted):
    """At most `wanted` of range(total), evenly spaced from first to last; int64, ordered."""
    return np.unique(np.linspace(0, total - 1, min(wanted, total)).round().astype(int))


def describe(manifest, folder, found):
    """The set and what was measured on it as lines of text."""
    shards = manifest.shards.values()
    pairs = sum(len(shard.names) for shard in shards)
    # MindRecord's pages end in holes, which no disk stores, so blocks say more than lengths.
    stored = sum(512 * os.stat(os.path.join(folder, shard.file)).st_blocks for shard in shards)
    sizes = collections.Counter()
    for shard in shards:
        for number, height, width in shard.sizes:
            sizes[f"{width}x{height}"] += number
    raw = sum(number * np.prod([int(n) for n in size.split("x")]) * 14 for size, number in sizes.items())
    common = ", ".join(f"{number:,} of {size}" for size, number in sizes.most_common(5))
    others = sum(number for _, number in sizes.most_common()[5:])
    splits = ", ".join(
        f"{name} {sum(len(manifest.shards[file].names) for file in files):,}" for name, files in manifest.splits.items()
    )
    sample = "all pairs" if found.pairs == pairs else f"a sample of {found.pairs:,} of the {pairs:,} pairs"
    bars = "\n".join(
        f"  {bar_name(i):>8} px {100 * share:5.1f} % {'#' * round(100 * share)}" for i, share in enumerate(found.shares)
    )
    percentiles = ", ".join(f"{rank:g} % below {value:.2f}" for rank, value in zip(PERCENTILES, found.percentiles))
    known, occluded = 100 * found.known, 100 * found.occluded
    return "\n".join([
        f"{folder}: {manifest.dataset}, {pairs:,} pairs in {len(shards)} shards",
        f"on disk      {stored / 1e6:,.1f} MB, {stored / raw:.2f} of images and flow uncompressed",
        f"splits       {splits}",
        f"validation   {manifest.validation['file'] or 'held out by the data set itself'}",
        f"sizes        {common}" + (f", {others:,} of {len(sizes) - 5} others" if others else ""),
        f"measured on  {sample}",
        f"pixels       {known:.1f} % with known flow, {occluded:.1f} % occluded",
        f"displacement mean {found.mean:.2f} px, longest {found.longest:.1f} px; {percentiles}",
        bars,
    ])  # fmt: skip


def bar_name(index) -> str:
    """The bounds of a histogram's bar as text."""
    low, high = BOUNDS[index : index + 2]
    return f"{low:g}-{high:g}" if np.isfinite(high) else f"{low:g}-"


def caption_of(name, file, length, known) -> str:
    """What is written over a pair on the sheet."""
    height, width = known.shape
    moves = f"mean {length.mean():.1f}, longest {length.max():.1f} px" if length.size else "no known flow"
    return f"{name} ({file.split('-0')[0]}), {width}x{height}, {moves}"


def draw_pair(sample):
    """A pair's images and flow in colour side by side, scaled down to panels: uint8 (h, 3w, 3)."""
    flow = np.where(sample["valid"][..., None] != 0, sample["flow"], np.float32(np.nan))
    length = np.hypot(flow[..., 0], flow[..., 1])
    length = length[np.isfinite(length)]
    scale = float(np.percentile(length, 99)) if length.size else 0.0
    panels = [sample["image1"], sample["image2"], flow_viz.flow_to_color(flow, scale)]
    height, width = sample["valid"].shape
    if width > PANEL:
        size = PANEL, max(1, round(height * PANEL / width))
        # Between the few known pixels of sparse flow there is nothing to average with.
        ways = cv2.INTER_AREA, cv2.INTER_AREA, cv2.INTER_NEAREST
        panels = [cv2.resize(panel, size, interpolation=way) for panel, way in zip(panels, ways)]
    titles = ["first image", "second image", f"flow, to {scale:.1f} px"]
    return np.concatenate([flow_viz.draw_label(p, t) for p, t in zip(panels, titles)], axis=1)


def draw_histogram(shares):
    """The bars of the histogram with their bounds and shares below: uint8 (h, w, 3)."""
    bar, tall, line = 64, 160, flow_viz.TEXT_SIZE + 4
    canvas = Image.new("RGB", (bar * len(shares), tall + 3 * line), "white")
    draw = ImageDraw.Draw(canvas)
    for i, share in enumerate(shares):
        left, top = i * bar, line + tall * (1 - share / max(shares))
        draw.rectangle((left + 6, top, left + bar - 6, line + tall), fill=(69, 117, 180))
        for text, y in (
            (f"{100 * share:.1f} %", top - line),
            (f"{bar_name(i)} px", line + tall + 4),
        ):
            offset = (bar - draw.textlength(text, font=flow_viz.font())) / 2
            draw.text((left + offset, y), text, fill="black", font=flow_viz.font())
    return np.asarray(canvas)


def write_page(folder, text, found):
    """The HTML page: the text, the histogram and the pairs, all pictures inside it."""

    def figure(image, caption) -> str:
        data = io.BytesIO()
        Image.fromarray(image).save(data, "PNG")
        source = base64.b64encode(data.getvalue()).decode()
        return (
            f"<figure><figcaption>{html.escape(caption)}</figcaption>"
            f'<img src="data:image/png;base64,{source}" alt=""></figure>'
        )

    title = html.escape(os.path.basename(os.path.abspath(folder)))
    figures = [figure(draw_histogram(found.shares), "displacement")]
    figures += [figure(*pair) for pair in zip(found.strips, found.captions)]
    return "\n".join([
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
        "<style>body{font-family:sans-serif;margin:2em}figure{margin:0 0 1.5em}",
        "img{max-width:100%}</style>",
        f"</head><body>\n<h1>{title}</h1>\n<pre>{html.escape(text)}</pre>",
        *figures,
        "</body></html>\n",
    ])  # fmt: skip


if __name__ == "__main__":
    run(main)
