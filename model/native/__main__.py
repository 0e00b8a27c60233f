"""python -m model.native cpu|gpu: build the operators here, unless that was done, and print the
library's path. The GPU's needs no GPU to be built."""

import argparse

from launch.errors import UserError, run
from model.native import BUILDERS, Unavailable, build


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m model.native", description=__doc__)
    parser.add_argument("device", type=str.upper, choices=sorted(BUILDERS))
    try:
        print(build(*BUILDERS[parser.parse_args().device]()))
    except Unavailable as reason:
        raise UserError(str(reason)) from None


if __name__ == "__main__":
    run(main)
