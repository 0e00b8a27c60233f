"""Recipes: everything that decides what a training run learns, as typed YAML."""

import dataclasses
import difflib
import math
import pathlib
import typing

import yaml

from launch.errors import UserError
from train import plain_yaml

FOLDER = pathlib.Path(__file__).resolve().parent / "recipes"
NETWORK_OPTIONS = ("variant", "dense", "normalize_features", "warp_mode")
"""Keys that build the network, `model.pwcnet.PWCNet`; checkpoints hold them too."""
CHANGEABLE = ("steps", "log_every", "validate_every", "validation_batch", "checkpoint_every")
"""Keys that may change when a run goes on."""
LARGEST = 2**31 - 1
"""Of whole numbers without another limit."""
SHOWN = 80
"""Characters of a key or value that an error shows."""


def bounded(default=dataclasses.MISSING, low=None, high=None, above=None, choices=None):
    """A field of the recipe with its default and the range of its values."""
    limits = {"low": low, "high": high, "above": above, "choices": choices}
    return dataclasses.field(default=default, metadata=limits)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """A training run, apart from its data, its folder and its ranks.

    `batch` is the global one, over all ranks; sizes are pixels, lengths of time are steps.
    """

    seed: int = bounded(1, low=0)
    # data
    crop: tuple[int, int] = bounded(low=64)
    batch: int = bounded(low=1)
    mixture: tuple[float, ...] = bounded((), above=0)  # shares of several --data; (): by their pairs
    # augmentation, all off by default; each key is explained in train/augment.py
    flip: bool = False
    vertical_flip: bool = False
    scale: tuple[float, float] = bounded((1.0, 1.0), low=0.25, high=4)  # smallest, largest zoom
    affine: float = bounded(0.0, low=0, high=4)  # 1: turned by up to 10 degrees, squeezed by 15 %
    relative_affine: float = bounded(0.0, low=0, high=4)  # 1: frame 2 turned by up to 1 degree
    exposure: float = bounded(0.0, low=0, high=1)  # gains of all and of each channel, and gamma
    jitter: float = bounded(0.0, low=0, high=1)  # brightness, contrast, saturation, hue
    relative_jitter: float = bounded(0.0, low=0, high=1)  # of image 2 against image 1
    gamma: tuple[float, float] = bounded((1.0, 1.0), low=0.1, high=10)  # smallest, largest
    noise: float = bounded(0.0, low=0, high=1)  # largest standard deviation, of a range of 1
    eraser: float = bounded(0.0, low=0, high=1)  # chance of hidden rectangles in image 2
    # network and loss
    variant: str = bounded("irr", choices=("irr", "nvlabs"))
    dense: bool = True
    normalize_features: bool = False
    warp_mode: str = bounded("bilinear", choices=("bilinear", "nearest"))
    start_from_coarser_flow: bool = False
    loss: str = bounded("multiscale", choices=("multiscale", "robust", "sparse"))
    precision: str = bounded("float32", choices=("float32", "float16"))
    # optimisation
    steps: int = bounded(low=1)
    learning_rate: float = bounded(above=0)
    optimizer: str = bounded("adam", choices=("adam", "adamw"))
    schedule: str = bounded("milestones", choices=("milestones", "one-cycle", "cosine"))
    warm_up: int = bounded(0, low=0)  # first steps, in which the rate rises evenly
    milestones: tuple[int, ...] = bounded((), low=1)
    weight_decay: float = bounded(0.0, low=0)
    clip_norm: float = bounded(0.0, low=0)
    average: float = bounded(0.0, low=0, high=0.999999)  # decay of the weights' moving average
    # watching
    log_every: int = bounded(10, low=1)
    validate_every: int = bounded(0, low=0)  # 0: once an epoch
    validation_batch: int = bounded(1, low=1)  # on each rank
    checkpoint_every: int = bounded(1000, low=1)
    # no key of a recipe: where each key was set, a file or the command line; the others are defaults
    sources: dict[str, str] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self):
        if any(side % 64 for side in self.crop):
            raise UserError(f"crop is {list(self.crop)}; PWC-Net takes multiples of 64")
        for key in ("scale", "gamma"):
            smallest, largest = getattr(self, key)
            if smallest > largest:
                raise UserError(f"{key} is [{smallest}, {largest}]; expected the smaller one first")
        if list(self.milestones) != sorted(set(self.milestones)):
            raise UserError(
                f"milestones is {shorten(list(self.milestones))}; expected steps in rising order, each once"
            )
        if self.schedule == "milestones" and self.milestones and self.milestones[-1] >= self.steps:
            raise UserError(
                f"milestones ends at {self.milestones[-1]} and steps is {self.steps}, so that "
                "it would have no effect; expected milestones below steps"
            )
        if self.warm_up > self.steps:
            raise UserError(
                f"warm_up is {self.warm_up} and steps {self.steps}; expected a warm-up that ends within the run"
            )
        if self.start_from_coarser_flow and not self.dense:
            raise UserError(
                "start_from_coarser_flow is true and dense false; plain estimators do "
                "not see the coarser flow in their last layer: turn one of them round"
            )

    def to_yaml(self):
        """The whole recipe, defaults written out, as YAML text."""
        values = {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in ((key, getattr(self, key)) for key in KEYS)
        }
        return yaml.safe_dump(values, sort_keys=False, default_flow_style=None)


KEYS = {field.name: field for field in dataclasses.fields(Recipe) if field.name != "sources"}
"""The keys of a recipe, with their defaults and ranges."""


