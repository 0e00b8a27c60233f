"""Your own pairs: a list of files as CSV, TSV or JSON lines, one pair in a row.

Columns: image1, image2 and, optionally, flow, valid, occluded, split and name. An empty value is a missing one.
"""

import csv
import difflib
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launch.errors import UserError, counted, one_line
from prep.archive import ReleasePath
from prep.datasets import NoRelease, PairFiles, check_folder

REQUIRED = ("image1", "image2")
FILES = ("image1", "image2", "flow", "valid", "occluded")
COLUMNS = (*FILES, "split", "name")
SPLITS = ("train", "val")
VALIDATION_BLOCK = 100
"""Number of pairs in a block, of which `--val-share` holds out the last ones."""

EXAMPLE = """\
image1,image2,flow,valid,occluded,split,name
street/frame_0001.png,street/frame_0002.png,street/flow_0001.flo,street/valid_0001.png,street/occ_0001.png,train,street/1
street/frame_0002.png,street/frame_0003.png,street/flow_0002.flo,,,train,street/2
street/frame_0003.png,street/frame_0004.png,,,,train,street/3
garden/frame_0001.jpg,garden/frame_0002.jpg,garden/flow_0001.npy,,,val,garden/1
"""
"""A list to start from; its third pair has no ground truth."""


@dataclass(frozen=True)
class Row:
    """A row of a list: its values by column, without empty ones."""

    line: int
    """Number of the line in the file, from 1."""
    values: dict[str, str]


@dataclass(frozen=True)
class PairList:
    """A list of pairs, and which of them are held out."""

    file: Path
    val_share: float | None = None
    """Share of the pairs to hold out, for a list without a 'split' column."""
    nan_is_unknown: bool = False
    split_file: bool = False
    """Whether a file chooses the pairs to hold out."""

    def list_pairs(self, root: ReleasePath, render_pass: str) -> list[PairFiles]:
        """The pairs in the order of the list, whose paths are relative to `root`.

        Raises:
            NoRelease: its first file is missing, so the files may be elsewhere, such as in an archive.
            UserError: the list is damaged, a row contradicts another one, or another file is missing.
        """
        check_folder(root, f"the files that {self.file.name} lists")
        rows = read_rows(self.file)
        option = "--split-file" if self.split_file else "--val-share" if self.val_share is not None else None
        if option and any("split" in row.values for row in rows):
            raise UserError(f"{self.file}: has a 'split' column; remove {option} or the column")
        pairs, lines = [], {}
        for row in rows:
            pair = self._make_pair(row, root, first=not pairs)
            if pair.name in lines:
                raise UserError(
                    f"{pair.row}: the name {pair.name!r} is already that of line {lines[pair.name]}; give each pair "
                    "its own in the column name"
                )
            lines[pair.name] = row.line
            pairs.append(pair)
        return hold_out(pairs, self.val_share) if self.val_share else pairs

    def _make_pair(self, row: Row, root: ReleasePath, *, first: bool) -> PairFiles:
        where, values = f"{self.file}, line {row.line}", row.values
        for column in REQUIRED:
            if column not in values:
                raise UserError(f"{where}: {column} is empty; a pair needs {' and '.join(REQUIRED)}")
        if "flow" not in values and (masks := [column for column in ("valid", "occluded") if column in values]):
            raise UserError(f"{where}: has {' and '.join(masks)} but no flow; add the flow, or leave the masks out")
        if values.get("split", SPLITS[0]) not in SPLITS:
            raise UserError(f"{where}: split is {values['split']!r}, expected {' or '.join(SPLITS)}")
        files = {column: root / values[column] for column in FILES if column in values}
        for column, path in files.items():
            if problem := check_file(path):
                raise (NoRelease if first and column == FILES[0] else UserError)(
                    f"{where}: {column} {path}: {problem}; paths are relative to --root, by default the folder of "
                    "the list"
                )
        return PairFiles(
            name=values.get("name") or os.path.splitext(values["image1"])[0],
            image1=files["image1"],
            image2=files["image2"],
            flow=files.get("flow"),
            valid=files.get("valid"),
            occluded=files.get("occluded"),
            held_out=values.get("split") == "val",
            nan_is_unknown=self.nan_is_unknown,
            row=where,
        )


