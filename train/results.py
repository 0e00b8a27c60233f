"""The results of a run and of its validations, and how result.json stores them."""

import dataclasses
from typing import Any

from train.metrics import Metrics


@dataclasses.dataclass(frozen=True)
class Validation:
    """The result of a validation."""

    step: int
    datasets: dict[str, Metrics]
    """Metrics by the name of the dataset; the first one decides which checkpoint is the best."""
    ema_epe: float | None = None
    """EPE of the averaged weights on the first dataset in pixels; None without an average."""

    @property
    def metrics(self) -> Metrics:
        """The metrics on the first dataset."""
        return next(iter(self.datasets.values()))

    def to_json(self) -> dict[str, Any]:
        """The validation as result.json stores it."""
        others = {name: dataclasses.asdict(metrics) for name, metrics in list(self.datasets.items())[1:]}
        average = {} if self.ema_epe is None else {"average_epe": self.ema_epe}
        return {"step": self.step, **dataclasses.asdict(self.metrics), "sets": others, **average}


@dataclasses.dataclass(frozen=True)
class Results:
    """The results of a run, the same on every rank."""

    validations: list[Validation]
    """The validations of this start, oldest first."""
    best_epe: float
    """Smallest validation EPE of the whole run in pixels, that of best.ckpt."""
    goodput: dict[str, Any]
    """See `train.goodput.account`."""
    pairs_per_second: float | None
    """Median over the logged intervals of this start; None if there were none."""
    overflows: int
    """Steps skipped because a gradient overflowed."""
    seconds: float
    """Wall time since MindSpore was started."""

    @property
    def metrics(self) -> Metrics:
        """The metrics of the last validation on the first dataset."""
        return self.validations[-1].metrics

    def to_json(self) -> dict[str, Any]:
        """The results as result.json stores them."""
        validations = [validation.to_json() for validation in self.validations]
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**validations[-1], **values, "validations": validations, "seconds": round(self.seconds, 1)}
