"""Recipes and schedules: what is accepted, what is refused, what the rate is."""

import dataclasses

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from prep.errors import UserError
from train import recipe as recipes
from train.schedule import learning_rate

MINIMAL = {"crop": [64, 64], "batch": 4, "steps": 100, "learning_rate": 1e-3}


def write(path, **values):
    """A recipe file of MINIMAL with other values."""
    path.write_text(yaml.safe_dump({**MINIMAL, **values}))
    return path


@pytest.mark.parametrize("name", [path.stem for path in recipes.FOLDER.glob("*.yaml")])
def test_the_package_s_own_recipes_load(name):
    recipe = recipes.load(name)
    assert [0, *recipe.milestones, recipe.steps] == sorted({0, *recipe.milestones, recipe.steps})


def test_sparse_ground_truth_is_trained_on_at_full_resolution():
    assert recipes.load("kitti-ft").loss == "sparse"


def test_written_out_and_read_back(tmp_path):
    """The resolved recipe that a run keeps is the recipe again."""
    recipe = recipes.load(write(tmp_path / "a.yaml"), ["milestones=[10, 20]", "weight_decay=4e-4"])
    (tmp_path / "b.yaml").write_text(recipe.to_yaml())
    assert recipes.load(tmp_path / "b.yaml") == recipe
    assert recipe.weight_decay == 4e-4 and recipe.milestones == (10, 20)


def test_a_missing_key(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("crop: [64, 64]\n")
    with pytest.raises(UserError, match="batch is missing"):
        recipes.load(path)


@pytest.mark.parametrize("text", ["[1, 2", "- a\n- b", "7", "\0", ""])
def test_a_file_that_is_no_recipe(tmp_path, text):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match="a.yaml"):
        recipes.load(path)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4)
KEYS = st.sampled_from(list(recipes.KEYS))


@given(key=KEYS | st.text(max_size=12), value=VALUES)
def test_any_value_is_taken_or_refused_with_its_key(key, value):
    """No value makes another exception than the package's own, which names the key."""
    values = {**MINIMAL, key: value}
    try:
        recipe = recipes.check(values, dict.fromkeys(values, "here"), "file")
    except UserError as error:
        assert key in str(error)
    else:
        kept = getattr(recipe, key)
        assert type(kept) is not bool or type(value) is bool


def test_network_options_come_from_the_weights_unless_the_recipe_sets_them(tmp_path):
    """An option that is set, even to its default, must not contradict the weights."""
    path = write(tmp_path / "a.yaml", dense=True)
    of_file = {"variant": "nvlabs", "dense": True, "normalize_features": True, "warp_mode": "nearest"}
    adopted = recipes.adopt_network_options(recipes.load(path), of_file, "w.ckpt")
    assert {key: getattr(adopted, key) for key in of_file} == of_file
    assert dataclasses.replace(adopted, **{key: recipes.KEYS[key].default for key in of_file}
                               ) == recipes.load(path)
    with pytest.raises(UserError, match=r"a.yaml: dense is true, but w.ckpt .* dense false"):
        recipes.adopt_network_options(recipes.load(path), {**of_file, "dense": False}, "w.ckpt")
    with pytest.raises(UserError, match=r"the command line: normalize_features is false, but w.ckpt"):
        recipe = recipes.load(path, ["normalize_features=false"])
        recipes.adopt_network_options(recipe, of_file, "w.ckpt")
    with pytest.raises(UserError, match="w.ckpt: warp_mode is 'cubic'"):
        recipes.adopt_network_options(recipes.load(path), {"warp_mode": "cubic"}, "w.ckpt")


def test_an_adopted_option_that_does_not_fit(tmp_path):
    recipe = recipes.load(write(tmp_path / "a.yaml", start_from_coarser_flow=True))
    with pytest.raises(UserError, match="start_from_coarser_flow is true and dense false"):
        recipes.adopt_network_options(recipe, {"dense": False}, "w.ckpt")


def test_recipes_are_compared_by_meaning(tmp_path):
    """Not by text: a key that a stored recipe lacks has its default there."""
    recipe = recipes.load(write(tmp_path / "a.yaml", milestones=[10, 20]))
    (tmp_path / "whole.yaml").write_text(recipe.to_yaml())
    for name in ("a.yaml", "whole.yaml"):
        assert recipes.differences(tmp_path / name, recipe) == []
    new = recipes.load(tmp_path / "a.yaml", ["steps=200", "noise=0.5", "milestones=[10]"])
    assert recipes.differences(tmp_path / "a.yaml", new) == [
        ("noise", 0.0, 0.5), ("steps", 100, 200), ("milestones", (10, 20), (10,))]
    assert {"steps", "noise", "milestones"} - {*recipes.CHANGEABLE} == {"noise", "milestones"}
    (tmp_path / "old.yaml").write_text("crop: [64, 64]\nbatch: 4\nlearning_rate: 0.001\ngone: 3\n")
    assert recipes.differences(tmp_path / "old.yaml", recipe) == [
        ("steps", None, 100), ("milestones", (), (10, 20)), ("gone", 3, None)]


@pytest.mark.parametrize("key,value,words", [
    ("scale", "[1.5, 1.0]", "the smaller one first"), ("gamma", "[2, 1]", "the smaller one first"),
    ("scale", "[0, 1]", "at least 0.25"), ("gamma", "1.5", "a list of 2 numbers"),
    ("noise", "4", "at most 1"), ("affine", "true", "of type float")])
def test_augmentation_out_of_range(tmp_path, key, value, words):
    with pytest.raises(UserError, match=f"{key} .*{words}"):
        recipes.load(write(tmp_path / "a.yaml"), [f"{key}={value}"])


def test_milestones():
    recipe = recipes.Recipe(crop=(64, 64), batch=1, steps=9, learning_rate=8.0, milestones=(2, 5))
    assert [learning_rate(recipe, step) for step in (0, 1, 2, 4, 5, 8)] == [8, 8, 4, 4, 2, 2]


def test_cosine_with_warm_up():
    """Up in equal parts to the curve, which falls to zero at the end of the run."""
    recipe = recipes.Recipe(crop=(64, 64), batch=1, steps=100, learning_rate=1.0, schedule="cosine",
                            warm_up=4)
    rates = [learning_rate(recipe, step) for step in range(100)]
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1], rel=3e-3)
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert rates[50] == pytest.approx(0.5) and learning_rate(recipe, 100) == 0


def test_one_cycle():
    """Up from a twenty-fifth to the whole rate in a tenth of the run, then down to a thousandth."""
    recipe = recipes.Recipe(crop=(64, 64), batch=1, steps=100, learning_rate=1.0,
                            schedule="one-cycle")
    rates = [learning_rate(recipe, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.04) and rates[10] == 1 == max(rates)
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert learning_rate(recipe, 100) == pytest.approx(1e-3)
