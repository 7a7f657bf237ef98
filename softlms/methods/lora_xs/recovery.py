"""Recovery of a compressed model with few trained numbers: LoRA-XS, PEFT's LoRA, or the head alone."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from softlms.architectures import find_targets
from softlms.distillation import DistillingTrainer
from softlms.layers import LowRankLinear
from softlms.methods.base import Config, Method, Work
from softlms.utils.ranges import check_at_least_one, check_positive

__all__ = ["METHODS", "AdapterConfig"]

KINDS = ("lora-xs", "lora", "head")
HEADS = ("classifier", "score", "qa_outputs")  # names of a task's head in transformers' models


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
    symbols : tuple of str
        Kinds of layers that are adapted, such as "W_Q"; by default all that softlms factors.
    components : {"top", "random", "bottom"}
        For LoRA-XS; "random" draws them by the run's seed.
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
    symbols: tuple[str, ...] = ()
    components: str = "top"
    epochs: float = 3
    adapter_learning_rate: float = 1e-3
    head_learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(map(repr, KINDS))}, got {self.kind!r}.")
        if self.kind != "head" and find_spec("peft") is None:
            raise ValueError(f"{self.kind} needs peft, which is not installed: pip install 'softlms[adapters]'.")
        check_at_least_one(r=self.r)
        check_positive(alpha=self.alpha, epochs=self.epochs)
        check_positive(most=1, adapter_learning_rate=self.adapter_learning_rate)
        check_positive(most=1, head_learning_rate=self.head_learning_rate)

    def unused(self) -> tuple[str, ...]:
        return {
            "lora-xs": (),
            "lora": ("components",),
            "head": ("r", "alpha", "symbols", "components", "adapter_learning_rate"),
        }[self.kind]


def apply(model: PreTrainedModel, config: AdapterConfig, work: Work) -> dict[str, Any]:
    """Train an adapter beside a model's layers, and merge it.

    Returns
    -------
    dict
        "steps", "history", "trained": the numbers that were trained, and "adapter_bytes": of the file that holds them.

    Raises
    ------
    ValueError
        The head alone is to learn, and the model has none; or a kind of layer that the model does not have.
    """
    head = [name for name in HEADS if isinstance(getattr(model, name, None), nn.Module)]
    if config.kind == "head" and not head:
        raise ValueError(f"{type(model).__name__} has no head of a task to train: choose lora-xs or lora.")
    learns = {name for name, values in model.named_parameters() if values.requires_grad}
    adapted = _adapted(model, config, head, work.seed)
    trained = {name: values for name, values in adapted.named_parameters() if values.requires_grad}
    groups = [
        {"params": [v for name, v in trained.items() if _in_head(name, head) == chosen], "lr": rate}
        for chosen, rate in ((False, config.adapter_learning_rate), (True, config.head_learning_rate))
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.01)
    options = work.training("adapting", config.adapter_learning_rate, config.epochs)
    trainer = work.train(DistillingTrainer(adapted, optimizers=(optimizer, None), **options))
    stored = work.folder / "adapter.safetensors"
    if adapted is model:
        save_file({name: values.detach() for name, values in trained.items()}, stored)
    else:
        adapted.save_pretrained(work.folder / "adapter")
        stored = work.folder / "adapter" / "adapter_model.safetensors"
        adapted.merge_and_unload(safe_merge=True)
    for name, values in model.named_parameters():
        values.requires_grad_(name in learns)
    return {
        "trained": sum(values.numel() for values in trained.values()),
        "adapter_bytes": stored.stat().st_size,
        "steps": trainer.state.global_step,
        "history": [entry for entry in trainer.state.log_history if "loss" in entry],
    }


def _adapted(model: PreTrainedModel, config: AdapterConfig, head: list[str], seed: int) -> Any:
    """The model of which only an adapter and the head learn; in PEFT's wrapper, unless it is the head alone."""
    if config.kind == "head":
        for name, values in model.named_parameters():
            values.requires_grad_(_in_head(name, head))
        return model
    import peft

    from softlms.adapters import ThinLora
    from softlms.methods.lora_xs.config import LoraXSConfig
    from softlms.methods.lora_xs.model import LoraXSModel

    # PEFT finds these by itself; a stored run depends on the code that is named here
    kinds = {"lora": (peft.LoraConfig, ThinLora), "lora-xs": (LoraXSConfig, LoraXSModel)}
    targets = find_targets(model)
    if unknown := set(config.symbols) - {target.symbol for target in targets}:
        raise ValueError(f"No linears of the kind {', '.join(sorted(unknown))}: choose others, or all.")
    rank = {t.name: _rank(t.module) for t in targets if not config.symbols or t.symbol in config.symbols}
    common: dict[str, Any] = {
        "r": config.r,
        "target_modules": list(rank),
        "modules_to_save": head,
        "rank_pattern": {name.replace(".", r"\."): most for name, most in rank.items() if most < config.r},
    }
    settings: dict[str, dict[str, Any]] = {
        "lora": {"lora_alpha": config.alpha},
        "lora-xs": {"alpha": config.alpha, "components": config.components, "seed": seed},
    }
    with warnings.catch_warnings():  # PEFT asks transformers for an older name of gradient checkpointing
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return peft.get_peft_model(model, kinds[config.kind][0](**common, **settings[config.kind]))


def _in_head(name: str, head: list[str]) -> bool:
    return any(part in head for part in name.split("."))


def _rank(layer: Any) -> int:
    return layer.rank if isinstance(layer, LowRankLinear) else min(layer.weight.shape)


METHODS = tuple(Method(kind, AdapterConfig, apply, fixed={"kind": kind}) for kind in KINDS)
