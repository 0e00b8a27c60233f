"""python -m model.native cpu|gpu: build the operators, unless the cache has them, and print the library's path.

Building for GPUs needs nvcc, but no GPU.
"""

import argparse
import pathlib
import shutil

from launch.errors import UserError, run
from model.native.build import TARGETS, BuildError, build_library, bundled_name


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m model.native", description=__doc__)
    parser.add_argument("device", choices=[device.lower() for device in TARGETS], help="what to build for")
    parser.add_argument(
        "--bundle",
        type=pathlib.Path,
        metavar="DIR",
        help="copy the library for GPUs into this folder, under the name that an environment is searched for "
        "(default: only build it)",
    )
    args = parser.parse_args()
    if args.bundle and args.device != "gpu":
        parser.error("--bundle is for gpu: the library for the CPU fits one processor only")
    try:
        path = build_library(TARGETS[args.device.upper()]())
    except BuildError as reason:
        raise UserError(str(reason)) from None
    if args.bundle:
        path = pathlib.Path(shutil.copy2(path, args.bundle / bundled_name()))
    print(path)


if __name__ == "__main__":
    run(main)
