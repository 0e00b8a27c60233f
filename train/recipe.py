"""Recipes: everything that decides what a training run learns, as typed YAML."""

import dataclasses
import difflib
import math
import pathlib
import typing

import yaml

from prep.errors import UserError

FOLDER = pathlib.Path(__file__).resolve().parent / "recipes"
NETWORK_OPTIONS = ("variant", "dense", "normalize_features", "warp_mode")
"""Keys that build the network, `model.pwcnet.PWCNet`; checkpoints hold them too."""
CHANGEABLE = ("steps", "log_every", "validate_every", "validation_batch", "checkpoint_every")
"""Keys that may change when a run goes on."""


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
        if self.start_from_coarser_flow and not self.dense:
            raise UserError("start_from_coarser_flow is true and dense false; plain estimators do "
                            "not see the coarser flow in their last layer: turn one of them round")

    def to_yaml(self):
        """The whole recipe, defaults written out, as YAML text."""
        values = {key: list(value) if isinstance(value, tuple) else value
                  for key, value in ((key, getattr(self, key)) for key in KEYS)}
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
        values = read(path)
    except FileNotFoundError:
        known = ", ".join(sorted(file.stem for file in FOLDER.glob("*.yaml")))
        raise UserError(f"{name}: no such recipe; give a YAML file or one of: {known}") from None
    sources = dict.fromkeys(values, str(path))
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"{text!r} on the command line: expected key=value")
        try:
            values[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UserError(f"{text!r} on the command line: the value is not YAML") from None
        sources[key] = "the command line"
    return check(values, sources, path)


def read(path: pathlib.Path) -> dict:
    """The keys and plain values of a recipe file, unchecked.

    Raises:
        UserError: not YAML, or no lines of `key: value`.
        OSError: the file cannot be read.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds {type(values).__name__}, expected lines of `key: value`")
    return values


def check(values, sources, path):
    """Build a Recipe from plain values; `sources` says for each key where it was given."""
    types = typing.get_type_hints(Recipe)
    checked = {}
    for key, value in values.items():
        where = f"{sources[key]}: {key}"
        if key not in KEYS:
            near = difflib.get_close_matches(str(key), KEYS, 1, 0.4)
            advice = f"did you mean {near[0]}?" if near else "known keys: " + ", ".join(KEYS)
            raise UserError(f"{where} is not a key of a recipe; {advice}")
        checked[key] = check_value(where, value, types[key], KEYS[key].metadata)
    missing = [name for name, field in KEYS.items()
               if name not in checked and field.default is dataclasses.MISSING]
    if missing:
        raise UserError(f"{path}: {missing[0]} is missing; add a line `{missing[0]}: ...`")
    return Recipe(**checked, sources=sources)


def check_value(where, value, kind, limits):
    """Return the value in its type or raise UserError, naming where it was given."""
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)
        open_ended = inner[-1] is Ellipsis
        if not isinstance(value, list) or not (open_ended or len(value) == len(inner)):
            count = "" if open_ended else f"{len(inner)} "
            raise UserError(f"{where} is {value!r}; expected a list of {count}numbers, as [a, b]")
        return tuple(check_value(where, item, inner[0], limits) for item in value)
    if kind is float and isinstance(value, str):  # YAML reads 1e-4 as a text
        try:
            value = float(value)
        except ValueError:
            pass
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise UserError(f"{where} is {value!r}; expected a value of type {kind.__name__}")
    choices, low, high, above = (limits.get(key) for key in ("choices", "low", "high", "above"))
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
                f"a network with {key} {to_text(value)}; remove {key} or use other weights")
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
    stored = {key: tuple(value) if isinstance(value, list) else value
              for key, value in read(path).items()}
    pairs = {}
    for key, field in KEYS.items():
        default = None if field.default is dataclasses.MISSING else field.default
        pairs[key] = stored.get(key, default), getattr(recipe, key)
    pairs |= {key: (value, None) for key, value in stored.items() if key not in KEYS}
    return [(key, old, new) for key, (old, new) in pairs.items() if old != new]


def to_text(value: object) -> str:
    """A value as a recipe has it."""
    return str(value).lower() if isinstance(value, bool) else str(value)
