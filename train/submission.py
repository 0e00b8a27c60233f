"""Submissions: the test sets of Sintel and KITTI, and the folders that their servers take."""

import re
import sys

from launch.errors import UserError

PASSES = ("clean", "final")
"""What a pair's name begins with in a set that is rendered twice."""


def list_test_pairs(root):
    """The pairs of an unpacked test set of Sintel or KITTI, by its layout.

    Args:
        root: folder of the release, or the folder in it with the test set, a `pathlib.Path`:
            Sintel: test/{clean,final}/SCENE/frame_0001.png
            KITTI 2015: testing/image_2/000000_10.png, 000000_11.png
            KITTI 2012: testing/colored_0 or else testing/image_0, likewise

    Returns:
        The benchmark's name, and a list of (file to submit, image 1, image 2). By the readme of
        Sintel's bundler the file is CLEAN OR FINAL/SCENE/frame0001.flo; by those of KITTI's
        development kits flow/000000_10.png in 2015 and 000000_10.png in 2012.

    Raises:
        UserError: no such layout, or an image is missing.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; expected the unpacked test set of Sintel or KITTI")
    for name, inner, folders, pairs_of, expected in (
        ("Sintel", "test", PASSES, list_sintel, 1104),
        ("KITTI 2015", "testing", ("image_2",), list_kitti_2015, 200),
        ("KITTI 2012", "testing", ("colored_0",), list_kitti, 195),
        ("KITTI 2012", "testing", ("image_0",), list_kitti, 195),
    ):
        test = root if root.resolve().name == inner else root / inner
        if not any((test / folder).is_dir() for folder in folders):
            continue
        for folder in folders:
            if not (test / folder).is_dir():
                raise UserError(
                    f"{test / folder}: not there, but a submission to {name} needs it; download and unpack it too"
                )
        pairs = [pair for folder in folders for pair in pairs_of(test / folder)]
        if name == "Sintel":
            check_passes(test, pairs)
        if len(pairs) != expected:
            print(f"note: the test set of {name} has {expected} pairs, {test} has {len(pairs)}", file=sys.stderr)
        return name, pairs
    found = ", ".join(sorted(path.name for path in root.iterdir())[:5]) or "nothing"
    raise UserError(
        f"{root}: no test set in it (it has {found}); expected test/clean and "
        "test/final of Sintel, or testing/image_2 (KITTI 2015) or testing/colored_0 "
        "(KITTI 2012)"
    )


def list_sintel(folder):
    """(file, image 1, image 2) of one pass of Sintel's test set, scenes in name order."""
    pairs = []
    for scene in sorted(path for path in folder.iterdir() if path.is_dir()):
        frames = numbered(scene, r"frame_(\d{4})\.png")
        if not frames:
            raise UserError(f"{scene}: no frame in it; expected frame_0001.png and so on")
        numbers = range(1, max(frames) + 1)
        check_frames([scene / f"frame_{number:04}.png" for number in numbers])
        pairs += [
            (f"{folder.name}/{scene.name}/frame{number:04}.flo", frames[number], frames[number + 1])
            for number in numbers[:-1]
        ]
    if not pairs:
        raise UserError(f"{folder}: no pair in it; expected SCENE/frame_0001.png and so on")
    return pairs


def check_passes(test, pairs) -> None:
    """UserError unless both passes of Sintel's test set have the same pairs."""
    clean, final = ({file.split("/", 1)[1] for file, _, _ in pairs if file.startswith(name)} for name in PASSES)
    if clean != final:
        file = min(clean ^ final)
        lacking = "final" if file in clean else "clean"
        raise UserError(
            f"{test / lacking}: lacks the frames for {file}, which the other pass has; "
            "a submission needs both passes, so unpack the test set again"
        )


def list_kitti(folder):
    """(file, image 1, image 2) of KITTI's test set with its frames in `folder`."""
    frames = numbered(folder, r"(\d{6})_1[01]\.png")
    if not frames:
        raise UserError(f"{folder}: no pair in it; expected 000000_10.png, 000000_11.png and so on")
    names = [f"{number:06}" for number in range(max(frames) + 1)]
    check_frames([folder / f"{name}_{frame}.png" for name in names for frame in (10, 11)])
    return [(f"{name}_10.png", folder / f"{name}_10.png", folder / f"{name}_11.png") for name in names]


def list_kitti_2015(folder):
    """The same of KITTI 2015, whose archives have a folder for each of several tasks."""
    return [(f"flow/{file}", first, second) for file, first, second in list_kitti(folder)]


def numbered(folder, pattern):
    """The files of a folder with such a name, by the number in it."""
    matches = ((re.fullmatch(pattern, path.name), path) for path in folder.iterdir())
    return {int(match[1]): path for match, path in matches if match}


def check_frames(paths) -> None:
    """UserError unless all these frames are there; none of a test set may be missing."""
    if missing := [path for path in paths if not path.is_file()]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(
            f"{missing[0]}: not there{more}; a submission needs every pair of the test set, so unpack it again"
        )


def by_size(pairs):
    """Pairs of `list_test_pairs` by (height, width); UserError if a pair's images differ in it."""
    from prep.formats.image import image_size

    groups = {}
    for pair in pairs:
        size, other = map(image_size, pair[1:])
        if size != other:
            raise UserError(
                f"{pair[2]}: {other[1]}x{other[0]} pixels, expected "
                f"{size[1]}x{size[0]} as {pair[1].name} has; unpack the test set again"
            )
        groups.setdefault(size, []).append(pair)
    return groups


class Submission:
    """Writes flow into a folder under the pairs' names, in the format that these end with."""

    def __init__(self, folder) -> None:
        self.folder = folder

    def write(self, pair, flow) -> None:
        """Write the flow of a pair, float32 (H, W, 2) in pixels."""
        from prep.formats.flow import write_flo, write_kitti_png

        path = self.folder / pair.name
        path.parent.mkdir(parents=True, exist_ok=True)
        (write_flo if path.suffix == ".flo" else write_kitti_png)(path, flow)


def submit(args, comm, name, groups) -> None:
    """Predict this rank's share of a test set and write it."""
    from launch import progress
    from model.inference import load_predictor
    from model.predict import FramePair, predict
    from prep.formats.image import read_image

    predictor = load_predictor(args.ckpt, args.backend)
    shares = [pairs[comm.rank :: comm.size] for pairs in groups.values()]
    with progress.bar(total=sum(map(len, shares)), unit="pair", disable=comm.rank != 0) as bar:
        for share in shares:  # a graph for each size
            pairs = (FramePair(file, read_image(first), read_image(second)) for file, first, second in share)
            predict(
                predictor, pairs, Submission(args.submission), batch=args.batch, on_pairs=bar.update
            )
    comm.barrier()
    if comm.rank == 0:
        count = sum(map(len, groups.values()))
        print(f"{args.submission}: flow of {count} pairs for {name}")
