"""A short run of the fuzzer: damaged and hostile files lead to nothing but errors."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny

PARSERS = ("flo", "pfm", "kitti-png", "png", "jpeg", "ppm", "bmp", "record", "shard", "manifest")
PROGRAM = tiny.ROOT / "tests" / "bench" / "fuzz.py"


def run_fuzz(*options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, PROGRAM, *options]
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300)


def rows_of(table: str) -> list[dict[str, str]]:
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if "|" in line]
    return [dict(zip(lines[0], cells, strict=True)) for cells in lines[2:]]


def test_no_parser_fails_on_2000_damaged_inputs(tmp_path: Path) -> None:
    """No other exception, crash, long wait, large allocation or output."""
    pytest.importorskip("h5py")
    done = run_fuzz("--inputs", 2000, "--failures", tmp_path, "--parser", *PARSERS, "flo5")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = rows_of(done.stdout)
    assert [row["parser"] for row in rows] == [*PARSERS, "flo5"]
    for row in rows:
        assert row["inputs"] == "2,000" and row["failures"] == "0"
        assert int(row["accepted"]) > 0 and int(row["rejected"].replace(",", "")) > 1000


BROKEN = {
    "another exception": "raise KeyError('x')",
    "a crash": "__import__('os').kill(__import__('os').getpid(), 11)",
    "no end": "while True: pass",
    "memory": "bytearray(200 << 20).count(1)",
    "a hidden lack of memory": """
            try:
                bytearray(1 << 40)
            except Exception:
                raise errors.UserError("damaged") from None""",
    "a line on the terminal": "__import__('os').write(2, b'libpng error')",
    "two lines": "raise errors.UserError('a\\nb')",
}


@pytest.mark.parametrize("what", BROKEN)
def test_the_fuzzer_detects_every_kind_of_misbehaviour(tmp_path: Path, what: str) -> None:
    """It detects a parser that misbehaves for everything but the valid file."""
    script = f"""if True:
        import sys
        sys.argv[0] = {str(PROGRAM)!r}
        sys.path.insert(0, {str(PROGRAM.parent)!r})
        import dataclasses, fuzz
        from launch import errors
        (VALID,) = fuzz.flow_seeds(".flo")
        def parse(path, data):
            if data == VALID:
                return
            {BROKEN[what]}
            raise errors.UserError("damaged")
        fuzz.PARSERS["flo"] = dataclasses.replace(fuzz.PARSERS["flo"], parse=parse)
        fuzz.LIMIT_S = 0.5
        fuzz.MOST_FAILURES = 1
        fuzz.main()
    """
    options = ["--inputs", "100", "--parser", "flo", "--failures", tmp_path]
    command = [sys.executable, "-c", script, *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done.stdout + done.stderr
    (row,) = rows_of(done.stdout)
    assert int(row["failures"]) > 0
    saved = [path for path in (tmp_path / "flo").iterdir() if path.suffix == ".flo"]
    assert saved and f"--parser flo --file {saved[0]}" in done.stdout
