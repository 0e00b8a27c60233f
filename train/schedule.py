"""Learning-rate schedules, as pure functions of the step."""

import math

WARM_UP = 0.1
"""One-cycle: share of the run in which the rate rises."""
INITIAL, FINAL = 1 / 25, 1e-3
"""One-cycle: first and last rate, over the highest."""


def learning_rate(recipe, step):
    """The learning rate of a step (from 0).

    "milestones" halves it at each of `recipe.milestones` (the S_long and S_fine schedules of FlowNet
    2.0); "cosine" lets it fall to zero over the whole run (Loshchilov and Hutter, "SGDR", 2017);
    "one-cycle" rises to it and falls again by cosines (Smith and Topin, "Super-Convergence", 2018).
    During the first `recipe.warm_up` steps it is the share (step + 1) / warm_up of that (Goyal et
    al., "Accurate, Large Minibatch SGD", 2017).
    """
    return schedule(recipe, step) * min(1.0, (step + 1) / max(1, recipe.warm_up))


def schedule(recipe, step):
    """The learning rate without warm-up."""
    if recipe.schedule == "milestones":
        return recipe.learning_rate * 0.5 ** sum(step >= mark for mark in recipe.milestones)
    if recipe.schedule == "cosine":
        return recipe.learning_rate * between(1, 0, step / recipe.steps)
    rising = max(1, round(WARM_UP * recipe.steps))
    if step < rising:
        return recipe.learning_rate * between(INITIAL, 1, step / rising)
    return recipe.learning_rate * between(1, FINAL, (step - rising) / max(1, recipe.steps - rising))


def between(start, end, share):
    """From start to end along half a cosine, at a share in [0, 1] of the way."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * share))