def hold_out(pairs: list[PairFiles], share: float) -> list[PairFiles]:
    """Mark a share of the pairs for validation: of those with flow, if there are any.

    It takes the last pairs of each block of about VALIDATION_BLOCK. Neighbours are often frames of one video, so with
    single pairs from everywhere, the network would be validated on what it has seen; a block comes from one place, but
    many blocks together represent the list.
    """
    candidates = [i for i, pair in enumerate(pairs) if pair.flow] or list(range(len(pairs)))
    blocks = max(1, len(candidates) // VALIDATION_BLOCK)
    ends = [len(candidates) * block // blocks for block in range(blocks + 1)]
    chosen: set[int] = set()
    for begin, end in itertools.pairwise(ends):
        number = min(max(1, round(share * (end - begin))), end - begin - 1)
        chosen.update(candidates[end - number : end])
    return [replace(pair, held_out=i in chosen) for i, pair in enumerate(pairs)]


def check_file(path: ReleasePath) -> str:
    """What is wrong with a path that should be a file's; "" if nothing is."""
    try:
        if path.is_file():
            return ""
        return "is a folder, expected a file" if path.is_dir() else "no such file"
    except OSError:  # such as a name that is too long
        return "no such file"


# --- Parsing --------------------------------------------------------------------------------------


def hash_list(path: Path) -> str:
    """SHA-256 of a list's bytes, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_rows(path: Path) -> list[Row]:
    """Read a list, whose format its content tells: JSON lines, or a table separated by tabs, commas or semicolons.

    Raises:
        UserError: it is not text, has no rows, or a column or value is wrong; the message names the line.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")  # Excel writes a byte order mark
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text ({one_line(error)}); save the list as UTF-8") from None
    lines = re.split(r"\r\n|\r|\n", text)
    first = next((line for line in lines if line.strip()), "")
    if first.lstrip().startswith("["):
        raise UserError(f"{path}: begins with '[' like a JSON array; expected one JSON object per line, or a table")
    read = _read_json_lines if first.lstrip().startswith("{") else _read_table
    rows = list(read(path, lines))
    if not rows:
        raise UserError(f"{path}: lists no pairs; expected rows with {', '.join(COLUMNS)} (pairs --example)")
    return rows


def _read_json_lines(path: Path, lines: list[str]) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line, object_pairs_hook=_unique_keys)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: not valid JSON ({one_line(error)})") from None
        if not isinstance(values, dict):
            raise UserError(f"{path}, line {number}: expected a JSON object, as in the first line")
        check_columns(f"{path}, line {number}", list(values))
        for column, value in values.items():
            if value is not None and not isinstance(value, str):
                raise UserError(
                    f"{path}, line {number}: {column} is {one_line(repr(value), 40)}, expected text or null"
                )
        yield Row(number, _without_empty(values))


def _unique_keys(items: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(items)) != len(items):
        raise ValueError("a key is given twice")
    return dict(items)


def _read_table(path: Path, lines: list[str]) -> Iterator[Row]:
    header = next((line for line in lines if line.strip()), "")
    delimiter = next((mark for mark in "\t,;" if mark in header), ",")
    columns: list[str] = []
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        try:  # a line at a time, so that a stray quotation mark does not swallow the following ones
            cells = [cell.strip() for cell in next(csv.reader([line], delimiter=delimiter, strict=True), [])]
        except csv.Error as error:
            raise UserError(f"{where}: not a valid table ({one_line(error)})") from None
        if not any(cells):
            continue
        if not columns:
            columns = cells
            check_columns(where, columns)
        elif len(cells) == len(columns):
            yield Row(number, _without_empty(dict(zip(columns, cells, strict=True))))
        else:
            raise UserError(
                f"{where}: has {counted(len(cells), 'value')}, expected {len(columns)} as in the header; a value that "
                f"contains {delimiter!r} must be in quotation marks"
            )


def _without_empty(values: dict[str, str | None]) -> dict[str, str]:
    return {column: value for column, value in values.items() if value}


def check_columns(where: str, columns: list[str]) -> None:
    """Raise UserError if a required column is missing, or one is unknown or given twice."""
    for column in columns:
        if column not in COLUMNS:
            near = difflib.get_close_matches(column, COLUMNS, 1)
            hint = f"did you mean {near[0]}?" if near else f"expected {', '.join(COLUMNS)} (pairs --example)"
            raise UserError(f"{where}: unknown column {one_line(repr(column), 40)}; {hint}")
        if columns.count(column) > 1:
            raise UserError(f"{where}: has two columns {column}; remove one")
    if missing := [column for column in REQUIRED if column not in columns]:
        raise UserError(
            f"{where}: has no column {' and '.join(missing)}; expected {', '.join(COLUMNS)} (pairs --example), of "
            f"which {' and '.join(REQUIRED)} are required"
        )
