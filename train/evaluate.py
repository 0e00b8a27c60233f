#!/usr/bin/env python3
"""Evaluation: the field's error figures of a split, or a benchmark's submission.

python train/evaluate.py --data DIR --split val --ckpt FILE [--out DIR] [--pictures N] [--batch N]
python train/evaluate.py --submission OUT --root DIR --ckpt FILE [--batch N]

The first prints a table (how its means are formed: train/metrics.py) and writes evaluation.json,
evaluation.md with the same as rows of a Markdown table, and pictures: flow.png of pairs spread over
the split, worst.png of those with the largest error. The second takes the unpacked test set of
Sintel or KITTI and writes the flow as its server wants it. Under mpirun both share the pairs over
the ranks.
"""

import os
import sys

if __name__ == "__main__":  # run as a file: import the packages, not this file's neighbours
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    from launch import environment

    environment.check()

import contextlib
import hashlib
import itertools
import pathlib
import textwrap
from collections.abc import Callable, Iterable

import numpy as np

from launch import progress, session
from launch.arguments import Parser
from launch.communicator import ALONE, Communicator
from launch.errors import UserError, run
from launch.files import write_bytes, write_json
from launch.watchdog import Phase
from model.backend import add_backend_option
from train import metrics, submission
from train.submission import PASSES

# Label, key of `metrics.figures` and unit of each figure, for the table and for Markdown.
FIGURES = (
    ("EPE, mean over pairs", "epe", "px"),
    ("EPE, over all pixels", "epe_pixels", "px"),
    ("EPE of zero flow", "zero_epe", "px"),
    ("EPE, part of zero flow's", "ratio", ""),
    ("Fl-all, over 3 px and 5 %", "fl_all", "%"),
    ("over 1 px", "over_1px", "%"),
    ("over 3 px", "over_3px", "%"),
    ("over 5 px", "over_5px", "%"),
    ("EPE s0-10", "epe_s0_10", "px"),
    ("EPE s10-40", "epe_s10_40", "px"),
    ("EPE s40+", "epe_s40_plus", "px"),
    ("EPE matched", "epe_matched", "px"),
    ("EPE unmatched", "epe_unmatched", "px"),
)
NOTE = (
    "The EPE of zero flow is a mean over pairs, too; shares, and the EPE of each kind of "
    "pixel, are over all pixels whose flow is known, of all pairs together."
)


# --- Evaluation -----------------------------------------------------------------------------------


def evaluate(predictor, split, comm=ALONE, *, batch=1, pictures=(), on_batch=None, worst=0):
    """Evaluate a network on every pair of a split, shared by all ranks.

    Args:
        predictor: a `model.inference.FlowPredictor`.
        split: an opened split, a `prep.reader.DatasetSplit`.
        comm: the ranks that call this together, a `launch.communicator.Communicator`.
        batch: pairs at a time, on each rank.
        pictures: positions in the split whose flow is wanted.
        on_batch: called with the number of pairs after each batch.
        worst: of how many pairs with the largest EPE the flow is wanted.

    Returns:
        A dict with `sums` (float64 (pairs, fields): `metrics.pair_sums` of each pair in the split's
        order), `epe` and `zero_epe` (float64 (pairs,), in pixels: mean end-point error of the
        network and of a flow of zero; nan where no flow is known), `worst` (positions of the pairs
        with the largest EPE, that first), the same on every rank, and `samples`, position to (image
        1, true flow with nan where unknown, predicted flow) of the wanted pairs that this rank had.
    """
    from prep import reader

    sums = np.zeros((len(split), len(metrics.SUMS)))
    samples = {}
    batches = reader.evaluation_batches(split, batch=batch, rank=comm.rank, ranks=comm.size)
    for pairs in batches:
        comm.progress(Phase.VALIDATING)
        predicted = predictor.flow_batch(pairs.image1, pairs.image2)
        # Others fill up the last batch.
        places = {position: i for i, position in enumerate(pairs.index.tolist()) if position >= 0}
        for position, i in places.items():
            sums[position] = metrics.pair_sums(predicted[i], pairs.flow[i], pairs.valid[i], pairs.occluded[i])
        # The worst of all ranks' pairs are among the worst of each.
        keep = {*pictures, *find_worst(sums, {*samples, *places}, worst)}
        samples = {position: samples[position] for position in keep & samples.keys()}
        for position in keep & places.keys():
            i = places[position]
            known = np.where(pairs.valid[i][..., None] > 0, pairs.flow[i], np.float32(np.nan))
            samples[position] = (pairs.image1[i].copy(), known, predicted[i].copy())
        if on_batch:
            on_batch(len(places))
    comm.sum(sums)  # exact: each element is zero on all ranks but one
    epe, zero_epe = metrics.pair_means(sums)
    wanted = find_worst(sums, range(len(split)), worst)
    samples = {position: samples[position] for position in samples.keys() & {*pictures, *wanted}}
    return {"sums": sums, "epe": epe, "zero_epe": zero_epe, "worst": wanted, "samples": samples}


