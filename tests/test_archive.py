"""Archives: read as if they were unpacked, and damaged or hostile ones are one clear error."""

import contextlib
import io
import os
import random
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.errors import UserError
from prep import archive, datasets
from prep.datasets.flyingchairs import FLYINGCHAIRS
from prep.datasets.flyingchairs2 import FLYINGCHAIRS2
from prep.datasets.flyingthings3d import FLYINGTHINGS3D
from prep.datasets.registry import DATASETS
from prep.formats import flow as flow_format
from prep.formats import image as image_format

KINDS = ("stored.zip", "deflated.zip", "a.tar", "a.tar.gz")
Files = dict[str, bytes]


def make(path: Path, files: Files, **options: Any) -> Path:
    """Pack files into an archive of one of KINDS."""
    if path.suffix == ".zip":
        method = zipfile.ZIP_STORED if path.name == "stored.zip" else zipfile.ZIP_DEFLATED
        with zipfile.ZipFile(path, "w", method, **options) as packed:
            for name, data in files.items():
                packed.writestr(name, data)
    else:
        with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w", **options) as packed:
            for name, data in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                packed.addfile(info, io.BytesIO(data))
    return path


def pack(path: Path, folder: Path) -> Path:
    """Pack a folder, with its name, into an archive."""
    names = sorted(file for file in folder.rglob("*") if file.is_file())
    return make(path, {str(file.relative_to(folder.parent)): file.read_bytes() for file in names})


def shards(folder: Path) -> Files:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}


# --- Reading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_paths_behave_as_those_of_unpacked_files(tmp_path: Path, kind: str) -> None:
    files = {"a b/data/é.bin": b"abc" * 9999, "a b/data/empty": b"", "./a b/readme.txt": b"text"}
    root = archive.open_archives(make(tmp_path / kind, files | {"__MACOSX/a b/._readme.txt": b"x"}))
    assert archive.list_names(root) == archive.list_folders(root) == ["a b"]
    data = root / "a b" / "data"
    assert data.is_dir() and not data.is_file() and not (data / "other").exists()
    assert archive.list_names(data) == ["empty", "é.bin"]
    path = data / "é.bin"
    assert str(path) == os.fspath(path) == f"{tmp_path}/{kind}/a b/data/é.bin" and path.suffix == ".bin"
    assert path == root / "a b/data/é.bin" and len({path, root / "a b/data/é.bin"}) == 1
    assert path.read_bytes() == files["a b/data/é.bin"] and (data / "empty").read_bytes() == b""
    assert (root / "a b/readme.txt").read_text() == "text"
    assert path.stat() == (29997, (tmp_path / kind).stat().st_mtime_ns)
    with pytest.raises(FileNotFoundError, match="other"):
        (data / "other").read_bytes()
    with pytest.raises(FileNotFoundError, match="other"):
        archive.list_names(data / "other")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", [archive.GzipSource.BLOCK, 1000])
