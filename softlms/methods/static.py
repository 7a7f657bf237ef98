"""The baselines: factors, ranks from a rule, the cut, recovery."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from softlms.distillation import DistillingTrainer
from softlms.evaluation.metrics import mean_loss
from softlms.fused import SplitLinear
from softlms.layers import LowRankLinear
from softlms.lowrank.allocation import ALLOCATIONS, SEARCHED, WEIGHTED, allocate, sensitivity_curves
from softlms.lowrank.factorization import Factors
from softlms.methods.base import Method, Work
from softlms.methods.factors import FactorsConfig, calibration_sample, curvature_of, factors_of
from softlms.surgery import truncate
from softlms.utils.ranges import check_positive

__all__ = ["METHODS", "StaticConfig", "recover", "static_ranks"]


@dataclass(frozen=True)
class StaticConfig(FactorsConfig):
    """Settings of a static allocation; see `FactorsConfig` for the others.

    Attributes
    ----------
    allocation : str
        See `softlms.allocate`. Sensitivity uses a quarter of the calibration rows.
    static_learning_rate : float
        Of recovery.

    Raises
    ------
    ValueError
        A setting is unknown or out of range.
    """

    allocation: str = "uniform"
    static_learning_rate: float = 2e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(most=1, static_learning_rate=self.static_learning_rate)

    def unused(self) -> tuple[str, ...]:
        return () if self.allocation in (*SEARCHED, *WEIGHTED) else super().unused()


def apply(model: PreTrainedModel, config: StaticConfig, work: Work) -> dict[str, Any]:
    """Cut a model to ranks from a rule, and let it recover."""
    factors = factors_of(model, config.factors, config.calibration_rows, work)
    ranks = static_ranks(model, factors, config, config.allocation, work)
    truncate(model, ranks, factors, costs=work.costs)
    untuned = work.scores(lambda: model)
    return {"ranks": ranks, "untuned": untuned} | recover(model, config.epochs, config.static_learning_rate, work)


def static_ranks(
    model: PreTrainedModel, factors: Mapping[str, Factors], config: FactorsConfig, allocation: str, work: Work
) -> dict[str, int]:
    """Ranks from a rule, after measuring what it needs to know."""
    return allocate(
        model,
        factors,
        allocation,
        keep=config.keep,
        count=config.count,
        curves=_curves(model, factors, config, work) if allocation in SEARCHED else None,
        statistics=curvature_of(model, config.calibration_rows, work) if allocation in WEIGHTED else None,
        costs=work.costs,
    )


def recover(
    model: PreTrainedModel, epochs: float, learning_rate: float, work: Work, *, spent: int = 0
) -> dict[str, Any]:
    """Train a cut model for the remaining steps; return "steps" and "history" of all."""
    history: list[dict[str, float]] = []
    if epochs:
        options = work.training("recovering", learning_rate, epochs)
        args = options["args"]
        in_step = args.train_batch_size * args.gradient_accumulation_steps
        steps = math.ceil(epochs * math.ceil(len(work.rows) / in_step))
        if spent < steps:  # a search may use up all steps
            if spent:
                args.max_steps = steps - spent
            trainer = work.train(DistillingTrainer(model, **options))
            spent += trainer.state.global_step
            history = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {"steps": spent, "history": history}


def _curves(model: PreTrainedModel, factors: Mapping[str, Factors], config: FactorsConfig, work: Work) -> Any:
    """Sensitivity curves, shared like the factors."""
    name = f"{config.factors}: curves from {config.calibration_rows} rows"
    if name not in work.shared:
        rows = calibration_sample(work, max(1, config.calibration_rows // 4))
        work.shared[name] = sensitivity_curves(
            model, factors, lambda: mean_loss(model, rows, work.collator, work.batch_size)
        )
    return work.shared[name]


METHODS = tuple(
    Method(
        allocation,
        StaticConfig,
        apply,
        (LowRankLinear, SplitLinear),
        takes_factors=True,
        fixed={"allocation": allocation},
    )
    for allocation in ALLOCATIONS
)
