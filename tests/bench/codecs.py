"""Lossless codecs for images and flow side by side: size, time to encode, time to decode.

python tests/bench/codecs.py [--repeats N] [--synthetic N]
"""

import argparse
import importlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import cv2
import material
import numpy as np
import zstandard

from prep import codec

Codec = tuple[Callable[[np.ndarray], bytes], Callable[[bytes, np.ndarray], np.ndarray]]
"""(encode, decode); the latter also gets the original, for its shape and dtype."""

NAMES = {"pair": "00001", "field": "image1"}


def raw() -> Codec:
    return lambda a: a.tobytes(), lambda b, a: np.frombuffer(b, a.dtype).reshape(a.shape).copy()


def by_cv2(suffix: str, *options: int) -> Codec:
    def encode(array: np.ndarray) -> bytes:
        return cv2.imencode(suffix, array, options)[1].tobytes()

    return encode, lambda data, _: cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)


def by_package(
    name: str, encode: Callable[[Any, np.ndarray], bytes], decode: Callable[[Any, bytes], np.ndarray]
) -> Codec | None:
    """A codec of a package that may not be there, in which case this is None."""
    try:
        package = importlib.import_module(name)
    except ImportError:
        print(f"note: {name} is not installed, its codec is left out")
        return None
    return (lambda a: encode(package, a)), (lambda data, _: decode(package, data))


def differences(level: int) -> Codec:
    """Each row less the one above, then zstd."""
    compress, decompress = zstandard.ZstdCompressor(level=level), zstandard.ZstdDecompressor()

    def encode(image: np.ndarray) -> bytes:
        rest = image.copy()
        rest[1:] -= image[:-1]
        return compress.compress(rest.data)

    def decode(data: bytes, image: np.ndarray) -> np.ndarray:
        rest = np.frombuffer(decompress.decompress(data), np.uint8).reshape(image.shape)
        return np.add.accumulate(rest, axis=0, dtype=np.uint8)

    return encode, decode


def zstd_of(
    to_bytes: Callable[[np.ndarray], np.ndarray], from_bytes: Callable[[np.ndarray, np.ndarray], np.ndarray], level: int
) -> Codec:
    """zstd after a rearrangement of a flow's bytes."""
    compress, decompress = zstandard.ZstdCompressor(level=level), zstandard.ZstdDecompressor()
    return (
        lambda flow: compress.compress(np.ascontiguousarray(to_bytes(flow)).data),
        lambda data, flow: from_bytes(np.frombuffer(decompress.decompress(data), np.uint8), flow),
    )


def ours(name: str) -> Codec:
    return (
        lambda array: codec.encode(array, name, **NAMES),
        lambda data, a: codec.decode(data, shape=a.shape, dtype=a.dtype, source="bench", **NAMES),
    )


def image_codecs() -> dict[str, Codec | None]:
    png, webp = cv2.IMWRITE_PNG_COMPRESSION, cv2.IMWRITE_WEBP_QUALITY
    return {
        "raw": raw(),
        "PNG, level 1 (OpenCV)": by_cv2(".png", png, 1),
        "PNG, level 6 (OpenCV)": by_cv2(".png", png, 6),
        "WebP, lossless (OpenCV)": by_cv2(".webp", webp, 101),
        "QOI (qoi)": by_package("qoi", lambda p, a: p.encode(a), lambda p, d: p.decode(d)),
        "JPEG XL, effort 1 (imagecodecs)": by_package(
            "imagecodecs",
            lambda p, a: p.jpegxl_encode(a, lossless=True, effort=1),
            lambda p, d: p.jpegxl_decode(d),
        ),
        "row difference + zstd 1": differences(1),
        "zstd 3 alone": zstd_of(lambda a: a, lambda b, a: b.reshape(a.shape), 3),
        "this toolkit, zstd (the default)": ours("zstd"),
        "this toolkit, raw": ours("raw"),
    }


def flow_codecs() -> dict[str, Codec | None]:
    def shuffle(flow: np.ndarray) -> np.ndarray:  # first bytes of all numbers, then their second bytes, and so on
        return flow.view(np.uint8).reshape(-1, 4).T

    def unshuffle(data: np.ndarray, flow: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(data.reshape(4, -1).T).view(np.float32).reshape(flow.shape)

    def plain(data: np.ndarray, flow: np.ndarray) -> np.ndarray:
        return data.view(np.float32).reshape(flow.shape)

    def planes(data: np.ndarray, flow: np.ndarray) -> np.ndarray:
        height, width, _ = flow.shape
        return cv2.merge(tuple(data.view(np.float32).reshape(2, height, width)))

    return {
        "raw": raw(),
        "zstd 1": zstd_of(lambda flow: flow, plain, 1),
        "zstd 3": zstd_of(lambda flow: flow, plain, 3),
        "u and v apart + zstd 1": zstd_of(lambda flow: np.moveaxis(flow, 2, 0), planes, 1),
        "bytes shuffled + zstd 1": zstd_of(shuffle, unshuffle, 1),
        "this toolkit, zstd (the default)": ours("zstd"),
        "this toolkit, raw": ours("raw"),
    }


def measure(codecs: dict[str, Codec | None], arrays: list[np.ndarray], repeats: int) -> list[list[str]]:
    """Rows of a table: codec, KB, share of raw, milliseconds to encode and to decode (medians)."""
    installed = {name: functions for name, functions in codecs.items() if functions}
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in installed}
    sizes: dict[str, list[int]] = {}
    for _ in range(repeats):  # interleaved, so that a busy moment hits all alike
        for name, (encode, decode) in installed.items():
            for array in arrays:
                start = time.perf_counter()
                data = encode(array)
                middle = time.perf_counter()
                back = decode(data, array)
                end = time.perf_counter()
                assert back.tobytes() == array.tobytes(), f"{name} is not lossless"
                times[name][0].append(middle - start)
                times[name][1].append(end - middle)
                sizes.setdefault(name, []).append(len(data))
    total = sum(array.nbytes for array in arrays) / len(arrays)
    rows = []
    for name, (encoding, decoding) in times.items():
        size = statistics.mean(sizes[name])
        speeds = [f"{1e3 * statistics.median(seconds):.2f}" for seconds in (encoding, decoding)]
        rows.append([name, f"{size / 1024:.0f}", f"{size / total:.3f}", *speeds])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare lossless codecs for images and flow.")
    parser.add_argument("--repeats", type=int, default=20, help="default: %(default)s")
    parser.add_argument("--synthetic", type=int, default=4, metavar="N", help="pairs; default: %(default)s")
    options = parser.parse_args()
    cv2.setNumThreads(1)
    kinds = {"synthetic": material.samples("synthetic", options.synthetic)}
    if material.os.path.isdir(material.SAMPLES):
        kinds = {"real": material.samples("real", 1), **kinds}
    for kind, samples in kinds.items():
        images = [sample[field] for sample in samples for field in ("image1", "image2")]
        flows = [sample["flow"] for sample in samples]
        for what, codecs, arrays in (
            ("images", image_codecs(), images), ("flow", flow_codecs(), flows)
        ):  # fmt: skip
            height, width, channels = arrays[0].shape
            print(f"\n{kind} {what}, {width}x{height}x{channels} {arrays[0].dtype}, one thread\n")
            header = ["codec", "KB", "of raw", "encode ms", "decode ms"]
            material.print_table(header, measure(codecs, arrays, options.repeats))


if __name__ == "__main__":
    main()
