"""Recipes: everything that decides what a training run learns, as typed YAML.

train/recipes/README.md explains every key. Checked by hand and not by pydantic: its models neither know the
line that a value stands in nor suggest the nearest key, and the code that adds both is longer than the checks.
"""

import contextlib
import dataclasses
import difflib
import math
import pathlib
import typing
from collections.abc import Iterable, Mapping

import yaml

from launch.errors import UserError
from launch.logs import print_note
from train import plain_yaml

FOLDER = pathlib.Path(__file__).resolve().parent / "recipes"
NETWORK_OPTIONS = ("variant", "dense", "normalize_features", "warp_mode")
"""Keys that build the network, `model.pwcnet.PWCNet`; checkpoints store them too."""
CHANGEABLE = ("steps", "log_every", "validate_every", "validation_batch", "checkpoint_every")
"""Keys that may change when a run resumes."""
RENAMED = {"average": "ema_decay", "warm_up": "warmup_steps"}
"""Former names of keys, which recipes and the command line may use for one more release; runs keep them for good."""
COMMAND_LINE = "the command line"
MAX_INTEGER = 2**31 - 1
"""Upper limit of integers without a limit of their own."""
MAX_SHOWN = 80
"""Characters of a key or value that an error shows."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """The values that a key accepts; of a list, those of its items."""

    low: float | None = None
    """Smallest value allowed."""
    high: float | None = None
    """Largest value allowed."""
    above: float | None = None
    """The value must be greater than this."""
    choices: tuple[str, ...] = ()


def bounded(
    default: typing.Any = dataclasses.MISSING,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    choices: tuple[str, ...] = (),
) -> typing.Any:
    """A field of the recipe with its default and `Limits`; a key without a default is required."""
    limits = Limits(low, high, above, choices)
    return dataclasses.field(default=default, metadata={"limits": limits})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train, without the datasets, the output folder and the number of ranks.

    `batch` is the global batch, over all ranks; sizes are in pixels, durations in steps.
    """

    seed: int = bounded(1, low=0)
    # data
    crop: tuple[int, int] = bounded(low=64)  # (height, width)
    batch: int = bounded(low=1)
    mixture: tuple[float, ...] = bounded((), above=0)  # share of each --data; (): in proportion to their pairs
    # augmentation, off by default; see train/augment.py
    flip: bool = False
    vertical_flip: bool = False
    scale: tuple[float, float] = bounded((1.0, 1.0), low=0.25, high=4)  # smallest and largest zoom
    affine: float = bounded(0.0, low=0, high=4)  # 1: rotation up to 10 degrees, squeeze 0.86 to 1.16
    relative_affine: float = bounded(0.0, low=0, high=4)  # 1: image 2 rotated by up to 1 degree
    exposure: float = bounded(0.0, low=0, high=1)  # gain, gain per channel, gamma
    jitter: float = bounded(0.0, low=0, high=1)  # brightness, contrast, saturation, hue
    relative_jitter: float = bounded(0.0, low=0, high=1)  # of image 2 relative to image 1
    gamma: tuple[float, float] = bounded((1.0, 1.0), low=0.1, high=10)  # smallest and largest exponent
    noise: float = bounded(0.0, low=0, high=1)  # largest standard deviation, for values in [0, 1]
    eraser: float = bounded(0.0, low=0, high=1)  # probability of erased rectangles in image 2
    # network and loss
    variant: str = bounded("irr", choices=("irr", "nvlabs"))
    dense: bool = True
    normalize_features: bool = False
    warp_mode: str = bounded("bilinear", choices=("bilinear", "nearest"))
    start_from_coarser_flow: bool = False
    loss: str = bounded("multiscale", choices=("multiscale", "robust", "sparse"))
    precision: str = bounded("float32", choices=("float32", "float16", "bfloat16", "auto"))
    # optimisation
    steps: int = bounded(low=1)
    learning_rate: float = bounded(above=0)
    optimizer: str = bounded("adam", choices=("adam", "adamw"))
    schedule: str = bounded("milestones", choices=("milestones", "one-cycle", "cosine"))
    warmup_steps: int = bounded(0, low=0)  # linear
    milestones: tuple[int, ...] = bounded((), low=1)
    weight_decay: float = bounded(0.0, low=0)
    clip_norm: float = bounded(0.0, low=0)  # 0: no clipping
    ema_decay: float = bounded(0.0, low=0, high=0.999999)  # 0: no moving average of the weights
    # monitoring
    log_every: int = bounded(10, low=1)
    validate_every: int = bounded(0, low=0)  # 0: once per epoch
    validation_batch: int = bounded(1, low=1)  # per rank
    checkpoint_every: int = bounded(1000, low=1)
    # Not a key: the place where each key was set, in a file or on the command line.
    sources: dict[str, str] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if any(side % 64 for side in self.crop):
            raise UserError(f"crop is {list(self.crop)}; PWC-Net requires multiples of 64")
        for key in ("scale", "gamma"):
            smallest, largest = getattr(self, key)
            if smallest > largest:
                raise UserError(f"{key} is [{smallest}, {largest}]; expected the smaller value first")
        if list(self.milestones) != sorted(set(self.milestones)):
            raise UserError(
                f"milestones is {shorten(list(self.milestones))}; expected steps in ascending order without repeats"
            )
        if self.schedule == "milestones" and self.milestones and self.milestones[-1] >= self.steps:
            raise UserError(
                f"milestones ends at {self.milestones[-1]}, but steps is {self.steps}, so the last one would have "
                "no effect; expected milestones below steps"
            )
        if self.warmup_steps > self.steps:
            raise UserError(
                f"warmup_steps is {self.warmup_steps}, but steps is {self.steps}; expected a warm-up that ends "
                "within the run"
            )
        if self.start_from_coarser_flow and not self.dense:
            raise UserError(
                "start_from_coarser_flow is true and dense is false, but only dense estimators see the coarser flow "
                "in their last layer; set start_from_coarser_flow=false or dense=true"
            )

    @classmethod
    def load(cls, name: str | pathlib.Path, overrides: Iterable[str] = ()) -> "Recipe":
        """Read a recipe.

        Args:
            name: of a built-in recipe ("example"), or the path of a YAML file.
            overrides: texts "key=value", which take precedence over the file.

        Raises:
            UserError: no such recipe; an unknown key (the message suggests the nearest one), a missing key, or a
                value of the wrong type or out of range.
        """
        path = pathlib.Path(name)
        if not path.suffix:
            path = FOLDER / f"{name}.yaml"
        try:
            entries = plain_yaml.read_file(path)
        except FileNotFoundError:
            known = ", ".join(sorted(file.stem for file in FOLDER.glob("*.yaml")))
            raise UserError(f"{name}: no such recipe; give a YAML file or one of: {known}") from None
        values, sources = {}, {}
        for key, entry in entries.items():
            source = f"{path}, line {entry.line}"
            key = current_name(key, source)
            if key in values:
                raise UserError(f"{source}: {key} is already set, under another name; remove one of them")
            values[key], sources[key] = entry.value, source
        given = {}
        for text in overrides:
            key, equals, value = text.partition("=")
            if not equals:
                raise UserError(f"{shorten(text)} on {COMMAND_LINE}: expected key=value")
            key = current_name(key, COMMAND_LINE)
            if key in given:
                raise UserError(
                    f"{key} is given twice on {COMMAND_LINE}, as {shorten(given[key])} and {shorten(value)}; remove "
                    "one of them"
                )
            given[key] = value
            values[key] = plain_yaml.read_value(value, f"{shorten(text)} on {COMMAND_LINE}")
            sources[key] = COMMAND_LINE
        return build(values, sources, path)

    @property
    def network_options(self) -> dict[str, typing.Any]:
        """The arguments of `model.pwcnet.PWCNet`, by name."""
        return {key: getattr(self, key) for key in NETWORK_OPTIONS}

    def to_yaml(self) -> str:
        """The whole recipe as YAML, defaults included."""
        values = {key: plain(getattr(self, key)) for key in KEYS}
        return yaml.safe_dump(values, sort_keys=False, default_flow_style=None)