def find_worst(sums, positions, count):
    """Those `count` of `positions` with the largest EPE, that first; none without known flow."""
    epe = np.nan_to_num(metrics.pair_means(sums)[0], nan=np.inf)  # a network that gives nan
    known = [position for position in positions if sums[position, 0] > 0]
    return sorted(known, key=lambda position: (-epe[position], position))[:count]


def gather_strips(result: dict, comm: Communicator, guard: Callable = contextlib.nullcontext) -> dict:
    """The pictures of the pairs in `samples` of all ranks; all ranks must call this.

    Args:
        result: of `evaluate`.
        comm: the ranks.
        guard: gives a context manager for the drawing, from what is drawn; it may keep errors, then
            this rank's pictures are missing.

    Returns:
        Position to picture, uint8 (H, 4W, 3) RGB, as of `prep.flow_viz.draw_prediction`; on every rank.
    """
    from prep.flow_viz import draw_prediction

    drawn = []
    with guard("drawing flow"):
        drawn = [[i, draw_prediction(*sample)] for i, sample in result["samples"].items()]
    return dict(itertools.chain(*comm.gather(drawn)))


def draw_pairs(split, result: dict, strips: dict, wanted: Iterable[int]) -> np.ndarray:
    """A picture of the pairs at the positions `wanted`, which may differ in size, with captions.

    Args:
        split: the opened split, a `prep.reader.DatasetSplit`.
        result: of `evaluate` on it.
        strips: of `gather_strips`.

    Returns:
        uint8 (H, W, 3) RGB.
    """
    from prep.flow_viz import contact_sheet

    captions = [
        f"{split.names[i]}: EPE {result['epe'][i]:.2f} px, zero flow {result['zero_epe'][i]:.2f} px" for i in wanted
    ]
    return contact_sheet([strips[i] for i in wanted], captions)


def summarize(result):
    """The figures of all pairs, of a result of `evaluate`: see `metrics.figures`.

    `epe_matched` is None, as `epe_unmatched` is, where no pair has a pixel that is occluded: such a
    set has no masks.
    """
    return summarize_pairs(result, slice(None))


def summarize_pairs(result, chosen):
    """`summarize` for the pairs that `chosen` indexes."""
    summary = metrics.figures(result["sums"][chosen])
    if not result["sums"][:, metrics.SUMS.index("pixels_unmatched")].any():
        summary["epe_matched"] = None
    return summary


def group(split, result):
    """The figures of parts of a split.

    Args:
        split: the opened split.
        result: of `evaluate` on it.

    Returns:
        Two dicts: by pass (clean and final, of a set that is rendered twice; else empty), and by
        scene (of Sintel; else empty) the dicts by pass. Figures as `summarize`.
    """
    parts = [name.split("/") for name in split.names]
    passes = [name for name in PASSES if any(part[0] == name for part in parts)]
    scenes = sorted({part[1] for part in parts}) if split.dataset == "sintel" else []

    def figures_of(*wanted):
        return summarize_pairs(result, [i for i, part in enumerate(parts) if tuple(part[: len(wanted)]) == wanted])

    return (
        {name: figures_of(name) for name in passes},
        {
            scene: {name: figures_of(name, scene) for name in passes if [name, scene] in [part[:2] for part in parts]}
            for scene in scenes
        },
    )


# --- What is printed and written ------------------------------------------------------------------


def table(split, summary, passes, scenes):
    """The figures of an opened split as lines of text: all pairs, and beside them each pass."""
    sizes = sorted({f"{height}x{width}" for height, width in split.sizes.tolist()})
    columns = {**passes, "all": summary} if len(passes) > 1 else {"": summary}
    lines = [
        f"{split.dataset} {split.name}: {summary['pairs']} pairs of {', '.join(sizes)}, "
        f"{summary['pixels']:,} pixels with known flow",
        "",
    ]

    def line(label, values, unit=""):
        return (f"  {label:<26}{''.join(f'{value:>12}' for value in values)}  {unit}").rstrip()

    if len(columns) > 1:
        lines.append(line("", columns))
    for label, key, unit in FIGURES:
        if summary[key] is not None:
            lines.append(line(label, [show(column[key]) for column in columns.values()], unit))
    if scenes:
        lines += ["", line("EPE by scene, over pixels", [])]
    for scene, by_pass in scenes.items():
        values = [show(by_pass[name]["epe_pixels"]) if name in by_pass else "-" for name in passes]
        lines.append(line(f"  {scene}", values, "px"))
    return "\n".join([*lines, "", *textwrap.wrap(NOTE, 76)])


def markdown(rows):
    """A Markdown table of (name, figures as of `summarize`), with a head and a note."""
    cells = [["", "pairs", *(f"{label} ({unit})" if unit else label for label, _, unit in FIGURES)]]
    cells.append(["---"] + ["---:"] * (len(cells[0]) - 1))
    for name, summary in rows:
        cells.append([name, str(summary["pairs"]), *(show(summary[key]) for _, key, _ in FIGURES)])
    return "".join(f"| {' | '.join(row)} |\n" for row in cells) + f"\n{NOTE}\n"


def show(value) -> str:
    """A figure as text."""
    return "-" if value is None else f"{value:.3f}"


