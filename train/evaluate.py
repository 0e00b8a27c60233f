#!/usr/bin/env python3
"""Evaluation: end-point error over a split, as a table, JSON and pictures.

python train/evaluate.py --data DIR --split val --ckpt FILE [--out DIR] [--pictures N] [--batch N]
"""

import os
import sys

if __name__ == "__main__":  # run as a file: import the packages, not this file's neighbours
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import pathlib

import numpy as np

from launch import cluster
from prep.errors import UserError, run


def evaluate(network, split, *, batch=1, rank=0, ranks=1, pictures=(), on_batch=None):
    """Evaluate a network on every pair of a split, shared by all ranks.

    Args:
        network: a `model.pwcnet.PWCNet`.
        split: an opened split, a `prep.reader.Split`.
        batch: pairs at a time, on each rank.
        rank, ranks: this process and how many call this together.
        pictures: positions in the split whose flow is wanted.
        on_batch: called with the number of pairs after each batch.

    Returns:
        A dict with `epe` and `zero_epe` (float32 arrays, one number a pair in the split's order:
        mean end-point error in pixels of the network and of a flow of zero; nan where no flow is
        known) and `samples`, position to (image 1, true flow with nan where unknown, predicted flow)
        of the wanted pairs that this rank had.
    """
    import mindspore

    from model.metrics import mean_epe
    from model.pwcnet import FlowPredictor
    from prep import reader

    predictor = FlowPredictor(network)
    predictor.set_train(False)
    sums = np.zeros((2, len(split)), np.float32)
    samples = {}
    batches = reader.evaluation_batches(split, batch=batch, rank=rank, ranks=ranks)
    for image1, image2, flow, valid, index in batches:
        predicted = predictor(mindspore.Tensor(image1), mindspore.Tensor(image2)).asnumpy()
        for i, position in enumerate(index):
            if position < 0:  # fills up the last batch
                continue
            sums[0, position] = mean_epe(predicted[i], flow[i], valid[i])
            sums[1, position] = mean_epe(np.zeros_like(flow[i]), flow[i], valid[i])
            if position in pictures:
                known = np.where(valid[i][..., None] > 0, flow[i], np.float32(np.nan))
                samples[int(position)] = (image1[i], known, predicted[i])
        if on_batch:
            on_batch(int((index >= 0).sum()))
    if ranks > 1:
        # Each rank has zeros for the pairs of the others: the sum is exact, whatever the ranks.
        sums = cluster.all_reduce(sums)
    return {"epe": sums[0], "zero_epe": sums[1], "samples": samples}


def summarize(result):
    """Means over the pairs: dict of pairs, epe, zero_epe (pixels) and their ratio."""
    epe = float(np.nanmean(result["epe"], dtype=np.float64))
    zero_epe = float(np.nanmean(result["zero_epe"], dtype=np.float64))
    return {"pairs": len(result["epe"]), "epe": epe, "zero_epe": zero_epe,
            "ratio": epe / zero_epe if zero_epe else float("nan")}


def table(split, summary):
    """The summary of an opened split as lines of text."""
    sizes = sorted({f"{height}x{width}" for height, width in split.sizes.tolist()})
    return "\n".join([
        f"{split.dataset} {split.name}: {summary['pairs']} pairs of {', '.join(sizes)}",
        "              EPE (px)   of zero flow",
        f"  zero flow   {summary['zero_epe']:8.3f}   {1:12.3f}",
        f"  PWC-Net     {summary['epe']:8.3f}   {summary['ratio']:12.3f}",
    ])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, type=pathlib.Path, metavar="DIR",
                        help="a folder that prep/convert.py made")
    parser.add_argument("--split", default="val", metavar="NAME",
                        help="train, val (the default) or, of Sintel, one such as val-clean")
    parser.add_argument("--ckpt", required=True, type=pathlib.Path, metavar="FILE",
                        help="a checkpoint of a run, or network weights")
    parser.add_argument("--out", type=pathlib.Path, metavar="DIR",
                        help="for the JSON and the pictures; default: beside the checkpoint")
    parser.add_argument("--pictures", type=int, default=8, metavar="N",
                        help="how many pairs to draw, spread over the split (default 8)")
    parser.add_argument("--batch", type=int, default=1, metavar="N",
                        help="pairs at a time (default 1)")
    args = parser.parse_args()
    if args.batch < 1 or args.pictures < 0:
        raise UserError("--batch must be at least 1 and --pictures at least 0")
    if not args.ckpt.is_file():
        raise UserError(f"{args.ckpt}: no such checkpoint file")

    with cluster.joined(lambda: ({}, None)):
        report(args)


def report(args):
    """Evaluate as the command line says; print the table, write JSON and pictures."""
    from model.weights import load_network
    from prep import progress, reader
    from prep.picture import save_png, sheet, strip
    from prep.shards import write_json

    split = reader.Split.open(args.data, args.split)
    names = split.names
    network = load_network(args.ckpt)
    out = args.out or args.ckpt.with_name(f"{args.ckpt.stem}-{args.split}")
    out.mkdir(parents=True, exist_ok=True)
    wanted = np.unique(np.linspace(0, len(names) - 1, args.pictures).astype(int)).tolist()
    with progress.bar(total=len(names), unit="pair") as bar:
        result = evaluate(network, split, batch=args.batch, pictures=wanted,
                          on_batch=bar.update)
    summary = summarize(result)
    details = [{"pair": name, "epe": float(epe), "zero_epe": float(zero_epe)}
               for name, epe, zero_epe in zip(names, result["epe"], result["zero_epe"])]
    figures = {"data": str(args.data), "split": args.split, "checkpoint": str(args.ckpt),
               **summary, "by_pair": details}
    write_json(out / "evaluation.json", figures)
    print(table(split, summary))
    print(f"figures:  {out / 'evaluation.json'}")
    if wanted:
        captions = [f"{names[i]}: EPE {result['epe'][i]:.2f} px, "
                    f"zero flow {result['zero_epe'][i]:.2f} px" for i in wanted]
        strips = [strip(*result["samples"][i]) for i in wanted]
        save_png(out / "flow.png", sheet(strips, captions))
        print(f"pictures: {out / 'flow.png'}")


if __name__ == "__main__":
    run(main)