def load(name, overrides=()):
    """Read a recipe.

    Args:
        name: one that comes with the package ("example") or the path of a YAML file.
        overrides: texts "key=value" that win over the file.

    Raises:
        UserError: no such recipe, an unknown key (with the nearest known one), a value of the wrong
            type or out of range, a missing key.
    """
    path = pathlib.Path(name)
    if not path.suffix:
        path = FOLDER / f"{name}.yaml"
    try:
        entries = plain_yaml.read_file(path)
    except FileNotFoundError:
        known = ", ".join(sorted(file.stem for file in FOLDER.glob("*.yaml")))
        raise UserError(f"{name}: no such recipe; give a YAML file or one of: {known}") from None
    values = {key: entry.value for key, entry in entries.items()}
    sources = {key: f"{path}, line {entry.line}" for key, entry in entries.items()}
    given = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"{shorten(text)} on the command line: expected key=value")
        if key in given:
            raise UserError(
                f"{key} is given twice on the command line, as {shorten(given[key])} and "
                f"{shorten(value)}; remove one of them"
            )
        given[key] = value
        values[key] = plain_yaml.read_value(value, f"{shorten(text)} on the command line")
        sources[key] = "the command line"
    return check(values, sources, path)


def check(values, sources, path):
    """Build a Recipe from plain values; `sources` says for each key where it was given."""
    types = typing.get_type_hints(Recipe)
    checked = {}
    for key, value in values.items():
        where = f"{sources[key]}: {str(key)[:SHOWN]}"
        if key not in KEYS:
            near = difflib.get_close_matches(str(key), KEYS, 1, 0.4)
            advice = f"did you mean {near[0]}?" if near else "known keys: " + ", ".join(KEYS)
            raise UserError(f"{where} is not a key of a recipe; {advice}")
        checked[key] = check_value(where, value, types[key], KEYS[key].metadata)
    missing = [name for name, field in KEYS.items() if name not in checked and field.default is dataclasses.MISSING]
    if missing:
        raise UserError(f"{path}: {missing[0]} is missing; add a line `{missing[0]}: ...`")
    try:
        return Recipe(**checked, sources=sources)
    except UserError as error:
        changed = " with the command line" if "the command line" in sources.values() else ""
        raise UserError(f"{path}{changed}: {error}") from None


def check_value(where, value, kind, limits):
    """Return the value in its type or raise UserError, naming where it was given."""
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)
        open_ended = inner[-1] is Ellipsis
        if not isinstance(value, list) or not (open_ended or len(value) == len(inner)):
            count = "" if open_ended else f"{len(inner)} "
            raise UserError(f"{where} is {shorten(value)}; expected a list of {count}numbers, as [a, b]")
        return tuple(check_value(where, item, inner[0], limits) for item in value)
    if kind is float and type(value) in (int, str):  # YAML reads 1e-4 as a text
        try:
            value = float(value)
        except (ValueError, OverflowError):
            pass
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise UserError(f"{where} is {shorten(value)}; expected a value of type {kind.__name__}")
    choices, low, high, above = (limits.get(key) for key in ("choices", "low", "high", "above"))
    if kind is int and high is None:
        high = LARGEST
    if choices and value not in choices:
        raise UserError(f"{where} is {value!r}; expected one of: {', '.join(choices)}")
    if low is not None and value < low:
        raise UserError(f"{where} is {value!r}; expected at least {low}")
    if high is not None and value > high:
        raise UserError(f"{where} is {value!r}; expected at most {high}")
    if above is not None and value <= above:
        raise UserError(f"{where} is {value!r}; expected more than {above}")
    return value


def adopt_network_options(recipe: Recipe, options: dict, source: str | pathlib.Path) -> Recipe:
    """A recipe with the network options of existing weights where it sets none itself.

    Args:
        recipe: as `load` gives it.
        options: of the network with these weights, as `model.weights.network_options` or a stored
            recipe gives them; entries other than NETWORK_OPTIONS are ignored.
        source: where they come from, for the error.

    Raises:
        UserError: the recipe sets an option to another value, or does not fit the options.
    """
    adopted = {}
    for key in NETWORK_OPTIONS:
        value = options.get(key, getattr(recipe, key))
        if key in recipe.sources and value != getattr(recipe, key):
            raise UserError(
                f"{recipe.sources[key]}: {key} is {to_text(getattr(recipe, key))}, but {source} is of "
                f"a network with {key} {to_text(value)}; remove {key} or use other weights"
            )
        where = f"{source}: {key}"
        adopted[key] = check_value(where, value, typing.get_type_hints(Recipe)[key], KEYS[key].metadata)
    return dataclasses.replace(recipe, **adopted)


def differences(path: pathlib.Path, recipe: Recipe) -> list[tuple]:
    """What a recipe changes against the one that a run has kept, by meaning.

    Args:
        path: the recipe.yaml of a run, perhaps of another version: a key that it lacks has its
            default there.
        recipe: the one to go on with.

    Returns:
        (key, stored value, new value) of each key that differs, in the order of the keys. The new
        value of a key that no longer exists is None, as is the stored one of a missing key that has
        no default. Keys in CHANGEABLE are among them.

    Raises:
        UserError: the file is no recipe.
        OSError: it cannot be read.
    """
    stored = {
        key: tuple(value) if isinstance(value, list) else value
        for key, (value, _) in plain_yaml.read_file(path).items()
    }
    pairs = {}
    for key, field in KEYS.items():
        default = None if field.default is dataclasses.MISSING else field.default
        pairs[key] = stored.get(key, default), getattr(recipe, key)
    pairs |= {key: (value, None) for key, value in stored.items() if key not in KEYS}
    return [(key, old, new) for key, (old, new) in pairs.items() if old != new]


def shorten(value: object) -> str:
    """A value as an error shows it."""
    text = repr(value)
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."


def to_text(value: object) -> str:
    """A value as a recipe has it."""
    return str(value).lower() if isinstance(value, bool) else str(value)
