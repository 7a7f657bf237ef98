"""Which linear layers of which model family are factored, and why the others are not: one table."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from softlms.layers import LowRankLinear, SoftLinear

__all__ = ["ARCHITECTURES", "Architecture", "Predicate", "Target", "find_targets"]

Predicate = Callable[[str, nn.Module], bool]


@dataclass(frozen=True)
class Architecture:
    """One model family.

    Attributes
    ----------
    block : str
        Regular expression of a block's name; its first group is the block's index.
    targets : dict
        Name of each factored linear inside a block, and the paper's symbol for it.
    left_alone : dict
        The other linears, and the reason why they are not factored.
    """

    block: str
    targets: dict[str, str]
    left_alone: dict[str, str] = field(default_factory=dict)


_TIED = "the vocabulary's table, mostly one with the embeddings: looked up, and counted once"
_HEAD = "the task's head: a handful of outputs, its rank is full already"

ARCHITECTURES: dict[str, Architecture] = {
    "bert": Architecture(  # Fig. 2 of the paper
        block=r"encoder\.layer\.(\d+)",
        targets={
            "attention.self.query": "W_Q",
            "attention.self.key": "W_K",
            "attention.self.value": "W_V",
            "attention.output.dense": "W_proj",
            "intermediate.dense": "W_fc1",
            "output.dense": "W_fc2",
        },
        left_alone={
            "pooler.dense": "runs on one token a sentence, outside the encoder's blocks",
            "classifier": _HEAD,
            "embeddings": "a table that is looked up, not multiplied",
        },
    ),
    "gpt2": Architecture(
        block=r"h\.(\d+)",
        targets={
            "attn.c_attn": "W_QKV",
            "attn.c_attn.q": "W_Q",  # after softlms.split_fused
            "attn.c_attn.k": "W_K",
            "attn.c_attn.v": "W_V",
            "attn.c_proj": "W_proj",
            "mlp.c_fc": "W_fc1",
            "mlp.c_proj": "W_fc2",
        },
        left_alone={"lm_head": _TIED, "score": _HEAD},
    ),
    "llama": Architecture(
        block=r"layers\.(\d+)",
        targets={
            "self_attn.q_proj": "W_Q",
            "self_attn.k_proj": "W_K",
            "self_attn.v_proj": "W_V",
            "self_attn.o_proj": "W_proj",
            "mlp.gate_proj": "W_gate",
            "mlp.up_proj": "W_up",
            "mlp.down_proj": "W_down",
        },
        left_alone={"lm_head": _TIED, "score": _HEAD},
    ),
    "mamba": Architecture(
        block=r"layers\.(\d+)",
        targets={"mixer.in_proj": "W_in", "mixer.out_proj": "W_out"},
        left_alone={
            "mixer.x_proj": "80 x 1536 in Mamba-130m: two factors are smaller below rank 76 of 80 only",
            "mixer.dt_proj": "1536 x 48 in Mamba-130m: two factors are smaller below rank 47 of 48 only",
            "lm_head": _TIED,
        },
    ),
}


@dataclass(frozen=True)
class Target:
    """One linear layer to factor.

    Attributes
    ----------
    name : str
        Its name in the model.
    block : int or None
        Index of its block; None where a predicate chose it.
    symbol : str
        The paper's symbol, or the name where there is none.
    module : nn.Linear, Conv1D, SoftLinear or LowRankLinear
        The layer, in its present form.
    """

    name: str
    block: int | None
    symbol: str
    module: nn.Linear | Conv1D | SoftLinear | LowRankLinear

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n): outputs, inputs."""
        if isinstance(self.module, Conv1D):
            return self.module.nf, self.module.nx
        return self.module.out_features, self.module.in_features

    def as_weight(self, stored: Tensor) -> Tensor:
        """A tensor laid out as this layer's parameter (or its gradient), as (m, n)."""
        return stored.T if isinstance(self.module, Conv1D) else stored


def find_targets(model: nn.Module, targets: Predicate | None = None) -> list[Target]:
    """The layers of `model` that are factored, in the order of the forward pass, in whatever form they are.

    Parameters
    ----------
    model : nn.Module
        A transformers model of a family in `ARCHITECTURES`, or any module when `targets` is given.
    targets : callable, optional
        ``targets(name, module) -> bool`` chooses among the linear layers instead of the table.

    Raises
    ------
    ValueError
        The family is unknown, no layer matches, or an adapter (PEFT's) wraps one.
    """
    kinds = (nn.Linear, Conv1D, SoftLinear, LowRankLinear)
    linears = [(n, m) for n, m in model.named_modules() if isinstance(m, kinds)]
    inside = {f"{n}.{part}" for n, m in linears if isinstance(m, LowRankLinear) for part in ("down", "up")}
    linears = [(n, m) for n, m in linears if n not in inside]
    if targets is not None:
        found = [Target(n, None, n, m) for n, m in linears if targets(n, m)]
    else:
        family = getattr(getattr(model, "config", None), "model_type", None)
        if family not in ARCHITECTURES:
            raise ValueError(
                f"Unknown model family {family!r}; known: {', '.join(ARCHITECTURES)}. "
                "For another model pass targets=lambda name, module: ..., true for each linear layer to factor."
            )
        architecture = ARCHITECTURES[family]
        suffixes = "|".join(re.escape(suffix) for suffix in architecture.targets)
        pattern = re.compile(rf"(?:^|\.){architecture.block}\.({suffixes})$")
        for name, module in model.named_modules():
            if pattern.search(name) and hasattr(module, "base_layer"):
                raise ValueError(f"{name} is wrapped by an adapter, {type(module)}: call merge_and_unload() first.")
        matches = ((n, m, pattern.search(n)) for n, m in linears)
        found = [Target(n, int(hit[1]), architecture.targets[hit[2]], m) for n, m, hit in matches if hit]
    if not found:
        raise ValueError("No linear layer of this model matches the targets: nothing to factor.")
    return found
