"""The README's Python examples run as they are shown."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import textwrap

import pytest
import tiny

from prep import synthesize

README = (tiny.ROOT / "README.md").read_text()
SMALL = '"steps=2", "batch=2", "crop=[64,64]"'
ARRAYS = "import numpy\nimage1, image2 = numpy.random.default_rng(0).integers(0, 255, (2, 90, 130, 3), numpy.uint8)\n"


def run_example(number: int, folder: pathlib.Path, before: str = "", after: str = "", **changes: str) -> str:
    """Run an example of the section "From Python" in a folder; returns what it prints."""
    section = README.partition("## From Python")[2].partition("\n## ")[0]
    blocks = re.findall(r"(?:^ {4}.*\n(?:\n(?= {4}))?)+", section, re.MULTILINE)
    code = textwrap.dedent(blocks[number])
    for old, new in changes.items():
        assert old in code
        code = code.replace(old, new)
    environment = {**os.environ, "PYTHONPATH": str(tiny.ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", before + code + after],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with the data that the examples name."""
    folder = tmp_path_factory.mktemp("readme")
    synthesize.write_dataset(folder / "raw", synthesize.SyntheticSpec(12, 64, 96, seed=1), workers=2)
    split = tiny.split_file(folder / "val.txt", [3])
    converted = tiny.convert(
        "flyingchairs", folder / "raw", folder / "data" / "example-mindrecord", "--split-file", split
    )
    shutil.copytree(converted, folder / "data" / "chairs")
    return folder


@pytest.mark.slow
def test_the_examples_train_and_use_a_network(folder: pathlib.Path) -> None:
    """Two steps of training by the last example, on small pairs, make the checkpoint that the first one loads."""
    assert re.search(r"validation EPE \d+\.\d{3} px", run_example(2, folder, **{'"steps=100"': SMALL}))
    (folder / "runs" / "script").rename(folder / "runs" / "example")
    assert run_example(0, folder, ARRAYS, "print(flow.shape, flow.dtype)\n").split("\n")[-2] == "(90, 130, 2) float32"


def test_the_example_reads_a_dataset(folder: pathlib.Path) -> None:
    """Eleven training pairs make one batch of eight."""
    shapes = "    print(image1.shape, image1.dtype, flow.shape, flow.dtype, valid.shape)\n"
    printed = run_example(1, folder, "rank, ranks = 0, 1\n", shapes, **{"    ...\n": ""})
    assert printed == "(8, 64, 96, 3) UInt8 (8, 64, 96, 2) Float32 (8, 64, 96)\n"
