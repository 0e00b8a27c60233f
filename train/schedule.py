"""Learning-rate schedules, as pure functions of the step."""

import math

from train.recipe import Recipe

RISE = 0.1
"""One-cycle: share of the run in which the rate rises."""
INITIAL, FINAL = 1 / 25, 1e-3
"""One-cycle: first and last rate, relative to the peak."""


def learning_rate(recipe: Recipe, step: int) -> float:
    """The learning rate of a step, counted from 0.

    "milestones" halves the rate at each of `recipe.milestones` (the S_long and S_fine schedules of FlowNet 2.0);
    "cosine" lets it decay to zero over the whole run (Loshchilov and Hutter, "SGDR", 2017); "one-cycle" lets it
    rise and decay along cosines (Smith and Topin, "Super-Convergence", 2018). The first `recipe.warmup_steps`
    steps multiply that by (step + 1) / warmup_steps (Goyal et al., "Accurate, Large Minibatch SGD", 2017).
    """
    return schedule(recipe, step) * min(1.0, (step + 1) / max(1, recipe.warmup_steps))


def schedule(recipe: Recipe, step: int) -> float:
    """The learning rate without warm-up."""
    if recipe.schedule == "milestones":
        return recipe.learning_rate * 0.5 ** sum(step >= milestone for milestone in recipe.milestones)
    if recipe.schedule == "cosine":
        return recipe.learning_rate * interpolate(1, 0, step / recipe.steps)
    rising = max(1, round(RISE * recipe.steps))
    if step < rising:
        return recipe.learning_rate * interpolate(INITIAL, 1, step / rising)
    return recipe.learning_rate * interpolate(1, FINAL, (step - rising) / max(1, recipe.steps - rising))


def interpolate(start: float, end: float, fraction: float) -> float:
    """The value at a fraction in [0, 1] of the way from start to end along half a cosine."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * fraction))
