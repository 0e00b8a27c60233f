#!/usr/bin/env python3
"""Evaluate a network on a split with the field's metrics, or predict a benchmark's test set for submission.

python train/evaluate.py --data DIR --split val --ckpt FILE [--out DIR] [--pictures N] [--batch N]
python train/evaluate.py --submission OUT --root DIR --ckpt FILE [--batch N]

The first prints a table (train/metrics.py defines the metrics) and writes evaluation.json, evaluation.md with the
same as a Markdown table, and pictures: flow.png of pairs spread over the split, worst.png of those with the largest
error. The second takes the unpacked test set of Sintel or KITTI and writes the flow in the format that its server
expects. Under mpirun both share the pairs among the ranks.
"""

import os
import sys

if __name__ == "__main__":  # run as a file: import the packages, not this file's neighbours
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    from launch import environment

    environment.check()

import argparse
import hashlib
import pathlib
import signal

import numpy as np

from launch import progress, ranks, session
from launch.arguments import Parser
from launch.communicator import Communicator
from launch.errors import UserError, run
from model.backend import add_backend_option
from model.precision import add_precision_option
from prep import reader
from prep.shards import Manifest, hash_manifest
from train import report
from train.evaluation import EvaluationOptions, count_share, evaluate
from train.submission import Benchmark, check_out, list_test_pairs, write_submission


def main() -> None:
    parser = Parser(description="Evaluate a network on a split, or predict a benchmark's test set.")
    parser.add_argument(
        "--ckpt",
        required=True,
        type=pathlib.Path,
        metavar="FILE",
        help="checkpoint of a run, or a file of network weights (required)",
    )
    parser.add_argument(
        "--data", type=pathlib.Path, metavar="DIR", help="dataset converted by prep/convert.py, to evaluate on"
    )
    parser.add_argument(
        "--split",
        default="val",
        metavar="NAME",
        help="split of --data: train, val or, for Sintel, one pass such as val-clean",
    )
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        metavar="DIR",
        help="folder for metrics and pictures (default: CKPT-DATASET-SPLIT beside the checkpoint)",
    )
    parser.add_argument(
        "--pictures",
        type=int,
        default=8,
        metavar="N",
        help="number of pairs to draw, spread over the split, and number of the worst pairs to draw",
    )
    parser.add_argument(
        "--submission",
        type=pathlib.Path,
        metavar="DIR",
        help="instead of evaluating, write the flow of the test set --root to this folder, new or empty",
    )
    parser.add_argument(
        "--root", type=pathlib.Path, metavar="DIR", help="the unpacked test set of Sintel or KITTI, for --submission"
    )
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="pairs per batch and rank")
    session.add_options(parser)
    add_backend_option(parser)
    add_precision_option(parser)
    args = parser.parse_args()

    with session.start(lambda: prepare(args), args.device, args.collective) as (comm, source):
        if isinstance(source, Benchmark):
            from model.inference import load_predictor

            write_submission(
                source, args.submission, load_predictor(args.ckpt, args.backend, args.precision), args.batch, comm
            )
        else:
            if comm.size == 1:  # MindSpore turns Ctrl-C into SIGTERM
                signal.signal(signal.SIGTERM, signal.default_int_handler)
            evaluate_checkpoint(args, source, comm)


def prepare(args: argparse.Namespace) -> tuple[dict[str, str], reader.DatasetSplit | Benchmark]:
    """Check on every rank all that can be checked before MindSpore starts; sets `args.out` unless it is given.

    Returns:
        The settings that must be the same on all ranks, and what to predict: a split, or a test set to submit.

    Raises:
        UserError: an option is invalid, or a file is missing or damaged.
    """
    for option, value, least in (("--batch", args.batch, 1), ("--pictures", args.pictures, 0)):
        if value < least:
            raise UserError(f"{option} is {value}, expected at least {least}")
    if bool(args.submission) != bool(args.root) or bool(args.submission) == bool(args.data):
        raise UserError("give --data DIR to evaluate, or --submission DIR and --root DIR to write a submission")
    if not args.ckpt.is_file():
        raise UserError(f"{args.ckpt}: no such checkpoint file; give an existing one")
    if args.data and not args.out:
        args.out = args.ckpt.with_name(f"{args.ckpt.stem}-{args.data.resolve().name}-{args.split}")
    for folder in (args.out, args.submission):
        if folder and folder.exists() and not folder.is_dir():
            raise UserError(f"{folder}: is a file; expected a folder to write to")
    settings = {"checkpoint": hashlib.sha256(args.ckpt.read_bytes()).hexdigest()}
    if args.submission:
        benchmark = list_test_pairs(args.root)
        _ = benchmark.by_size  # fails if the images of a pair differ in size
        if ranks.current().rank == 0:
            check_out(args.submission, benchmark)
        files = "\n".join(pair.file for pair in benchmark.pairs)
        return {**settings, "test set": hashlib.sha256(files.encode()).hexdigest()}, benchmark
    split = reader.DatasetSplit.open(args.data, args.split)
    if not len(split):
        manifest = Manifest.load(args.data)
        others = " or ".join(sorted(filter(manifest.has_ground_truth, manifest.splits)))
        remedy = f"evaluate on another one: --split {others}" if others else "no other split has ground truth"
        raise UserError(f"{args.data}: split {args.split} has no pairs; {remedy}")
    if not split.labelled.any():
        raise UserError(
            f"{args.data}: no pair of split {args.split} has ground truth to evaluate on; to see the flow of these "
            "frames, predict it: model/predict.py"
        )
    return {**settings, "data": hash_manifest(args.data)}, split


def evaluate_checkpoint(args: argparse.Namespace, split: reader.DatasetSplit, comm: Communicator) -> None:
    """Evaluate a checkpoint as the command line says; print the table and write metrics and pictures."""
    from model.inference import load_predictor
    from prep.flow_viz import save_png

    predictor = load_predictor(args.ckpt, args.backend, args.precision)
    if comm.rank == 0:
        args.out.mkdir(parents=True, exist_ok=True)
    spread = np.unique(np.linspace(0, len(split) - 1, args.pictures).astype(int)).tolist()
    share = count_share(split, args.batch, comm)
    options = EvaluationOptions(args.batch, spread, args.pictures)
    with progress.bar(total=share, unit="pair", disable=comm.rank != 0) as bar:
        evaluation = evaluate(predictor, split, comm, options, bar.update)
    strips = report.gather_strips(evaluation, comm)
    if comm.rank != 0:
        return
    result = report.make_report(split, evaluation)
    report.write_metrics(args.out, result, evaluation, args.ckpt)
    files = ["evaluation.json", "evaluation.md"]
    for name, chosen in (("flow.png", spread), ("worst.png", evaluation.worst)):
        if chosen:
            save_png(args.out / name, report.draw_pairs(split, evaluation, strips, chosen))
            files.append(name)
        else:  # a picture of an earlier evaluation would look like one of this
            (args.out / name).unlink(missing_ok=True)
    print(result.table())
    print(
        f"\nresults: {', '.join(files)} in {args.out}; to predict other images: "
        f"python model/predict.py IMG1 IMG2 --ckpt {args.ckpt} --out flow"
    )


if __name__ == "__main__":
    run(main)
