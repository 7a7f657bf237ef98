"""Masks: a search with frozen weights for the components to keep, then the cut and recovery."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from softlms.budget import Budget
from softlms.layers import LowRankLinear
from softlms.lowrank.factorization import Factors
from softlms.lowrank.masks import MaskedLinear, MaskTrainer
from softlms.methods.base import Config, Method, Work
from softlms.methods.factors import check_factors, factors_of
from softlms.methods.static import recover
from softlms.ranges import check_at_least_one, check_positive
from softlms.surgery import truncate

__all__ = ["METHODS", "MaskConfig"]


@dataclass(frozen=True)
class MaskConfig(Config):
    """Settings of learned masks.

    Attributes
    ----------
    factors, keep, count, static_learning_rate, calibration_rows
        See `softlms.methods.static.StaticConfig`.
    epochs : float
        Of search and recovery together.
    mask_learning_rate : float
        Learning rate of the masks' scores; see `softlms.MaskTrainer`.

    Raises
    ------
    ValueError
        A setting is unknown or out of range.
    """

    factors: str = "whitened"
    keep: float = 0.5
    count: str = "linear"
    epochs: float = 3
    static_learning_rate: float = 2e-4
    mask_learning_rate: float = 0.05
    calibration_rows: int = 256

    def __post_init__(self) -> None:
        check_factors(self.factors)
        Budget(self.keep, self.count)
        if not self.epochs:
            raise ValueError("Masks are learned in training: epochs must be above 0.")
        check_positive(epochs=self.epochs)
        check_positive(
            most=1, static_learning_rate=self.static_learning_rate, mask_learning_rate=self.mask_learning_rate
        )
        check_at_least_one(calibration_rows=self.calibration_rows)

    def unused(self) -> tuple[str, ...]:
        return ("calibration_rows",) if self.factors == "svd" else ()


def apply(model: PreTrainedModel, config: MaskConfig, work: Work) -> dict[str, Any]:
    """Search ranks on a copy, cut the model to them, and let it recover."""
    factors = factors_of(model, config.factors, config.calibration_rows, work)
    ranks, spent = _search(model, factors, config, work)
    truncate(model, ranks, factors, costs=work.costs)
    untuned = work.scores(lambda: model)
    recovered = recover(model, config.epochs, config.static_learning_rate, work, spent=spent)
    return {"ranks": ranks, "untuned": untuned, "mask_steps": spent} | recovered


def _search(
    model: PreTrainedModel, factors: dict[str, Factors], config: MaskConfig, work: Work
) -> tuple[dict[str, int], int]:
    """Return ranks and the number of steps taken."""
    trainer = MaskTrainer(
        copy.deepcopy(model),
        factors,
        keep=config.keep,
        count=config.count,
        costs=work.costs,
        **work.training("searching", config.mask_learning_rate, config.epochs),
    )
    return work.train(trainer).ranks, trainer.state.global_step


METHODS = (Method("mask", MaskConfig, apply, (MaskedLinear, LowRankLinear), takes_factors=True),)
