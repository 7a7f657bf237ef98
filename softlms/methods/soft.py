"""SoftLMs: soft thresholds that learn ranks until the model meets its budget, and recovery."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import PreTrainedModel

from softlms.architectures import find_targets
from softlms.budget import Budget, parameter_costs
from softlms.layers import UNIT, UNITS, LowRankLinear, SoftLinear
from softlms.losses import COMPRESSION_LOSSES
from softlms.lowrank.allocation import ALLOCATIONS, SEARCHED, WEIGHTED
from softlms.lowrank.factorization import Factors
from softlms.methods.base import Method, Work
from softlms.methods.factors import FactorsConfig, factors_of
from softlms.methods.static import static_ranks
from softlms.surgery import decompose, deploy
from softlms.thresholds import SHARPNESS
from softlms.training import DEADLINE, SoftTrainer
from softlms.utils.ranges import check_positive

__all__ = ["METHODS", "SoftConfig"]


@dataclass(frozen=True)
class SoftConfig(FactorsConfig):
    """Settings of soft thresholds; see `FactorsConfig` for the others.

    Attributes
    ----------
    learning_rate : float
        Of the training that learns the ranks and recovers.
    gamma, alpha_learning_rate, deadline, compression_loss, weigh_by_size, weigh_by_saving
        See `softlms.SoftTrainer`.
    s, unit
        See `softlms.decompose`.
    start_from : str, optional
        Allocation (see `softlms.allocate`) at whose ranks the thresholds start; layers that it leaves whole are not
        learned. By default all thresholds start at 0.
    headroom : float
        How far above these ranks they start: share of the way to break-even, above 0. At the ranks themselves the
        budget would be met before the first step, with nothing to learn.
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
    weigh_by_saving: bool = False
    start_from: str | None = None
    headroom: float = 1 / 3
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
        if self.start_from is not None and self.start_from not in ALLOCATIONS:
            raise ValueError(f"start_from must be one of {', '.join(ALLOCATIONS)}, got {self.start_from!r}.")
        check_positive(s=self.s)
        check_positive(most=1, headroom=self.headroom, learning_rate=self.learning_rate, deadline=self.deadline)
        if self.gamma is not None:
            check_positive(gamma=self.gamma)
        if self.alpha_learning_rate is not None:
            check_positive(most=1, alpha_learning_rate=self.alpha_learning_rate)

    def unused(self) -> tuple[str, ...]:
        return () if self.start_from in (*SEARCHED, *WEIGHTED) else super().unused()


def apply(model: PreTrainedModel, config: SoftConfig, work: Work) -> dict[str, Any]:
    """Decompose a model, learn its ranks, let it recover, and deploy it."""
    factors = factors_of(model, config.factors, config.calibration_rows, work)
    start = None if config.start_from is None else _start(model, factors, config, work)
    decompose(model, factors, s=config.s, unit=config.unit, ranks=start)

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
        weigh_by_saving=config.weigh_by_saving,
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


def _start(model: PreTrainedModel, factors: Mapping[str, Factors], config: SoftConfig, work: Work) -> dict[str, int]:
    """Ranks at which the thresholds start: an allocation's, and part of the way to break-even."""
    ranks = static_ranks(model, factors, config, str(config.start_from), work)
    shapes = {name: (len(f.U), len(f.V)) for name, f in factors.items()}
    costs = work.costs or parameter_costs(shapes)
    for name, rank in ranks.items():
        if rank < min(shapes[name]):
            ranks[name] = rank + math.ceil(config.headroom * max(0, costs.dense_from(name) - 1 - rank))
    return ranks


def _ranks(model: PreTrainedModel) -> dict[str, int]:
    """Ranks of a deployed model; a dense layer counts all its components."""
    return {target.name: getattr(target.module, "rank", min(target.shape)) for target in find_targets(model)}


MODULES = (SoftLinear, LowRankLinear)
METHODS = (
    Method("soft", SoftConfig, apply, MODULES, takes_factors=True),
    Method(
        "cliff-soft",
        SoftConfig,
        apply,
        MODULES,
        takes_factors=True,
        fixed={"start_from": "cliff", "weigh_by_saving": True, "weigh_by_size": False},
    ),
)
