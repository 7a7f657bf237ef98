"""Masks: a search with frozen weights for the components to keep, then the cut and recovery."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from softlms.layers import LowRankLinear
from softlms.lowrank.factorization import Factors
from softlms.lowrank.masks import MaskedLinear, MaskTrainer
from softlms.methods.base import Method, Work
from softlms.methods.factors import FactorsConfig, factors_of
from softlms.methods.static import StaticConfig, recover
from softlms.surgery import truncate
from softlms.utils.ranges import check_positive

__all__ = ["METHODS", "MaskConfig"]


@dataclass(frozen=True)
class MaskConfig(FactorsConfig):
    """Settings of learned masks; see `FactorsConfig` for the others. The epochs are of search and recovery together.

    Attributes
    ----------
    static_learning_rate : float
        Of recovery.
    mask_learning_rate : float
        Learning rate of the masks' scores; see `softlms.MaskTrainer`.

    Raises
    ------
    ValueError
        A setting is unknown or out of range.
    """

    static_learning_rate: float = StaticConfig.static_learning_rate
    mask_learning_rate: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.epochs:
            raise ValueError("Masks are learned in training: epochs must be above 0.")
        rates = {"static_learning_rate": self.static_learning_rate, "mask_learning_rate": self.mask_learning_rate}
        check_positive(most=1, **rates)


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