KEYS = {field.name: field for field in dataclasses.fields(Recipe) if field.name != "sources"}
"""The keys of a recipe, with their defaults and limits."""
TYPES = typing.get_type_hints(Recipe)


def current_name(key: str, source: str) -> str:
    """The name of a key today; rank 0 prints a note if this one is outdated."""
    if key not in RENAMED:
        return key
    print_note(f"{source}: {key} is now called {RENAMED[key]}")
    return RENAMED[key]


def build(values: Mapping[str, object], sources: dict[str, str], path: str | pathlib.Path) -> Recipe:
    """Build a Recipe from plain values.

    Args:
        values: by key.
        sources: where each key was set, for errors.
        path: of the recipe, for errors.

    Raises:
        UserError: as `Recipe.load`.
    """
    checked = {}
    for key, value in values.items():
        where = f"{sources[key]}: {key[:MAX_SHOWN]}"
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, 1, 0.4)
            advice = f"did you mean {near[0]}?" if near else "known keys: " + ", ".join(KEYS)
            raise UserError(f"{where} is not a recipe key; {advice}")
        checked[key] = check_value(where, value, key)
    missing = [name for name, field in KEYS.items() if name not in checked and field.default is dataclasses.MISSING]
    if missing:
        raise UserError(f"{path}: {missing[0]} is missing; add a line `{missing[0]}: ...`")
    try:
        return Recipe(**checked, sources=sources)
    except UserError as error:
        changed = f" with {COMMAND_LINE}" if COMMAND_LINE in sources.values() else ""
        raise UserError(f"{path}{changed}: {error}") from None


