"""Whether this interpreter's environment holds what setup.cfg asks for.

python launch/requirements.py [EXTRA ...]: prints what is missing; exit status 0 if nothing is. It
uses the standard library and, where there is one, MindSpore's dependency `packaging`, so that it
runs in an environment that is still empty.
"""

import argparse
import configparser
import importlib.metadata
import pathlib
import sys

SETUP = pathlib.Path(__file__).resolve().parent.parent / "setup.cfg"


def read_setup() -> configparser.ConfigParser:
    """What setup.cfg says."""
    config = configparser.ConfigParser()
    config.read(SETUP, encoding="utf-8")
    return config


def wanted(extras):
    """The requirements of the package and of its extras, as texts."""
    config = read_setup()
    lists = [config["options"]["install_requires"]]
    lists += [config["options.extras_require"][extra] for extra in extras]
    return [line.strip() for text in lists for line in text.splitlines() if line.strip()]


def missing(requirements):
    """Those that are not installed, or not in the wanted version."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return requirements
    found = []
    for text in requirements:
        requirement = Requirement(text)
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            version = None
        if version is None or version not in requirement.specifier:
            found.append(text)
    return found


def main() -> int:
    """Print what is missing; the exit status."""
    known = list(read_setup()["options.extras_require"])
    parser = argparse.ArgumentParser(
        description="Print what setup.cfg asks for and this environment lacks; exit status 0 if nothing, 1 otherwise."
    )
    parser.add_argument("extras", nargs="*", metavar="EXTRA", help=f"of: {', '.join(known)}")
    extras = parser.parse_args().extras
    if unknown := [extra for extra in extras if extra not in known]:
        parser.error(f"setup.cfg has no extra {unknown[0]}; expected some of: {', '.join(known)}")
    lacking = missing(wanted(extras))
    print("\n".join(lacking))
    return int(bool(lacking))


if __name__ == "__main__":
    sys.exit(main())
