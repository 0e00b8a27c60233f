"""Data-parallel training of PWC-Net: recipes, training step, trainer, checkpoints, curves, evaluation.

From a script, by itself or under mpirun:

    from train import Recipe, RunConfig, start_trainer

    config = RunConfig(Recipe.load("example", ["steps=100"]), data=["data/example-mindrecord"], out="runs/script")
    with start_trainer(config) as trainer:
        results = trainer.fit()
    print(f"validation EPE {results.metrics.epe:.3f} px")

Importing this package imports nothing; the names below are imported when they are first used, `Trainer` with MindSpore.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from train.recipe import Recipe
    from train.results import Results
    from train.run import RunConfig, start_trainer
    from train.trainer import Trainer

__all__ = ["Recipe", "Results", "RunConfig", "Trainer", "start_trainer"]

_MODULES = {
    "Recipe": "recipe",
    "Results": "results",
    "RunConfig": "run",
    "Trainer": "trainer",
    "start_trainer": "run",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
