"""Recipes and schedules: what is accepted, what is refused, and the learning rate."""

import dataclasses
import pathlib
import time
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.errors import UserError
from train import recipe as recipes
from train.recipe import Recipe
from train.schedule import learning_rate

MINIMAL = {"crop": [64, 64], "batch": 4, "steps": 100, "learning_rate": 1e-3}

KEYS = st.sampled_from(list(recipes.KEYS))


def write(path: pathlib.Path, **values: object) -> pathlib.Path:
    """A recipe file of MINIMAL with other values."""
    path.write_text(yaml.safe_dump({**MINIMAL, **values}))
    return path


@pytest.mark.parametrize("name", [path.stem for path in recipes.FOLDER.glob("*.yaml")])
def test_the_built_in_recipes_load(name: str) -> None:
    recipe = Recipe.load(name)
    assert [0, *recipe.milestones, recipe.steps] == sorted({0, *recipe.milestones, recipe.steps})


def test_sparse_ground_truth_is_trained_at_full_resolution() -> None:
    assert Recipe.load("kitti-ft").loss == "sparse"


def test_a_stored_recipe_loads_as_the_same_recipe(tmp_path: pathlib.Path) -> None:
    """With its defaults written out, as a run stores it."""
    recipe = Recipe.load(write(tmp_path / "a.yaml"), ["milestones=[10, 20]", "weight_decay=4e-4"])
    (tmp_path / "b.yaml").write_text(recipe.to_yaml())
    assert Recipe.load(tmp_path / "b.yaml") == recipe
    assert recipe.weight_decay == 4e-4 and recipe.milestones == (10, 20)