def check_value(where: str, value: object, key: str) -> object:
    """Convert the value of a key to the type of its field; `where` names its place in the UserError."""
    kind, limits = TYPES[key], KEYS[key].metadata.get("limits", Limits())
    if typing.get_origin(kind) is not tuple:
        return check_scalar(where, value, kind, limits)
    item_types = typing.get_args(kind)
    any_length = item_types[-1] is Ellipsis
    if not isinstance(value, list) or not (any_length or len(value) == len(item_types)):
        count = "" if any_length else f"{len(item_types)} "
        raise UserError(f"{where} is {shorten(value)}; expected a list of {count}numbers, such as [a, b]")
    return tuple(check_scalar(where, item, item_types[0], limits) for item in value)


def check_scalar(where: str, value: typing.Any, kind: type, limits: Limits) -> object:
    """The same for a single value of type `kind`."""
    if kind is float and type(value) in (int, str):  # YAML reads 1e-4 as text
        with contextlib.suppress(ValueError, OverflowError):
            value = float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise UserError(f"{where} is {shorten(value)}; expected a value of type {kind.__name__}")
    if limits.choices and value not in limits.choices:
        raise UserError(f"{where} is {value!r}; expected one of: {', '.join(limits.choices)}")
    high = MAX_INTEGER if kind is int and limits.high is None else limits.high
    if limits.low is not None and value < limits.low:
        raise UserError(f"{where} is {value!r}; expected at least {limits.low}")
    if high is not None and value > high:
        raise UserError(f"{where} is {value!r}; expected at most {high}")
    if limits.above is not None and value <= limits.above:
        raise UserError(f"{where} is {value!r}; expected more than {limits.above}")
    return value


def adopt_network_options(recipe: Recipe, options: Mapping[str, object], source: str | pathlib.Path) -> Recipe:
    """A recipe with the network options of existing weights wherever it sets none itself.

    Args:
        recipe: from `Recipe.load`.
        options: of the network, from `model.weights.network_options` or a stored recipe; entries that are not in
            NETWORK_OPTIONS are ignored.
        source: the file that they come from, for errors.

    Raises:
        UserError: the recipe sets an option to another value, or is invalid with the options.
    """
    adopted: dict[str, typing.Any] = {}
    for key in NETWORK_OPTIONS:
        own = getattr(recipe, key)
        value = options.get(key, own)
        if key in recipe.sources and value != own:
            raise UserError(
                f"{recipe.sources[key]}: {key} is {to_text(own)}, but {source} is of a network with {key} "
                f"{to_text(value)}; remove {key} or use other weights"
            )
        adopted[key] = check_value(f"{source}: {key}", value, key)
    try:
        return dataclasses.replace(recipe, **adopted)
    except UserError as error:  # the user may not know that these options come from the file
        changed = [f"{key} {to_text(value)}" for key, value in adopted.items() if value != getattr(recipe, key)]
        raise UserError(f"{source} is of a network with {', '.join(changed)}: {error}") from None


class Difference(typing.NamedTuple):
    """A key whose value a resumed run changes."""

    key: str
    old: object
    """Value in the stored recipe; None if that lacks a required key."""
    new: object
    """Value of this start; None if the key no longer exists."""


def differences(path: pathlib.Path, recipe: Recipe) -> list[Difference]:
    """Compare the recipe stored with a run to another one, by meaning.

    A key that the stored recipe lacks, being of an older version, has its default there.

    Args:
        path: of the run's recipe.yaml.
        recipe: to resume with.

    Returns:
        Every key that differs, in the order of the keys; including those in CHANGEABLE.

    Raises:
        UserError: the file is not a recipe.
        OSError: it cannot be read.
    """
    stored = {
        RENAMED.get(key, key): tuple(entry.value) if isinstance(entry.value, list) else entry.value
        for key, entry in plain_yaml.read_file(path).items()
    }
    pairs = {}
    for key, field in KEYS.items():
        default = None if field.default is dataclasses.MISSING else field.default
        pairs[key] = stored.get(key, default), getattr(recipe, key)
    pairs |= {key: (value, None) for key, value in stored.items() if key not in KEYS}
    return [Difference(key, old, new) for key, (old, new) in pairs.items() if old != new]


def shorten(value: object) -> str:
    """A value as errors show it."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."


def plain(value: object) -> object:
    """A value as YAML stores it."""
    return list(value) if isinstance(value, tuple) else value


def to_text(value: object) -> str:
    """A value as it is written in a recipe."""
    return str(value).lower() if isinstance(value, bool) else str(plain(value))