def report(args, comm, split) -> None:
    """Evaluate as the command line says; print the table, write JSON, Markdown and pictures."""
    from model.inference import load_predictor
    from prep import reader
    from prep.flow_viz import save_png

    names = split.names
    predictor = load_predictor(args.ckpt, args.backend)
    out = args.out or args.ckpt.with_name(f"{args.ckpt.stem}-{args.split}")
    if comm.rank == 0:
        out.mkdir(parents=True, exist_ok=True)
    spread = np.unique(np.linspace(0, len(names) - 1, args.pictures).astype(int)).tolist()
    order = reader.evaluation_order(split.sizes, args.batch * comm.size)
    mine = sum(real for pairs in order for _, real in pairs[comm.rank :: comm.size])
    with progress.bar(total=mine, unit="pair", disable=comm.rank != 0) as bar:
        result = evaluate(
            predictor, split, comm=comm, batch=args.batch, pictures=spread, worst=args.pictures, on_batch=bar.update
        )
    strips = gather_strips(result, comm)
    if comm.rank != 0:
        return
    summary, (passes, scenes) = summarize(result), group(split, result)
    columns = zip(names, *(result[key].tolist() for key in ("epe", "zero_epe", "sums")))
    by_pair = [
        {"pair": name, "epe": epe, "zero_epe": zero_epe, "sums": dict(zip(metrics.SUMS, sums))}
        for name, epe, zero_epe, sums in columns
    ]
    write_json(
        out / "evaluation.json",
        {
            "data": str(args.data),
            "split": args.split,
            "checkpoint": str(args.ckpt),
            **summary,
            "passes": passes,
            "scenes": scenes,
            "by_pair": by_pair,
        },
    )
    rows = list(passes.items()) if len(passes) > 1 else []
    title = f"{split.dataset} {split.name}, {args.ckpt.name}"
    write_bytes(
        out / "evaluation.md",
        markdown([*((f"{title}, {name}", figures) for name, figures in rows), (title, summary)]).encode(),
    )
    print(table(split, summary, passes, scenes))
    print(f"\nfigures:  {out / 'evaluation.json'}, {out / 'evaluation.md'}")
    for file, wanted in (("flow.png", spread), ("worst.png", result["worst"])):
        if wanted:
            save_png(out / file, draw_pairs(split, result, strips, wanted))
            print(f"pictures: {out / file}")


# --- Command line ---------------------------------------------------------------------------------


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--ckpt", required=True, type=pathlib.Path, metavar="FILE", help="a checkpoint of a run, or network weights"
    )
    parser.add_argument("--data", type=pathlib.Path, metavar="DIR", help="a folder that prep/convert.py made")
    parser.add_argument(
        "--split", default="val", metavar="NAME", help="train, val (the default) or, of Sintel, one such as val-clean"
    )
    parser.add_argument(
        "--out", type=pathlib.Path, metavar="DIR", help="for figures and pictures; default: beside the checkpoint"
    )
    parser.add_argument(
        "--pictures",
        type=int,
        default=8,
        metavar="N",
        help="how many pairs to draw, spread over the split, and how many of the worst (default 8)",
    )
    parser.add_argument(
        "--submission", type=pathlib.Path, metavar="DIR", help="instead of that, write the flow of a test set here"
    )
    parser.add_argument("--root", type=pathlib.Path, metavar="DIR", help="the unpacked test set of Sintel or KITTI")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="pairs at a time, on each rank (default 1)")
    session.add_options(parser)
    add_backend_option(parser)
    args = parser.parse_args()

    with session.start(lambda: prepare(args), args.device, args.collective) as (comm, plan):
        if args.submission:
            submission.submit(args, comm, *plan)
        else:
            report(args, comm, plan)


def prepare(args):
    """Check all that can be checked before MindSpore is there, on every rank.

    Returns:
        (settings, plan): what must be the same on all ranks, a dict of strings, and for a
        submission the benchmark's name and its pairs by size, else the opened split.
    """
    from prep import reader

    if args.batch < 1 or args.pictures < 0:
        raise UserError("--batch must be at least 1 and --pictures at least 0")
    if bool(args.submission) != bool(args.root) or bool(args.submission) == bool(args.data):
        raise UserError("give --data DIR to evaluate, or --submission DIR and --root DIR to write a submission")
    if not args.ckpt.is_file():
        raise UserError(f"{args.ckpt}: no such checkpoint file")
    for folder in (args.out, args.submission):
        if folder and folder.exists() and not folder.is_dir():
            raise UserError(f"{folder}: a file; expected a folder to write into")
    settings = {"checkpoint": hashlib.sha256(args.ckpt.read_bytes()).hexdigest()}
    if args.submission:
        name, pairs = submission.list_test_pairs(args.root)
        text = "\n".join(file for file, _, _ in pairs)
        settings["test set"] = hashlib.sha256(text.encode()).hexdigest()
        return settings, (name, submission.by_size(pairs))
    split = reader.DatasetSplit.open(args.data, args.split)
    manifest = (args.data / "manifest.json").read_bytes()
    return {**settings, "data": hashlib.sha256(manifest).hexdigest()}, split


if __name__ == "__main__":
    run(main)
