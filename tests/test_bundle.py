"""launch/bundle.sh: GPU code is found and blanked exactly, and a bundle installs without a network."""

import argparse
import base64
import errno
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import lz4.block
import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch import bundle, fatbin
from launch.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parent.parent
MODULE = "bundled_module"
CODE = st.tuples(
    st.sampled_from((fatbin.PTX, fatbin.CUBIN)), st.sampled_from((60, 75, 80, 86, 90)), st.binary(max_size=40)
)


def encode(entries: list[tuple[int, int, bytes]]) -> bytes:
    """A fat binary with these (kind, architecture, payload)."""
    body = b"".join(
        fatbin.ENTRY.pack(kind, 257, 64, len(payload), 0, 0, 0, 0, architecture).ljust(64, b"\0") + payload
        for kind, architecture, payload in entries
    )
    return fatbin.HEADER.pack(fatbin.MAGIC, 1, fatbin.HEADER.size, len(body)) + body


@given(st.lists(st.tuples(st.binary(max_size=30), st.lists(CODE, min_size=1, max_size=6)), max_size=4))
def test_only_code_that_the_gpu_never_loads_is_blanked(parts: list[tuple[bytes, list[tuple[int, int, bytes]]]]) -> None:
    """Everything else keeps its bytes and its place, also what lies between two fat binaries."""
    data = bytearray(b"".join(text + encode(entries) for text, entries in parts))
    expected = bytearray()
    for text, entries in parts:
        cubins = [architecture for kind, architecture, _ in entries if kind == fatbin.CUBIN and architecture == 90]
        ptx = [architecture for kind, architecture, _ in entries if kind == fatbin.PTX]
        kept = (fatbin.CUBIN, 90) if cubins else (fatbin.PTX, max(ptx, default=0))
        expected += text + encode([(k, a, p if (k, a) == kept else bytes(len(p))) for k, a, p in entries])
    fatbin.blank_unused(data, [90])
    assert data == expected


@given(st.binary(max_size=60), st.integers(0, 60))
def test_damaged_fat_binaries_are_left_alone(junk: bytes, cut: int) -> None:
    """A magic number in other data, or a cut header, does not raise and changes nothing."""
    data = bytearray(junk + encode([(fatbin.CUBIN, 60, b"code")])[:cut])
    before = bytes(data)
    assert fatbin.blank_unused(data, [90]) == 0
    assert data == before


def test_each_gpu_keeps_the_code_that_it_loads() -> None:
    """Machine code of the GPU's own major version, else the newest PTX that is not newer than the GPU."""
    entries = [
        fatbin.Entry(fatbin.CUBIN, 80, 0, 0, 1),
        fatbin.Entry(fatbin.PTX, 60, 0, 1, 1),
        fatbin.Entry(fatbin.PTX, 86, 0, 2, 1),
    ]
    assert fatbin.needed(entries, [80]) == fatbin.needed(entries, [89]) == {(fatbin.CUBIN, 80)}
    assert fatbin.needed(entries, [90]) == {(fatbin.PTX, 86)}
    assert fatbin.needed(entries, [70]) == {(fatbin.PTX, 60)}
    assert fatbin.needed(entries, [50]) == set()


def encode_ptx(architecture: int, text: bytes, options: bytes = b"") -> bytes:
    """An entry of PTX as nvcc writes it: compressed, with options for the compiler if it is to be linked."""
    code = lz4.block.compress(text, store_size=False)
    payload = code + bytes(-len(code) % 8)
    size = fatbin.ENTRY.size + fatbin.DETAILS.size + 8 + len(options)
    header = fatbin.ENTRY.pack(fatbin.PTX, 257, size, len(payload), len(code), 64, 6, 7, architecture)
    return header + fatbin.DETAILS.pack(0, 0x2011, 0, len(text)) + bytes(8) + options + payload


def add_entry(binary: bytes, entry: bytes) -> bytes:
    """A fat binary with one entry more."""
    body = binary[fatbin.HEADER.size :] + entry
    return fatbin.HEADER.pack(fatbin.MAGIC, 1, fatbin.HEADER.size, len(body)) + body


@pytest.fixture
def ptxas(tmp_path: pathlib.Path) -> pathlib.Path:
    """A stand-in for NVIDIA's assembler, which few machines have: its machine code names its inputs."""
    path = tmp_path / "ptxas"
    path.write_text('#!/bin/sh\n[ "$1" != -arch=sm_100 ] && { printf "%s " "$1"; cat "$3"; } > "$5"\n')
    path.chmod(0o755)
    return path


