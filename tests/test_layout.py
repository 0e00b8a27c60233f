"""The layout of the code: which folder may import which, and commands that run in any folder."""

import ast
import pathlib
import subprocess
import sys

import pytest
import tiny

FOLDERS = ("launch", "prep", "model", "train")
"""From the lowest to the highest: no folder imports one that comes after it."""


def imported_packages(path: pathlib.Path) -> set[str]:
    """Top-level packages that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_folder_imports_a_higher_one(folder: str) -> None:
    """launch < prep < model < train, and none of them imports the tests."""
    forbidden = {*FOLDERS[FOLDERS.index(folder) + 1 :], "tests"}
    sources = list((tiny.ROOT / folder).rglob("*.py"))
    assert sources
    wrong = {str(path): names for path in sources if (names := imported_packages(path) & forbidden)}
    assert not wrong


COMMANDS = [path for folder in FOLDERS for path in sorted((tiny.ROOT / folder).glob("*.py"))]
COMMANDS = [path for path in COMMANDS if path.read_text().startswith("#!")]


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_command_does_not_depend_on_the_folder_it_is_in(path: pathlib.Path) -> None:
    """Its neighbours do not shadow modules: prep/inspect.py has the name of one in the standard library."""
    for options in ([], ["-P"] if sys.version_info >= (3, 11) else []):
        done = subprocess.run(
            [sys.executable, *options, path.name, "--help"],
            cwd=path.parent,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "usage: " in done.stdout and not done.stderr
