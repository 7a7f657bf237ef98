"""Experts as methods of a chain: dynamic-k, and fixed top-k as MoEfication has it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from softlms.methods.base import Config, Method, Work
from softlms.methods.dynamic_moe.counts import measure_crossover
from softlms.methods.dynamic_moe.experts import Experts, Passed
from softlms.methods.dynamic_moe.routing import TARGETS, entering_states, train_routers
from softlms.methods.dynamic_moe.split import SPLITS
from softlms.methods.dynamic_moe.surgery import put_experts, set_threshold
from softlms.utils.ranges import check_at_least_one, check_positive

__all__ = ["METHODS", "ExpertsConfig"]


ROWS = 1024  # tokens of a batch for which the way to run is measured


@dataclass(frozen=True)
class ExpertsConfig(Config):
    """Settings of experts. The model's own weights are not trained.

    Attributes
    ----------
    experts : int
        In each block.
    split : {"kmeans", "random"}
    target : {"norm", "activation"}
        What the routers learn: dynamic-k's norm of an expert's output, or MoEfication's activation.
    tau : float
        Of the model that is returned; see `softlms.methods.dynamic_moe.surgery.set_threshold`.
    top : int, optional
        Instead of tau, which then stays 1.
    router_hidden : int
    router_tokens : int
        Tokens of the training rows, other than padding, on which routers learn.
    router_epochs : float
    router_batch_size : int
        Tokens in a step.
    router_learning_rate : float

    Raises
    ------
    ValueError
        A setting is unknown or out of range.
    """

    experts: int = 64
    split: str = "kmeans"
    target: str = "norm"
    tau: float = 1.0
    top: int | None = None
    router_hidden: int = 128
    router_tokens: int = 20000
    router_epochs: float = 10
    router_batch_size: int = 64
    router_learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        if self.split not in SPLITS or self.target not in TARGETS:
            raise ValueError(
                f"split must be one of {', '.join(SPLITS)} and target one of {', '.join(TARGETS)}; got {self.split!r} "
                f"and {self.target!r}."
            )
        if not 0 <= self.tau <= 1:
            raise ValueError(f"tau is a share, 0 to 1; got {self.tau!r}.")
        if self.top is not None and (self.tau != 1 or not 1 <= self.top <= self.experts):
            raise ValueError(
                f"top is a number of experts, 1 to {self.experts}, and tau is left out beside it; "
                f"got top={self.top!r}, tau={self.tau!r}."
            )
        check_at_least_one(experts=self.experts, router_hidden=self.router_hidden, router_tokens=self.router_tokens)
        check_at_least_one(router_batch_size=self.router_batch_size)
        check_positive(router_epochs=self.router_epochs)
        check_positive(most=1, router_learning_rate=self.router_learning_rate)


def apply(model: PreTrainedModel, config: ExpertsConfig, work: Work) -> dict[str, Any]:
    """Split a model's feed-forwards into experts and train their routers.

    Returns
    -------
    dict
        "routers": the correlation of each block's router with what it learned; see `train_routers`. "grouped_below":
        see `measure_crossover`.
    """
    work.note(f"splitting into {config.experts} experts a block")
    router: dict[str, Any] = {"hidden": config.router_hidden, "signed": config.target == "activation"}
    every = put_experts(model, config.experts, split=config.split, seed=work.seed, **router)
    rows = work.rows.shuffle(seed=work.seed)
    states = entering_states(model, every, rows, work.collator, config.router_tokens)
    known = train_routers(
        every,
        states,
        target=config.target,
        epochs=config.router_epochs,
        batch=config.router_batch_size,
        learning_rate=config.router_learning_rate,
        seed=work.seed,
        note=work.note,
    )
    x = next(iter(states.values()))[:ROWS].to(model.dtype)
    grouped_below = measure_crossover(next(iter(every.values())), x)
    for experts in every.values():
        experts.grouped_below = grouped_below
    set_threshold(model, config.tau if config.top is None else None, top=config.top)
    return {"routers": known, "grouped_below": grouped_below}


METHODS = (
    Method("experts", ExpertsConfig, apply, (Experts, Passed), fixed={"target": "norm"}),
    Method("moefication", ExpertsConfig, apply, (Experts, Passed), fixed={"target": "activation"}),
)
