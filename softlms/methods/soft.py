"""SoftLMs: soft thresholds that learn ranks until the model meets its budget, and recovery."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import PreTrainedModel

from softlms.architectures import find_targets
from softlms.budget import Budget
from softlms.layers import UNIT, UNITS, LowRankLinear, SoftLinear
from softlms.losses import COMPRESSION_LOSSES
from softlms.methods.base import Method, Work
from softlms.methods.factors import FactorsConfig, factors_of
from softlms.ranges import check_positive
from softlms.surgery import decompose, deploy
from softlms.thresholds import SHARPNESS
from softlms.training import DEADLINE, SoftTrainer

__all__ = ["METHODS", "SoftConfig"]


@dataclass(frozen=True)
class SoftConfig(FactorsConfig):
    """Settings of soft thresholds; see `FactorsConfig` for the others.

    Attributes
    ----------
    learning_rate : float
        Of the training that learns the ranks and recovers.
    gamma, alpha_learning_rate, deadline, compression_loss, weigh_by_size
        See `softlms.SoftTrainer`.
    s, unit
        See `softlms.decompose`.
    further_keeps : tuple of float
        Smaller budgets to which the trained model is also cut, without further training, to score it there.

    Raises
    ------
    ValueError
        A setting is unknown or out of range.
    """

    learning_rate: float = 5e-5
    gamma: float | None = None
    alpha_learning_rate: float | None = None
    deadline: float = DEADLINE
    s: float = SHARPNESS
    unit: str = UNIT
    compression_loss: str = "adaptive"
    weigh_by_size: bool = False
    further_keeps: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for keep in self.further_keeps:
            Budget(keep, self.count)
        if self.unit not in UNITS or self.compression_loss not in COMPRESSION_LOSSES:
            raise ValueError(
                f"unit must be one of {', '.join(UNITS)} and compression_loss one of {', '.join(COMPRESSION_LOSSES)}; "
                f"got {self.unit!r} and {self.compression_loss!r}."
            )
        check_positive(s=self.s)
        check_positive(most=1, learning_rate=self.learning_rate, deadline=self.deadline)
        if self.gamma is not None:
            check_positive(gamma=self.gamma)
        if self.alpha_learning_rate is not None:
            check_positive(most=1, alpha_learning_rate=self.alpha_learning_rate)


def apply(model: PreTrainedModel, config: SoftConfig, work: Work) -> dict[str, Any]:
    """Decompose a model, learn its ranks, let it recover, and deploy it."""
    factors = factors_of(model, config.factors, config.calibration_rows, work)
    decompose(model, factors, s=config.s, unit=config.unit)

    def cut_to(keep: float) -> PreTrainedModel:
        return deploy(copy.deepcopy(model), keep, config.count, costs=work.costs)

    untuned = work.scores(lambda: cut_to(config.keep))
    if not config.epochs:
        deploy(model, config.keep, config.count, costs=work.costs)
        return {"untuned": untuned, "ranks": _ranks(model), "steps": 0, "history": []}
    work.note(f"learning ranks, to keep {config.keep:.0%} of {config.count}")
    trainer = SoftTrainer(
        model,
        keep=config.keep,
        count=config.count,
        costs=work.costs,
        gamma=config.gamma,
        alpha_learning_rate=config.alpha_learning_rate,
        deadline=config.deadline,
        compression_loss=config.compression_loss,
        weigh_by_size=config.weigh_by_size,
        **work.training("compressing", config.learning_rate, config.epochs),
    )
    work.train(trainer)
    ranks = trainer.ranks
    further = {str(keep): work.scores(partial(cut_to, keep)) for keep in config.further_keeps if keep < config.keep}
    deploy(model, costs=work.costs)
    return {
        "untuned": untuned,
        "ranks": ranks,
        "frozen_at": trainer.schedule.frozen_at,
        "further": further,
        "steps": trainer.state.global_step,
        "history": [entry for entry in trainer.state.log_history if "loss" in entry],
    }


def _ranks(model: PreTrainedModel) -> dict[str, int]:
    """Ranks of a deployed model; a dense layer counts all its components."""
    return {target.name: getattr(target.module, "rank", min(target.shape)) for target in find_targets(model)}


METHODS = (Method("soft", SoftConfig, apply, (SoftLinear, LowRankLinear), takes_factors=True),)