def test_ptx_becomes_machine_code_in_its_place(ptxas: pathlib.Path) -> None:
    """A GPU loads it instead; code of other GPUs that the bundle is for stays, and so does everything around it."""
    cubins = [(fatbin.CUBIN, architecture, b"%d" % architecture * 40) for architecture in (60, 70, 80)]
    binary = add_entry(encode(cubins), encode_ptx(86, b"add.f32 a, b;" * 20))
    data = bytearray(b"before" + binary + b"after" + binary + b"end")
    assert fatbin.compile_ptx(data, [80, 90], ptxas) == 2
    assert len(data) == len(b"before" + binary + b"after" + binary + b"end")
    assert data.startswith(b"before") and data.endswith(b"end")
    assert data[len(b"before" + binary) :].startswith(b"after")
    for entries in fatbin.fat_binaries(data):
        assert [(entry.kind, entry.architecture) for entry in entries] == [(fatbin.CUBIN, 80), (fatbin.CUBIN, 90)]
        code = [bytes(data[entry.start : entry.start + entry.size]).rstrip(b"\0") for entry in entries]
        assert code == [b"80" * 40, b"-arch=sm_90 " + b"add.f32 a, b;" * 20]


@pytest.mark.parametrize("reason", ["to be linked", "unknown architecture", "no room", "machine code exists"])
def test_other_ptx_stays(ptxas: pathlib.Path, reason: str) -> None:
    """PTX without the code that it is to be linked with, for GPUs that the assembler does not know, or too long."""
    cubins = [
        (fatbin.CUBIN, 90 if reason == "machine code exists" else 60, b"60" * (1 if reason == "no room" else 999))
    ]
    options = b"--compile-only  " if reason == "to be linked" else b""
    data = bytearray(add_entry(encode(cubins), encode_ptx(86, b"add.f32 a, b;" * 20, options)))
    before = bytes(data)
    assert fatbin.compile_ptx(data, [100 if reason == "unknown architecture" else 90], ptxas) == 0
    assert data == before


def make_wheel(folder: pathlib.Path) -> pathlib.Path:
    """A wheel of one module, with a file that stripping leaves out and one that is executable."""
    info = f"{MODULE}-1.0.dist-info"
    texts = {
        f"{MODULE}.py": "value = 7\n" * 1000,
        "mindspore/lib/plugin/ascend/unused.so": "x" * 1000,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {MODULE}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    path = folder / f"{MODULE}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, text in texts.items():
            wheel.writestr(name, text)
        wheel.writestr(f"{info}/RECORD", "\n".join(f"{name},," for name in texts))
    return path


def make_bundle(folder: pathlib.Path, limit: int | None = 300) -> pathlib.Path:
    """A complete bundle of that wheel, stripped and cut into small pieces."""
    folder.mkdir()
    file = bundle.store(bundle.strip(make_wheel(folder), (90,)), folder, limit)
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    manifest = {"format_version": bundle.FORMAT_VERSION, "python": version, "files": [file]}
    (folder / "bundle.json").write_text(json.dumps(manifest))
    return folder


def test_a_stripped_wheel_lists_its_files_with_their_hashes(tmp_path: pathlib.Path) -> None:
    """pip checks them; unused files are gone from the archive and from the list."""
    with zipfile.ZipFile(bundle.strip(make_wheel(tmp_path), (90,))) as wheel:
        record = next(name for name in wheel.namelist() if name.endswith("RECORD"))
        rows = [line.split(",") for line in wheel.read(record).decode().splitlines()]
        assert sorted(name for name, _, _ in rows) == sorted(wheel.namelist())
        assert not any("ascend" in name for name in wheel.namelist())
        for name, digest, size in rows:
            if name != record:
                data = wheel.read(name)
                expected = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
                assert (digest, int(size)) == (f"sha256={expected}", len(data))


@pytest.mark.parametrize("ensurepip", [True, False])
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="needs root for a network namespace")
def test_a_bundle_installs_without_a_network(tmp_path: pathlib.Path, ensurepip: bool) -> None:
    """In a namespace without routes, into a new environment that then imports what was bundled.

    Debian's Python lacks ensurepip unless python3-venv is installed.
    """
    made = make_bundle(tmp_path / "bundle")
    assert len(list(made.glob("*.whl.*"))) > 1
    environment = {**os.environ, "VIRTUAL_ENV": str(tmp_path / "environment"), "PIP_CONFIG_FILE": os.devnull}
    if not ensurepip:
        (tmp_path / "ensurepip.py").write_text("raise ImportError\n")
        environment["PYTHONPATH"] = str(tmp_path)
    command = ["unshare", "--net", sys.executable, ROOT / "launch/bundle.py", "--install", made]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "doctor.sh" in done.stdout.splitlines()[-1]
    python = tmp_path / "environment/bin/python"
    value = subprocess.run([python, "-c", f"import {MODULE}; print({MODULE}.value)"], capture_output=True, check=True)
    assert value.stdout == b"7\n"


