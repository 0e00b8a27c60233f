"""python -m model.native cpu|gpu: build the operators, unless the cache has them, and print the library's path.

Building for GPUs needs nvcc, but no GPU.
"""

import argparse

from launch.errors import UserError, run
from model.native.build import TARGETS, BuildError, build_library


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m model.native", description=__doc__)
    parser.add_argument("device", choices=[device.lower() for device in TARGETS], help="what to build for")
    args = parser.parse_args()
    try:
        print(build_library(TARGETS[args.device.upper()]()))
    except BuildError as reason:
        raise UserError(str(reason)) from None


if __name__ == "__main__":
    run(main)
