"""Recovery of a compressed model with few trained numbers: LoRA-XS, PEFT's LoRA, or the head alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from softlms.architectures import find_targets
from softlms.distillation import DistillingTrainer
from softlms.layers import LowRankLinear
from softlms.methods.base import Config, Method, Work
from softlms.utils.ranges import check_at_least_one, check_positive

__all__ = ["METHODS", "AdapterConfig"]

KINDS = ("lora-xs", "lora", "head")


@dataclass(frozen=True)
class AdapterConfig(Config):
    """Settings of recovery by an adapter.

    Attributes
    ----------
    kind : {"lora-xs", "lora", "head"}
        "head" trains a classifier's head alone; the others train it too.
    r : int
        Of each layer that softlms factors; its rank, where that is smaller.
    alpha : float
        See `softlms.LoraXSConfig`, or PEFT's ``LoraConfig``.
    components : {"top", "random", "bottom"}
        For LoRA-XS.
    epochs : float
    adapter_learning_rate, head_learning_rate : float

    Raises
    ------
    ValueError
        A setting is unknown or out of range.
    """

    kind: str = "lora-xs"
    r: int = 16
    alpha: float = 16.0
    components: str = "top"
    epochs: float = 3
    adapter_learning_rate: float = 1e-3
    head_learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(map(repr, KINDS))}, got {self.kind!r}.")
        check_at_least_one(r=self.r)
        check_positive(alpha=self.alpha, epochs=self.epochs)
        check_positive(most=1, adapter_learning_rate=self.adapter_learning_rate)
        check_positive(most=1, head_learning_rate=self.head_learning_rate)

    def unused(self) -> tuple[str, ...]:
        return {
            "lora-xs": (),
            "lora": ("components",),
            "head": ("r", "alpha", "components", "adapter_learning_rate"),
        }[self.kind]


def apply(model: PreTrainedModel, config: AdapterConfig, work: Work) -> dict[str, Any]:
    """Train an adapter beside a model's layers, and merge it.

    Returns
    -------
    dict
        "steps", "history", and "trained": the numbers that were trained.

    Raises
    ------
    ValueError
        The head alone is to learn, and the model has none.
    """
    head = _head(model)
    if config.kind == "head" and not head:
        raise ValueError(f"{type(model).__name__} has no head of a task to train: choose lora-xs or lora.")
    learns = [values for values in model.parameters() if values.requires_grad]
    adapted = _adapted(model, config) if config.kind != "head" else model.requires_grad_(False)
    for values in head:
        values.requires_grad_(True)
    try:
        own = {id(values) for values in head}
        trained = [values for values in adapted.parameters() if values.requires_grad]
        groups = [
            {"params": [values for values in trained if id(values) not in own], "lr": config.adapter_learning_rate},
            {"params": [values for values in trained if id(values) in own], "lr": config.head_learning_rate},
        ]
        optimizer = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.01)
        options = work.training("adapting", config.adapter_learning_rate, config.epochs)
        trainer = work.train(DistillingTrainer(adapted, optimizers=(optimizer, None), **options))
        if adapted is not model:
            adapted.merge_and_unload(safe_merge=True)
    finally:
        model.requires_grad_(False)
        for values in learns:
            values.requires_grad_(True)
    return {
        "trained": sum(values.numel() for values in trained),
        "steps": trainer.state.global_step,
        "history": [entry for entry in trainer.state.log_history if "loss" in entry],
    }


def _adapted(model: PreTrainedModel, config: AdapterConfig) -> Any:
    import peft

    targets = {target.name: target for target in find_targets(model)}
    rank = {name: _rank(target.module) for name, target in targets.items()}
    common: dict[str, Any] = {
        "r": config.r,
        "target_modules": list(targets),
        "rank_pattern": {name.replace(".", r"\."): most for name, most in rank.items() if most < config.r},
    }
    if config.kind == "lora":
        return peft.get_peft_model(model, peft.LoraConfig(lora_alpha=config.alpha, **common))
    from softlms.methods.lora_xs.config import LoraXSConfig

    return peft.get_peft_model(model, LoraXSConfig(alpha=config.alpha, components=config.components, **common))


def _rank(layer: Any) -> int:
    return layer.rank if isinstance(layer, LowRankLinear) else min(layer.weight.shape)


def _head(model: PreTrainedModel) -> list[nn.Parameter]:
    """Parameters of a classifier's head; none for a language model."""
    heads = (getattr(model, name, None) for name in ("classifier", "score", "qa_outputs"))
    return [values for head in heads if isinstance(head, nn.Module) for values in head.parameters()]


METHODS = tuple(Method(kind, AdapterConfig, apply, fixed={"kind": kind}) for kind in KINDS)
