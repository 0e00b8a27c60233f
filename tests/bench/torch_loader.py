"""A PyTorch DataLoader on raw FlyingChairs files, the peer of read.py, which runs it.

It needs PyTorch and NumPy only, so that it can run in an interpreter of its own. For each line on
stdin it reads one epoch and prints the pairs/s after the first batches.
"""

import argparse
import os
import sys
import time
from typing import Any

import numpy as np
import torch


class Pairs(torch.utils.data.Dataset):
    """Pairs of a folder, randomly cropped, as float tensors (C, H, W) or as they are."""

    def __init__(self, folder: str, height: int, width: int, as_float: bool) -> None:
        self.stems = sorted(
            os.path.join(folder, name[:-9]) for name in os.listdir(folder) if name.endswith("_flow.flo")
        )
        self.size, self.as_float = (height, width), as_float

    def __len__(self) -> int:
        return len(self.stems)

    def __getitem__(self, index: int) -> list[Any]:
        stem = self.stems[index]
        one, two = read_ppm(stem + "_img1.ppm"), read_ppm(stem + "_img2.ppm")
        flow = np.fromfile(stem + "_flow.flo", np.float32, offset=12).reshape(*one.shape[:2], 2)
        y, x = (np.random.randint(whole - part + 1) for whole, part in zip(one.shape, self.size, strict=False))
        cut = [a[y : y + self.size[0], x : x + self.size[1]] for a in (one, two, flow)]
        if self.as_float:
            return [torch.from_numpy(np.ascontiguousarray(a.transpose(2, 0, 1))).float() for a in cut]
        return [torch.from_numpy(np.ascontiguousarray(a)) for a in cut]


def read_ppm(path: str) -> np.ndarray:
    """A PPM file with a header of three lines, uint8 (H, W, 3)."""
    with open(path, "rb") as file:
        file.readline()
        width, height = map(int, file.readline().split())
        file.readline()
        return np.frombuffer(file.read(), np.uint8).reshape(height, width, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure a PyTorch DataLoader on raw FlyingChairs files.")
    parser.add_argument("folder")
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--crop", type=int, nargs=2, required=True)
    parser.add_argument("--skip", type=int, required=True, help="batches before the clock starts")
    parser.add_argument("--float", action="store_true")
    options = parser.parse_args()
    loader = torch.utils.data.DataLoader(
        Pairs(options.folder, options.crop[0], options.crop[1], options.float), options.batch, shuffle=True,
        num_workers=options.workers, drop_last=True, persistent_workers=options.workers > 0,
    )  # fmt: skip
    for _ in sys.stdin:
        number, start = 0, time.perf_counter()
        for number, _ in enumerate(loader, 1):
            if number == options.skip:
                start = time.perf_counter()
        print((number - options.skip) * options.batch / (time.perf_counter() - start), flush=True)


if __name__ == "__main__":
    main()