WRONG = {
    "nested aliases": (
        "a: &a [1, 1]\n"
        + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
        1,
        "anchors",
    ),
    "one alias": ("batch: 4\nsteps: *batch", 2, "anchors and aliases"),
    "brackets": ("crop: " + "[" * 20_000, 1, "nested too deeply"),
    "keys in keys": ("? " * 20_000, 1, "nested too deeply"),
    "lists in lists": ("batch: 4\ncrop: [[[[1]]]]", 2, "nested too deeply"),
    "a long number": ("batch: 4\nseed: " + "9" * 5000, 2, "5000 characters"),
    "a long whole number": (f"seed: {10**90}", 1, "seed is 1000.*; expected at most 2147483647"),
    "a long number for a float": (f"noise: {10**90}", 1, r"noise is 1e\+90; expected at most 1"),
    "a date": ("batch: 4\n\n# why\nsteps: 2001-99-99", 4, "steps is '2001-99-99'"),
    "a number without digits": ("batch: 4\nsteps: 0x_", 2, "not YAML .*base 16"),
    "an octal number": ("batch: 4\nsteps: 010", 2, "010 is a number in base 8 or 60 to YAML; write a decimal number"),
    "a number in base 60": ("batch: 4\nmilestones: [1, 1:30]", 2, "1:30 is a number in base 8 or 60"),
    "a number in base 60 with a fraction": ("noise: -1:30.5", 1, "-1:30.5 is a number in base 8 or 60"),
    "an escape beyond Unicode": ('batch: "\\UFFFFFFFF"', None, "not YAML"),
    "a tag": ("batch: !!python/name:os.system x", 1, "tags"),
    "a merge": ("batch: 4\n<<: {steps: 3}", 2, "<< is not a recipe key"),
    "no text": ("batch: 4\n\x07", 2, "not YAML .*special characters"),
    "no UTF-8": (b"batch: 4\n\n\xff", 3, "not UTF-8"),
    "too long": ("#" * 70_000, None, "more than 65536 bytes"),
    "a key twice": ("batch: 4\nsteps: 3\nbatch: 8", 3, "batch is already set in line 1"),
    "a list for a key": ("[a, b]: 4", 1, r"the key is \['a', 'b'\]"),
    "two documents": ("batch: 4\n---\nsteps: 3", 2, "another document"),
    "an open quote": ('batch: 4\nvariant: "irr', 2, "not YAML .*quoted scalar"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_an_invalid_file_is_refused_with_its_line(tmp_path: pathlib.Path, kind: str) -> None:
    """At once, whatever YAML it is."""
    content, line, words = WRONG[kind]
    path = tmp_path / "a.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    before = time.process_time()
    with pytest.raises(UserError, match=f"a.yaml{f', line {line}' if line else ''}: .*{words}") as error:
        Recipe.load(path)
    assert time.process_time() - before < 2 and len(str(error.value)) < 1000


@pytest.mark.parametrize(
    "overrides,words",
    [
        (["batch=8", "steps=1", "batch=9"], "batch is given twice on the command line, as '8' and '9'"),
        (["batch=" + "[" * 20_000], "nested too deeply"),
        (["batch=&a 4"], r"'batch=&a 4' on the command line: .*anchors"),
        (["batch=" + "9" * 5000], "5000 characters"),
        (["steps=2001-99-99"], "the command line: steps is '2001-99-99'"),
        (["batch"], "'batch' on the command line: expected key=value"),
        (["seed=010"], "'seed=010' on the command line: not YAML .010 is a number in base 8"),
        (["batch="], "the command line: batch is None"),
    ],
)
def test_wrong_values_on_the_command_line_are_refused(tmp_path: pathlib.Path, overrides: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        Recipe.load(write(tmp_path / "a.yaml"), overrides)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    "overrides,words",
    [
        (["milestones=[20, 10]"], "milestones is .20, 10.; expected steps in ascending order"),
        (["milestones=[20, 20]"], "milestones is .20, 20.; expected steps in ascending order"),
        (["milestones=[20, 100]"], "milestones ends at 100, but steps is 100"),
        (["warmup_steps=101"], "warmup_steps is 101, but steps is 100"),
    ],
)
def test_a_schedule_that_does_not_fit_the_run_is_refused(
    tmp_path: pathlib.Path, overrides: list[str], words: str
) -> None:
    path = write(tmp_path / "a.yaml")
    with pytest.raises(UserError, match=f"a.yaml with the command line: {words}"):
        Recipe.load(path, overrides)
    Recipe.load(path, ["milestones=[20, 99]", "warmup_steps=100"])
    Recipe.load(path, ["milestones=[100]", "schedule=cosine"])  # which does not look at them


def mutated(text: str) -> st.SearchStrategy[str]:
    """A recipe's text with a few places replaced by text or by YAML syntax."""
    pieces = st.sampled_from(
        [
            "[",
            "{",
            "&a ",
            "*a",
            "!!",
            "? ",
            ": ",
            "- ",
            "<<",
            "|",
            "\n",
            "\t",
            '"',
            "'",
            "%",
            "#",
            "---\n",
            "\0",
            "\ufeff",
            "0x_",
            "1e999",
            ".inf",
            "1:30",
            "~",
        ]
    )
    edit = st.tuples(st.integers(0, len(text)), st.integers(0, 30), pieces | st.text(max_size=20))

    def apply(edits: list[tuple[int, int, str]]) -> str:
        changed = text
        for start, length, piece in edits:
            changed = changed[:start] + piece + changed[start + length :]
        return changed

    return st.lists(edit, min_size=1, max_size=4).map(apply)


OWN = [path.read_text() for path in sorted(recipes.FOLDER.glob("*.yaml"))]


@settings(max_examples=300)
@given(
    content=st.binary()
    | st.text().map(str.encode)
    | st.sampled_from(OWN).flatmap(mutated).map(lambda text: text.encode("utf-8", "surrogatepass"))
)
def test_any_file_is_a_recipe_or_refused_with_its_name(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(content)
    try:
        recipe = Recipe.load(path)
    except UserError as error:
        assert str(error).startswith(str(path))
    else:
        assert recipe.sources.keys() <= recipes.KEYS.keys()


@given(text=st.text() | st.tuples(KEYS, st.text()).map("=".join))
def test_any_override_is_accepted_or_refused(text: str) -> None:
    try:
        Recipe.load("example", [text])
    except UserError as error:
        assert "command line" in str(error)


def test_a_missing_key_is_named(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("crop: [64, 64]\n")
    with pytest.raises(UserError, match="batch is missing"):
        Recipe.load(path)


@pytest.mark.parametrize("text", ["[1, 2", "- a\n- b", "7", "\0", ""])
def test_the_error_names_the_file(tmp_path: pathlib.Path, text: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"a\.yaml"):
        Recipe.load(path)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@given(key=KEYS | st.text(max_size=12), value=VALUES)
def test_any_value_is_accepted_or_refused_with_its_key(key: str, value: Any) -> None:
    """No value raises another exception than UserError, which names the key."""
    values = {**MINIMAL, key: value}
    try:
        recipe = recipes.build(values, dict.fromkeys(values, "here"), "file")
    except UserError as error:
        assert key in str(error)
    else:
        kept = getattr(recipe, key)
        assert type(kept) is not bool or type(value) is bool


def test_network_options_come_from_the_weights_unless_the_recipe_sets_them(tmp_path: pathlib.Path) -> None:
    """An option that is set, even to its default, must not contradict the weights."""
    path = write(tmp_path / "a.yaml", dense=True)
    of_file = {"variant": "nvlabs", "dense": True, "normalize_features": True, "warp_mode": "nearest"}
    adopted = recipes.adopt_network_options(Recipe.load(path), of_file, "w.ckpt")
    assert {key: getattr(adopted, key) for key in of_file} == of_file
    assert dataclasses.replace(adopted, **{key: recipes.KEYS[key].default for key in of_file}) == Recipe.load(path)
    with pytest.raises(UserError, match=r"a.yaml, line 5: dense is true, but w.ckpt .* dense false"):
        recipes.adopt_network_options(Recipe.load(path), {**of_file, "dense": False}, "w.ckpt")
    with pytest.raises(UserError, match=r"the command line: normalize_features is false, but w.ckpt"):
        recipe = Recipe.load(path, ["normalize_features=false"])
        recipes.adopt_network_options(recipe, of_file, "w.ckpt")
    with pytest.raises(UserError, match=r"w\.ckpt: warp_mode is 'cubic'"):
        recipes.adopt_network_options(Recipe.load(path), {"warp_mode": "cubic"}, "w.ckpt")


def test_an_adopted_option_that_contradicts_the_recipe_is_refused(tmp_path: pathlib.Path) -> None:
    recipe = Recipe.load(write(tmp_path / "a.yaml", start_from_coarser_flow=True))
    with pytest.raises(UserError, match=r"w\.ckpt is of a network with dense false: start_from_.*set start_"):
        recipes.adopt_network_options(recipe, {"dense": False}, "w.ckpt")


def test_recipes_are_compared_by_meaning(tmp_path: pathlib.Path) -> None:
    """A key that a stored recipe lacks has its default there."""
    recipe = Recipe.load(write(tmp_path / "a.yaml", milestones=[10, 20]))
    (tmp_path / "whole.yaml").write_text(recipe.to_yaml())
    for name in ("a.yaml", "whole.yaml"):
        assert recipes.differences(tmp_path / name, recipe) == []
    new = Recipe.load(tmp_path / "a.yaml", ["steps=200", "noise=0.5", "milestones=[10]"])
    assert recipes.differences(tmp_path / "a.yaml", new) == [
        ("noise", 0.0, 0.5),
        ("steps", 100, 200),
        ("milestones", (10, 20), (10,)),
    ]
    assert {"steps", "noise", "milestones"} - {*recipes.CHANGEABLE} == {"noise", "milestones"}
    (tmp_path / "old.yaml").write_text("crop: [64, 64]\nbatch: 4\nlearning_rate: 0.001\ngone: 3\n")
    assert recipes.differences(tmp_path / "old.yaml", recipe) == [
        ("steps", None, 100),
        ("milestones", (), (10, 20)),
        ("gone", 3, None),
    ]


@pytest.mark.parametrize("old,new,value", [("average", "ema_decay", 0.999), ("warm_up", "warmup_steps", 5)])
def test_former_names_of_keys_work_with_a_note(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], old: str, new: str, value: float
) -> None:
    """In a file and on the command line; a run that was stored under the old name resumes under the new one."""
    path = write(tmp_path / "a.yaml", **{old: value})
    recipe = Recipe.load(path)
    assert getattr(recipe, new) == value
    assert capsys.readouterr().err == f"note: {recipe.sources[new]}: {old} is now called {new}\n"
    assert recipe == Recipe.load(write(tmp_path / "b.yaml"), [f"{old}={value}"])
    assert f"the command line: {old} is now called {new}" in capsys.readouterr().err
    assert recipes.differences(path, recipe) == []
    with pytest.raises(UserError, match=f"{new} is given twice"):
        Recipe.load(path, [f"{old}={value}", f"{new}={value}"])
    with pytest.raises(UserError, match=f"{new} is already set"):
        Recipe.load(write(tmp_path / "c.yaml", **{old: value, new: value}))


@pytest.mark.parametrize(
    "key,value,words",
    [
        ("scale", "[1.5, 1.0]", "the smaller value first"),
        ("gamma", "[2, 1]", "the smaller value first"),
        ("scale", "[0, 1]", "at least 0.25"),
        ("gamma", "1.5", "a list of 2 numbers"),
        ("noise", "4", "at most 1"),
        ("affine", "true", "of type float"),
    ],
)
def test_augmentation_out_of_range_is_refused(tmp_path: pathlib.Path, key: str, value: Any, words: str) -> None:
    with pytest.raises(UserError, match=f"{key} .*{words}"):
        Recipe.load(write(tmp_path / "a.yaml"), [f"{key}={value}"])


def test_milestones_halve_the_rate() -> None:
    recipe = Recipe(crop=(64, 64), batch=1, steps=9, learning_rate=8.0, milestones=(2, 5))
    assert [learning_rate(recipe, step) for step in (0, 1, 2, 4, 5, 8)] == [8, 8, 4, 4, 2, 2]


def test_cosine_decays_to_zero_after_the_warm_up() -> None:
    """The warm-up rises to the curve in equal steps."""
    recipe = Recipe(crop=(64, 64), batch=1, steps=100, learning_rate=1.0, schedule="cosine", warmup_steps=4)
    rates = [learning_rate(recipe, step) for step in range(100)]
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1], rel=3e-3)
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert rates[50] == pytest.approx(0.5) and learning_rate(recipe, 100) == 0


def test_one_cycle_rises_and_decays() -> None:
    """From a twenty-fifth to the peak in a tenth of the run, then to a thousandth."""
    recipe = Recipe(crop=(64, 64), batch=1, steps=100, learning_rate=1.0, schedule="one-cycle")
    rates = [learning_rate(recipe, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.04) and rates[10] == 1 == max(rates)
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert learning_rate(recipe, 100) == pytest.approx(1e-3)


def rows_of(section: str) -> list[list[str]]:
    """The rows of the first table in a section of train/recipes/README.md, as cells without backquotes."""
    text = (recipes.FOLDER / "README.md").read_text().partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip().replace("`", "") for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_readme_lists_every_key_with_its_default_and_unit() -> None:
    rows = {key: (default, unit, meaning) for key, default, unit, meaning in rows_of("Keys")}
    assert list(rows) == list(recipes.KEYS), "the same keys in the same order"
    for key, field in recipes.KEYS.items():
        default, unit, meaning = rows[key]
        required = field.default is dataclasses.MISSING
        assert default == ("required" if required else recipes.to_text(field.default)), key
        assert unit and meaning, key


def test_the_readme_lists_every_recipe_with_its_settings() -> None:
    rows = {row[0]: row for row in rows_of("Recipes")}
    assert sorted(rows) == sorted(path.stem for path in recipes.FOLDER.glob("*.yaml"))
    for name, (_, _, steps, crop, batch, _) in rows.items():
        recipe = Recipe.load(name)
        assert steps == f"{recipe.steps:,}"
        assert crop == f"{recipe.crop[0]}x{recipe.crop[1]}" and batch == str(recipe.batch)
