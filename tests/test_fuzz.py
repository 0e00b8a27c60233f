"""A short run of the fuzzer: damaged and hostile files lead to nothing but errors."""

import base64
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
import tiny

PARSERS = (
    "flo", "pfm", "kitti-png", "npy", "npz", "mask", "zip", "tar", "tar-gz",
    "png", "jpeg", "ppm", "webp", "tiff", "bmp", "record", "shard", "manifest", "list",
)  # fmt: skip
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


ENDLESS_INDEX = (
    "c-l)~fPiYHjMT)G)S~#}%&Jr+D+N<SBOL{$g2ePxn24FFsj(SQtT-dFC?!5IC8a2}xHz>KC=;zzQk0mPr)vNLy7_5fhM`_=W*$&Ya(+>YQf#fl"
    "D4-fxKt;2H1AQ_}QWetji*gf76pR^|7#JBD9269QNrDNAVSo{cS<v`|026~=G9xcYF{2{`5Dh=j_#Xo58JqkgT!TrDfcl}9`bJX>r76aSkzHI`"
    "8kk;65|eULJzasx#?#LQL@_xBxjKfpDug&X`M4@T1vP^F!{a?&fZPxrg#br)S0E=o$T1vAz~9X+*fj)65Y+~VIn=fTRWRPw4^6w1kG~V9Qrx026"
    "Es1w&&+s*f$<CDQy?`603*XFpa}3Yb1-r;GIB66F=^N^oM6=9W#Zrj2{1B=XrwTl;9}(9;N$=jj3OzBbm~ZXI^`iHozgq4g6fT75V;BfCwCLn"
)
"""A shard and its index with lengths that SQLite reports as a lack of memory; the fuzzer found it (zlib, base85)."""


def test_impossible_lengths_in_an_index_are_an_error(tmp_path: Path) -> None:
    """And not a MemoryError, which would mean that this machine is too small."""
    file = tmp_path / "input"
    file.write_bytes(zlib.decompress(base64.b85decode(ENDLESS_INDEX)))
    done = run_fuzz("--parser", "shard", "--file", file)
    assert (
        "UserError" in done.stderr and "not a shard of 3 pairs" in done.stderr and "impossible lengths" in done.stderr
    )


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