def test_any_part_of_any_file_is_read_in_any_order(
    tmp_path: Path, kind: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With small blocks, a .tar.gz keeps and thins out many states."""
    monkeypatch.setattr(archive.GzipSource, "BLOCK", block)
    monkeypatch.setattr(archive.GzipSource, "SPACING", 16 * block)
    monkeypatch.setattr(archive.GzipSource, "MAX_STATES", 8)
    rng = random.Random(0)
    lengths = [0, 1, 511, 512, 513, archive.HEAD, archive.HEAD + 1, 100_000, 300_000]
    files = {f"{i}": rng.randbytes(n) if i % 2 else (b"%d " % i * n)[:n] for i, n in enumerate(2 * lengths)}
    root = archive.open_archives(make(tmp_path / kind, files))
    for name in rng.sample(sorted(files), len(files)):
        assert (root / name).read_bytes() == files[name]
        with (root / name).open() as opened:
            for _ in range(6):
                start, length = rng.randrange(len(files[name]) + 9), rng.choice((1, 9, 4096, 10**6))
                assert opened.seek(start) == opened.tell() == start
                assert opened.read(length) == files[name][start : start + length]
            assert opened.seek(0, io.SEEK_END) == len(files[name]) and opened.read(1) == b""


def test_a_tar_gz_of_several_parts_as_pigz_writes_it(tmp_path: Path) -> None:
    plain = make(tmp_path / "a.tar", {"a": bytes(50_000), "b": b"xyz"}).read_bytes()
    parts = [plain[:20_000], plain[20_000:20_001], b"", plain[20_001:]]
    compressed = b""
    for part in parts:
        compressor = zlib.compressobj(wbits=31)
        compressed += compressor.compress(part) + compressor.flush()
    (tmp_path / "b.tar.gz").write_bytes(compressed + bytes(512))
    root = archive.open_archives(tmp_path / "b.tar.gz")
    assert (root / "b").read_bytes() == b"xyz" and (root / "a").read_bytes() == bytes(50_000)


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_is_read_from_archives(tmp_path: Path, kind: str) -> None:
    """Some formats seek in their files: HDF5, .npz, and images."""
    h5py = pytest.importorskip("h5py")
    rng, folder = np.random.default_rng(0), tmp_path / "files"
    flow, image = tiny.flow(rng, 60, 70), tiny.picture(rng, 60, 70)
    folder.mkdir()
    flow_format.write_flo(folder / "a.flo", flow)
    flow_format.write_kitti_png(folder / "flow.png", flow)
    tiny.save_pfm(folder / "a.pfm", flow)
    np.save(folder / "a.npy", flow)
    np.savez_compressed(folder / "a.npz", u=flow[..., 0], v=flow[..., 1])
    with h5py.File(folder / "a.flo5", "w") as file:
        file.create_dataset("flow", data=flow, compression=5)
    for suffix in ("png", "jpg", "webp", "tiff", "ppm", "bmp"):
        tiny.save(folder / f"image.{suffix}", image)
    root = archive.open_archives(pack(tmp_path / kind, folder)) / "files"
    for name in archive.list_names(root):
        read, size = (
            (image_format.read_image, image_format.image_size)
            if name.startswith("image")
            else (lambda path: flow_format.read_flow(path)[0], flow_format.flow_size)
        )
        assert np.array_equal(read(root / name), read(folder / name), equal_nan=True), name
        assert size(root / name) == (60, 70)


# --- Conversion -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("release") / "FlyingChairs_release"
    tiny.chairs(folder / "data", 12)
    return folder


@pytest.fixture(scope="module")
def unpacked(release: Path, tmp_path_factory: pytest.TempPathFactory) -> Files:
    return shards(tiny.convert("flyingchairs", release, tmp_path_factory.mktemp("unpacked") / "out", "--shards", 5))


@pytest.mark.parametrize("kind", KINDS)
def test_the_shards_are_the_same_as_from_unpacked_files(
    release: Path, unpacked: Files, tmp_path: Path, kind: str
) -> None:
    packed = pack(tmp_path / kind, release)
    out = tiny.convert("flyingchairs", packed, tmp_path / "out", "--shards", 5, "--workers", 3)
    assert shards(out) == unpacked


@pytest.mark.parametrize("kind", ["deflated.zip", "a.tar.gz"])
def test_each_rank_opens_the_archive(release: Path, unpacked: Files, tmp_path: Path, kind: str) -> None:
    ranks = tiny.mpirun(2, "prep/convert.py", "flyingchairs", "--root", pack(tmp_path / kind, release), "--out",
                        tmp_path / "out", "--shards", 5, "--workers", 2)  # fmt: skip
    _, err = ranks.communicate(timeout=60)
    assert ranks.returncode == 0 and shards(tmp_path / "out") == unpacked, err


@pytest.mark.parametrize("kind", ["deflated.zip", "a.tar.gz"])
def test_every_release_is_found_in_an_archive_and_listed_as_unpacked(tmp_path: Path, kind: str) -> None:
    """With or without the folder that contains it; a release in several archives is that of their folder."""
    pytest.importorskip("h5py")
    make_release: dict[str, Callable[[Path], object]] = {
        "autoflow": lambda path: tiny.autoflow(path, {1: ["table_0_batch_0"], 2: ["table_0_batch_1"]}),
        "chairssdhom": lambda path: tiny.chairssdhom(path, 1, 1),
        "driving": lambda path: tiny.flyingthings3d(path, ["15mm_focallength/scene_forwards/fast"]),
        "flyingchairs": lambda path: tiny.chairs(path / "data", 2),
        "flyingchairs2": lambda path: tiny.flyingchairs2(path, 1, 1),
        "flyingchairsocc": lambda path: tiny.flyingchairsocc(path, [1]),
        "flyingthings3d": lambda path: tiny.flyingthings3d(path, ["TRAIN/A/0000", "TEST/A/0000"]),
        "flyingthings3d-subset": lambda path: tiny.flyingthings3d_subset(path, [0, 1]),
        "hd1k": lambda path: tiny.hd1k(path, {0: 2}),
        "kitti2012": lambda path: tiny.kitti(path, 1, "colored_0"),
        "kitti2015": lambda path: tiny.kitti(path, 1),
        "kubric": lambda path: tiny.kubric(path, {"0": 2}),
        "kubric-swapped": lambda path: tiny.kubric(path, {"0": 2, "1": 2}),
        "middlebury": lambda path: tiny.middlebury(path, ["Venus"]),
        "monkaa": lambda path: tiny.flyingthings3d(path, ["a_rain_of_stones_x2"]),
        "sintel": lambda path: tiny.sintel(path, {"alley_1": 3}),
        "spring": lambda path: tiny.spring(path, {"0001": 2}),
        "tartanair": lambda path: tiny.tartanair(path, {"ocean/Easy/P000": 2}),
        "viper": lambda path: tiny.viper(path, {"train/001": 2}),
    }
    assert make_release.keys() == DATASETS.keys()
    for name, write in make_release.items():
        folder, dataset = tmp_path / name / "Release", DATASETS[name]
        write(folder)
        expected = dataset.list_pairs(folder, dataset.passes[0])
        inner = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        (tmp_path / name / "parts").mkdir()
        tops = sorted({path.partition("/")[0] for path in inner})
        for top in tops:
            part = {path: data for path, data in inner.items() if path.partition("/")[0] == top}
            make(tmp_path / name / "parts" / f"{top}.tar", part)
        for root in (
            make(tmp_path / name / kind, inner),
            make(tmp_path / name / f"outer {kind}", {f"Release 1/{path}": data for path, data in inner.items()}),
            tmp_path / name / "parts",
        ):
            found = dataset.list_pairs(datasets.find_release(dataset, root), dataset.passes[0])
            assert [pair.name for pair in found] == [pair.name for pair in expected], (name, root)
            for pair, original in zip(found, expected, strict=True):
                assert pair.held_out == original.held_out and datasets.pair_size(pair) == datasets.pair_size(original)
                for field, array in datasets.read_pair(original).items():
                    assert np.array_equal(datasets.read_pair(pair)[field], array, equal_nan=True)


def test_what_is_missing_in_an_archive_is_named(release: Path, tmp_path: Path) -> None:
    files = {str(p.relative_to(release.parent)): p.read_bytes() for p in release.rglob("*.*")}
    missing = dict(list(files.items())[1:])
    with pytest.raises(UserError, match=r"a.zip/FlyingChairs_release/data/000.*: missing; every pair needs"):
        datasets.find_release(FLYINGCHAIRS, make(tmp_path / "a.zip", missing))
    root = datasets.find_release(FLYINGCHAIRS2, make(tmp_path / "b.zip", files))
    with pytest.raises(UserError, match=r"b.zip/FlyingChairs_release/data: contains no pairs; expected files such as"):
        FLYINGCHAIRS2.list_pairs(root, "")


def test_excluded_frames_are_read_from_an_archive(tmp_path: Path) -> None:
    folder = tiny.flyingthings3d(tmp_path / "things", ["TRAIN/A/0000"])
    (folder / "all_unused_files.txt").write_text("TRAIN/A/0000/left/0008.png\n")
    root = datasets.find_release(FLYINGTHINGS3D, pack(tmp_path / "a.tar", folder))
    assert len(FLYINGTHINGS3D.list_pairs(root, "clean")) == 6


# --- Damaged and hostile archives -----------------------------------------------------------------


def stop(release: Path, out: Path) -> str:
    """The last line of a conversion that must fail and leave no dataset."""
    done = tiny.run_convert("flyingchairs", release, out, "--shards", 2)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:] and not out.exists()
    return lines[-1]


def flip(path: Path, data: bytes) -> None:
    """Flip a bit of what an archive stores of a file."""
    content = bytearray(path.read_bytes())
    content[content.index(data[100:140]) + 20] ^= 1
    path.write_bytes(content)


def test_a_damaged_file_in_a_zip_is_named(release: Path, tmp_path: Path) -> None:
    """Its CRC-32 tells, although a flipped bit in an image is no error of the format."""
    flip(pack(tmp_path / "stored.zip", release), (release / "data/00003_img2.ppm").read_bytes())
    line = stop(tmp_path / "stored.zip", tmp_path / "out")
    assert "stored.zip/FlyingChairs_release/data/00003_img2.ppm: damaged (its CRC-32 is wrong)" in line
    packed = pack(tmp_path / "deflated.zip", release)
    with zipfile.ZipFile(packed) as opened:
        info = opened.getinfo("FlyingChairs_release/data/00003_img2.ppm")
    content = bytearray(packed.read_bytes())
    content[info.header_offset + 30 + len(info.filename) + info.compress_size // 2] ^= 64
    packed.write_bytes(content)
    line = stop(packed, tmp_path / "out 2")
    assert "deflated.zip/FlyingChairs_release/data/00003_img2.ppm: damaged (" in line
    content[info.header_offset] ^= 1
    packed.write_bytes(content)
    assert "00003_img2.ppm: damaged (its header is not in its place)" in stop(packed, tmp_path / "out 3")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
def test_a_truncated_archive_is_named(release: Path, tmp_path: Path, kind: str, share: float) -> None:
    packed = pack(tmp_path / kind, release)
    os.truncate(packed, int(share * packed.stat().st_size))
    with pytest.raises(UserError, match=f"^{packed}: damaged .*download or copy the archive again$"):
        archive.open_archives(packed)


def test_a_tar_that_ends_between_two_files_is_truncated(tmp_path: Path) -> None:
    packed = make(tmp_path / "a.tar", {"a": bytes(512), "b": bytes(512)})
    os.truncate(packed, 1024)
    with pytest.raises(UserError, match=r"a.tar: damaged \(it is truncated, or the header at byte 1024"):
        archive.open_archives(packed)


def with_info(name: str, **values: Any) -> Callable[[Path], None]:
    """Writes an archive of two files, whose second has these attributes."""

    def write(path: Path) -> None:
        if path.suffix == ".tar":
            with tarfile.open(path, "w") as packed:
                packed.addfile(tarfile.TarInfo("data/first"))
                info = tarfile.TarInfo(name)
                for key, value in values.items():
                    setattr(info, key, value)
                packed.addfile(info)
        else:
            with zipfile.ZipFile(path, "w") as packed:
                packed.writestr("data/first", b"")
                info = zipfile.ZipInfo(name)
                for key, value in values.items():
                    setattr(info, key, value)
                packed.writestr(info, b"content")

    return write


@pytest.mark.parametrize("suffix,write,message", [
    (".zip", with_info("../evil"), "its member ../evil: its path leads out of the archive"),
    (".zip", with_info("data/../../evil"), "data/../../evil: its path leads out"),
    (".zip", with_info("/etc/passwd"), "its member /etc/passwd: its path leads out"),
    (".zip", with_info("../folder/"), "its member ../folder/: its path leads out"),
    (".tar", with_info("../evil"), "its member ../evil: its path leads out of the archive"),
    (".tar", with_info("/etc/passwd"), "its member /etc/passwd: its path leads out"),
    (".tar", with_info("..", type=tarfile.DIRTYPE), "its member ..: its path leads out"),
    (".zip", with_info("data/link", external_attr=(stat.S_IFLNK | 0o777) << 16), "data/link: it is a link"),
    (".tar", with_info("data/link", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "data/link: it is a link"),
    (".tar", with_info("data/link", type=tarfile.LNKTYPE, linkname="data/first"), "data/link: it is a link"),
    (".tar", with_info("data/device", type=tarfile.CHRTYPE), "data/device: it is a link or another special file"),
    (".tar", with_info("data/first"), "data/first: the archive contains this name twice"),
    (".tar", with_info("./data//first"), "./data//first: the archive contains this name twice"),
    (".tar", with_info("data/first/inner"), "data/first/inner: the archive contains data/first as a file and as a"),
    (".tar", with_info("data"), "data: the archive contains this name twice"),
    (".zip", with_info("data/a", compress_type=zipfile.ZIP_LZMA), "data/a: it is neither stored nor compressed by"),
    (".zip", with_info("data/\x1b[2Jx"), "its member data/ [2Jx: it is a link"),
])  # fmt: skip
def test_what_does_not_belong_into_an_archive_is_named(
    tmp_path: Path, suffix: str, write: Callable[[Path], None], message: str
) -> None:
    path = tmp_path / f"bad{suffix}"
    if "\x1b" in message or "2Jx" in message:
        write = with_info("data/\x1b[2Jx", external_attr=stat.S_IFIFO << 16)
    write(path)
    with pytest.raises(UserError) as raised:
        archive.open_archives(path)
    assert str(raised.value).startswith(f"{path}: cannot read its member ") and message in str(raised.value)
    assert str(raised.value).endswith("; unpack it, and pack it again")


def test_an_archive_with_a_name_twice_or_a_password(release: Path, tmp_path: Path) -> None:
    packed = pack(tmp_path / "a.zip", release)
    with zipfile.ZipFile(packed, "a") as opened, pytest.warns(UserWarning, match="Duplicate name"):
        opened.writestr("FlyingChairs_release/data/00007_img1.ppm", b"")
    line = stop(packed, tmp_path / "out")
    assert f"{packed}: cannot read its member FlyingChairs_release/data/00007_img1.ppm: the archive contains" in line
    content = bytearray(pack(packed, release).read_bytes())
    place = content.index(b"PK\1\2")
    content[place + 8] |= 1
    packed.write_bytes(content)
    line = stop(packed, tmp_path / "out")
    assert f"{packed}: cannot read its member FlyingChairs_release/data/00001_flow.flo: it is encrypted" in line
    assert not list(tmp_path.glob("out*"))


def test_a_zip_that_claims_more_than_it_contains(tmp_path: Path) -> None:
    packed = make(tmp_path / "deflated.zip", {"a": bytes(5000)})
    content = bytearray(packed.read_bytes())
    place = content.index(b"PK\1\2")
    for length, message in ((1 << 30, "its member a: it claims 1073741824 bytes"), (4999, "a: damaged")):
        content[place + 24 : place + 28] = length.to_bytes(4, "little")
        packed.write_bytes(content)
        with pytest.raises(UserError, match=message):
            (archive.open_archives(packed) / "a").read_bytes()


def test_a_tar_gz_takes_no_memory_for_what_a_header_claims(tmp_path: Path) -> None:
    """A header of extended attributes of 2 GB, which compress to nothing."""
    info = tarfile.TarInfo("a")
    info.type, info.size = tarfile.XHDTYPE, 1 << 31
    compressor = zlib.compressobj(wbits=31)
    data = compressor.compress(info.tobuf()) + compressor.compress(bytes(1 << 24)) + compressor.flush()
    (tmp_path / "a.tar.gz").write_bytes(data)
    with pytest.raises(UserError, match=r"a.tar.gz: damaged \(a header claims 2147483648 bytes"):
        archive.open_archives(tmp_path / "a.tar.gz")


@pytest.mark.parametrize("name,remedy", [
    ("a.tar.bz2", "decompress it to a .tar"), ("a.7z", "unpack it"), ("a.rar", "unpack it"), ("a.gz", "unpack it"),
])  # fmt: skip
def test_other_archives_are_refused(tmp_path: Path, name: str, remedy: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(UserError, match=f"{name}: only .zip, .tar, .tar.gz, .tgz files are read in place; .*{remedy}"):
        datasets.find_release(FLYINGCHAIRS, tmp_path / name)


def test_archives_are_only_opened_where_there_is_no_release(release: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.7z").touch()
    (tmp_path / "data").symlink_to(release / "data")
    assert datasets.find_release(FLYINGCHAIRS, tmp_path) == tmp_path
    assert datasets.find_release(FLYINGCHAIRS, tmp_path / "nowhere") == tmp_path / "nowhere"


@settings(deadline=None, max_examples=200)
@given(st.data(), st.sampled_from(KINDS))
def test_any_bytes_are_an_archive_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, kind: str
) -> None:
    """Damaged copies of each kind: truncated, or with some bytes overwritten."""
    path = make(tmp_path_factory.mktemp("any") / kind, {"data/a": b"abc" * 50, "data/b": b""})
    content = bytearray(path.read_bytes())
    for place, value in data.draw(st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)))):
        content[place] = value
    path.write_bytes(content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))])
    with contextlib.suppress(UserError):
        root = archive.open_archives(path)
        for folder in [root, *(root / name for name in archive.list_folders(root))]:
            for name in archive.list_names(folder):
                if (folder / name).is_file():
                    assert len((folder / name).read_bytes()) == (folder / name).stat().st_size
