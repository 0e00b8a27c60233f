"""Checks that this interpreter's environment has the packages that setup.cfg requires.

python launch/requirements.py [EXTRA ...] prints what is missing; exit status 0 if nothing is. It also runs in an
empty environment: it needs only the standard library, and uses `packaging`, a dependency of MindSpore's, if present.
"""

import argparse
import configparser
import importlib.metadata
import pathlib
import sys
from collections.abc import Iterable

SETUP = pathlib.Path(__file__).resolve().parent.parent / "setup.cfg"


def read_setup() -> configparser.ConfigParser:
    """Read setup.cfg."""
    config = configparser.ConfigParser()
    config.read(SETUP, encoding="utf-8")
    return config


def required(extras: Iterable[str]) -> list[str]:
    """The requirements of the package and of some extras, such as "numpy < 2"."""
    config = read_setup()
    lists = [config["options"]["install_requires"]]
    lists += [config["options.extras_require"][extra] for extra in extras]
    return [line.strip() for text in lists for line in text.splitlines() if line.strip()]


def missing(requirements: Iterable[str]) -> list[str]:
    """The requirements that are not met: package not installed, or another version."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return list(requirements)
    unmet = []
    for text in requirements:
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate():
            continue  # for another platform
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            version = None
        if version is None or version not in requirement.specifier:
            unmet.append(text)
    return unmet


def main() -> int:
    """Print what is missing; returns the exit status."""
    known = list(read_setup()["options.extras_require"])
    parser = argparse.ArgumentParser(
        description="Print the packages that setup.cfg requires and this environment lacks; exit status 1 if any."
    )
    parser.add_argument("extras", nargs="*", metavar="EXTRA", help=f"extras to check as well: {', '.join(known)}")
    extras = parser.parse_args().extras
    if unknown := [extra for extra in extras if extra not in known]:
        parser.error(f"setup.cfg has no extra {unknown[0]}; expected any of: {', '.join(known)}")
    unmet = missing(required(extras))
    print("\n".join(unmet))
    return int(bool(unmet))


if __name__ == "__main__":
    sys.exit(main())