def test_missing_and_damaged_pieces_are_named(tmp_path: pathlib.Path) -> None:
    """Before anything is installed."""
    made = make_bundle(tmp_path / "bundle")
    piece = sorted(made.glob("*.whl.*"))[1]
    piece.write_bytes(b"damaged" + piece.read_bytes())
    with pytest.raises(UserError, match=rf"{piece.name}: damaged, SHA-256 .* expected .* copy it again"):
        bundle.install(made)
    piece.unlink()
    with pytest.raises(UserError, match=rf"{piece.name}: missing; copy it again"):
        bundle.install(made)
    with pytest.raises(UserError, match=r"bundle\.json: missing; expected a folder that"):
        bundle.install(tmp_path)


@pytest.mark.parametrize("text", [
    "", "[]", "{}", '{"format_version": 1, "python": "3.11"}',
    '{"format_version": 1, "python": "3.11", "files": [{"name": "a.whl", "pieces": [{"name": "../b", "sha256": ""}]}]}',
])  # fmt: skip
def test_a_damaged_manifest_is_named(tmp_path: pathlib.Path, text: str) -> None:
    """Also one that would write outside of its folder."""
    (tmp_path / "bundle.json").write_text(text)
    with pytest.raises(UserError, match=r"bundle\.json: not a bundle's manifest; copy the bundle again"):
        bundle.install(tmp_path)


def collect(out: pathlib.Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException | None = None) -> None:
    """Collect a bundle of one wheel; with `failure`, that is raised when a part of it is in its place."""

    def download(folder: pathlib.Path, python: str, extras: list[str]) -> list[pathlib.Path]:
        if failure:
            (out / "a.whl.000").touch()
            raise failure
        return [make_wheel(folder)]

    monkeypatch.setattr(bundle, "download", download)
    options = {"out": out, "python": "3.11", "gpu": None, "extras": [], "strip": True, "split": 300}
    bundle.collect(argparse.Namespace(**options))


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "full"), UserError(""), KeyboardInterrupt()])
def test_nothing_is_left_of_a_bundle_that_could_not_be_completed(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    """The same command can be run again."""
    with pytest.raises(type(failure)):
        collect(tmp_path / "out", monkeypatch, failure)
    assert not list((tmp_path / "out").iterdir())
    collect(tmp_path / "out", monkeypatch)
    assert (tmp_path / "out" / "bundle.json").exists()


def test_what_a_killed_command_left_is_replaced(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever it was killed; but other files are never removed, nor those of a running command."""
    collect(tmp_path / "expected", monkeypatch)
    expected = sorted(path.name for path in (tmp_path / "expected").iterdir())
    out = tmp_path / "out"
    (out / bundle.WORK).mkdir(parents=True)
    for name in (f"{bundle.WORK}/x.whl", "other.whl.007", "operators.so", "bundle.json"):
        (out / name).touch()
    running = os.open(out, os.O_RDONLY)
    fcntl.flock(running, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="out: another command is collecting a bundle in it"):
        collect(out, monkeypatch)
    os.close(running)
    collect(out, monkeypatch)
    assert sorted(path.name for path in out.iterdir()) == expected
    with pytest.raises(UserError, match="out: already exists and is not empty; name a new folder"):
        collect(out, monkeypatch)
    assert sorted(path.name for path in out.iterdir()) == expected


@pytest.mark.parametrize("script,message", [
    ("echo ERROR: no such package >&2; echo ERROR: second >&2; exit 1", "it failed: no such package; try again"),
    ("echo ERROR: Exception: >&2; echo 'OSError: [Errno 28] No space left on device' >&2; exit 1",
     "it failed: OSError: .* No space left on device; free some space there"),
    ("echo first; echo last; exit 1", "it failed: last; try again"),
    ("exit 1", "it failed: no message; try again"),
])  # fmt: skip
def test_the_reason_of_a_failed_command_is_found(script: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        bundle.run(["sh", "-c", script], "it failed", "try again")


@pytest.mark.parametrize("text", ["", "M", "0M", "-1", "60MB", "1.5G", "60m"])
def test_sizes_that_are_none_are_refused(text: str) -> None:
    """And the message gives examples."""
    with pytest.raises(Exception, match="not a size; expected for example 60M"):
        bundle.parse_size(text)
