"""Factors of a model from some of its training rows, computed once for all methods that take them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import datasets
from transformers import PreTrainedModel

from softlms.budget import Budget
from softlms.lowrank.calibration import LayerStatistics, calibrate, output_gradients
from softlms.lowrank.factorization import FACTORIZATIONS, Factors, factorize
from softlms.methods.base import Config, Work
from softlms.utils.ranges import check_at_least_one, check_positive

__all__ = ["FactorsConfig", "calibration_sample", "check_factors", "curvature_of", "factors_of"]


def check_factors(name: str) -> None:
    """Raise ValueError for an unknown factorization."""
    if name not in FACTORIZATIONS:
        raise ValueError(f"Unknown factorization {name!r}; known: {', '.join(FACTORIZATIONS)}.")


@dataclass(frozen=True)
class FactorsConfig(Config):
    """Settings of every method that cuts factors to a budget.

    Attributes
    ----------
    factors : {"svd", "fwsvd", "asvd", "whitened", "kfac"}
        See `softlms.factorize`.
    keep, count
        See `softlms.Budget`.
    epochs : float
        Of all training that the method does; 0 cuts without any.
    calibration_rows : int
        Training rows for factors that depend on data, and for gradients.

    Raises
    ------
    ValueError
        A setting is unknown or out of range.
    """

    factors: str = "whitened"
    keep: float = 0.5
    count: str = "linear"
    epochs: float = 3
    calibration_rows: int = 256

    def __post_init__(self) -> None:
        check_factors(self.factors)
        Budget(self.keep, self.count)
        if self.epochs:
            check_positive(epochs=self.epochs)
        check_at_least_one(calibration_rows=self.calibration_rows)

    def unused(self) -> tuple[str, ...]:
        return ("calibration_rows",) if self.factors == "svd" else ()


def factors_of(model: PreTrainedModel, factorization: str, rows: int, work: Work) -> dict[str, Factors]:
    """Factors of all targets, from `rows` training rows if they depend on data."""
    name = factorization if factorization == "svd" else f"{factorization} from {rows} rows"
    if name not in work.shared:
        statistics = None
        if factorization == "kfac":
            statistics = curvature_of(model, rows, work)
        elif factorization != "svd":
            statistics = _statistics(model, rows, work, fisher=factorization == "fwsvd")
        work.note(f"decomposing with {factorization} factors")
        work.shared[name] = factorize(model, factorization, statistics)
    return work.shared[name]


def curvature_of(model: PreTrainedModel, rows: int, work: Work) -> dict[str, LayerStatistics]:
    """Inputs and output gradients from `rows` training rows."""
    name = f"curvature from {rows} rows"
    if name not in work.shared:
        known = _statistics(model, rows, work, fisher=False)
        work.note("measuring how much the loss depends on each layer")
        gradients = output_gradients(model, calibration_sample(work, rows), work.collator)
        work.shared[name] = {layer: replace(known[layer], gradient=gradients[layer]) for layer in known}
    curvature: dict[str, LayerStatistics] = work.shared[name]
    return curvature


def calibration_sample(work: Work, number: int) -> datasets.Dataset:
    """Training rows drawn by the seed; all of them if there are fewer."""
    rows = work.rows.shuffle(seed=work.seed)
    return rows.select(range(min(number, len(rows))))


def _statistics(model: PreTrainedModel, number: int, work: Work, *, fisher: bool) -> dict[str, LayerStatistics]:
    name, shared = f"statistics from {number} rows, {fisher=}", work.shared
    if name not in shared:
        rows = calibration_sample(work, number)
        shared[name] = calibrate(model, rows, work.collator, rows=len(rows), fisher=fisher)
    known: Any = shared[name]
    return known
