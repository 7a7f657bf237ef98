"""ReLU in place of the feed-forward's activation, and training that makes most of its outputs zero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from softlms.data.inputs import token_mask
from softlms.distillation import DistillingTrainer
from softlms.methods.base import Config, Method, Work
from softlms.methods.feed_forward import FeedForward, feed_forwards, name_activation, set_activation
from softlms.methods.sparse_activations.penalty import PENALTIES, Turning
from softlms.utils.ranges import check_positive, check_share

__all__ = ["METHODS", "SparseConfig", "SparseTrainer"]


@dataclass(frozen=True)
class SparseConfig(Config):
    """Settings of sparse activations.

    Attributes
    ----------
    penalty : {"hoyer", "l1"}
        See `softlms.methods.sparse_activations.penalty`.
    penalty_weight : float
        Of the mean over blocks, which is of the size of a block's neurons (hoyer).
    ramp : float
        Share of the steps in which the weight rises from 0, 0 to 1.
    turn : float
        Share of the steps in which the model's activation turns into ReLU; with 0 it is ReLU from the first step.
    epochs, static_learning_rate : float

    Raises
    ------
    ValueError
        A setting is unknown or out of range.
    """

    penalty: str = "hoyer"
    penalty_weight: float = 1e-3
    ramp: float = 0.5
    turn: float = 0.25
    epochs: float = 3
    static_learning_rate: float = 2e-4

    def __post_init__(self) -> None:
        if self.penalty not in PENALTIES:
            raise ValueError(f"penalty must be one of {', '.join(PENALTIES)}, got {self.penalty!r}.")
        if not self.penalty_weight >= 0:
            raise ValueError(f"penalty_weight must be 0 or more, got {self.penalty_weight!r}.")
        check_share(ramp=self.ramp, turn=self.turn)
        check_positive(epochs=self.epochs)
        check_positive(most=1, static_learning_rate=self.static_learning_rate)


class SparseTrainer(DistillingTrainer):
    """A Trainer that makes the feed-forwards' activations sparse.

    Parameters
    ----------
    model : PreTrainedModel
        BERT, GPT-2 or Llama; its activations become ReLU, in place.
    penalty, penalty_weight, ramp, turn
        See `SparseConfig`.
    **kwargs
        As for `DistillingTrainer`.

    Raises
    ------
    ValueError
        Another family, a block without its own feed-forward, or a setting that is unknown or out of range.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        penalty: str = "hoyer",
        penalty_weight: float = 1e-3,
        ramp: float = 0.5,
        turn: float = 0.25,
        **kwargs: Any,
    ) -> None:
        SparseConfig(penalty=penalty, penalty_weight=penalty_weight, ramp=ramp, turn=turn)  # checks them
        self.parts = feed_forwards(model, "Sparse activations")
        self.penalty, self.penalty_weight, self.ramp, self.turn = PENALTIES[penalty], penalty_weight, ramp, turn
        self.turning = [Turning(_activation(model, part)) for part in self.parts]
        self.seen: list[Tensor] = []
        super().__init__(model, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in Trainer; afterwards activations are ReLU, also in the configuration; after an error, the old ones."""
        hooks = []
        for part, activation in zip(self.parts, self.turning, strict=True):
            set_activation(self.model, part, activation)
            inner = self.model.get_submodule(part.leaves)
            hooks.append(inner.register_forward_pre_hook(lambda _, inputs: self.seen.append(inputs[0])))
        trained = False
        try:
            outcome = super().train(*args, **kwargs)
            trained = True
        finally:
            for hook in hooks:
                hook.remove()
            for part, activation in zip(self.parts, self.turning, strict=True):
                set_activation(self.model, part, nn.ReLU() if trained else activation.old)
        name_activation(self.model, "relu")
        return outcome

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The task's loss, in training with the penalty."""
        done = self.state.global_step / max(1, self.state.max_steps)
        for activation in self.turning:
            activation.s = min(1.0, done / self.turn) if self.turn else 1.0
        self.seen.clear()
        mask = token_mask(inputs)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training and self.seen:
            weight = self.penalty_weight * (min(1.0, done / self.ramp) if self.ramp else 1.0)
            loss = loss + weight * torch.stack([self.penalty(_tokens(seen, mask)) for seen in self.seen]).mean()
        self.seen.clear()
        return (loss, outputs) if return_outputs else loss


def _tokens(activations: Tensor, mask: Tensor | None) -> Tensor:
    """Those of tokens other than padding."""
    return activations if mask is None or mask.shape != activations.shape[:-1] else activations[mask]


def _activation(model: PreTrainedModel, part: FeedForward) -> nn.Module:
    holder, attribute = part.activation
    activation: nn.Module = getattr(model.get_submodule(holder), attribute)
    return activation


def apply(model: PreTrainedModel, config: SparseConfig, work: Work) -> dict[str, Any]:
    """Train a model until most of its feed-forwards' activations are zero.

    Returns
    -------
    dict
        "steps" and "history".
    """
    trainer = SparseTrainer(
        model,
        penalty=config.penalty,
        penalty_weight=config.penalty_weight,
        ramp=config.ramp,
        turn=config.turn,
        **work.training("sparsifying", config.static_learning_rate, config.epochs),
    )
    work.train(trainer)
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {"steps": trainer.state.global_step, "history": history}


METHODS = (Method("sparse", SparseConfig, apply),)
