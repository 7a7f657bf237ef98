"""One table: which linear layers of each model family are factored, and why the others are not."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from softlms.layers import LowRankLinear, Ranked
from softlms.modules import Replacement

__all__ = [
    "ARCHITECTURES", "Architecture", "Predicate", "Target", "check_factorable", "find_targets", "named_targets",
]  # fmt: skip

Predicate = Callable[[str, nn.Module], bool]
LINEAR = (nn.Linear, Conv1D, Ranked)
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
STATE_HOOKS = (  # they rely on the names weight and bias
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


@dataclass(frozen=True)
class Architecture:
    """One model family.

    Attributes
    ----------
    block : str
        Regular expression of a block's name; its first group is the block's index.
    targets : dict
        Name of each factored linear layer inside a block, and the paper's symbol for it.
    left_alone : dict
        The other linear layers, and why they are not factored.
    """

    block: str
    targets: dict[str, str]
    left_alone: dict[str, str] = field(default_factory=dict)


_TIED = "the vocabulary's table, mostly tied to the embeddings: looked up, and counted once"
_HEAD = "the task's head: few outputs, and full rank already"

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
            "pooler.dense": "runs on one token per sentence, outside the encoder's blocks",
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
            "mixer.x_proj": "80 x 1536 in Mamba-130m: two factors are smaller only below rank 76 of 80",
            "mixer.dt_proj": "1536 x 48 in Mamba-130m: two factors are smaller only below rank 47 of 48",
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
        Index of its block; None if a predicate chose it.
    symbol : str
        The paper's symbol, or the name if there is none.
    module : nn.Linear, Conv1D, SoftLinear, LowRankLinear or MaskedLinear
        The layer in its current form.
    """

    name: str
    block: int | None
    symbol: str
    module: nn.Linear | Conv1D | Ranked

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n): outputs, inputs."""
        if isinstance(self.module, Conv1D):
            return self.module.nf, self.module.nx
        return self.module.out_features, self.module.in_features

    def as_weight(self, stored: Tensor) -> Tensor:
        """View a tensor in the layout of this layer's parameter (or its gradient) as (m, n)."""
        return stored.T if isinstance(self.module, Conv1D) else stored


def find_targets(model: nn.Module, targets: Predicate | None = None) -> list[Target]:
    """Find the target layers of `model`, in module order, in any form.

    Parameters
    ----------
    model : nn.Module
        A transformers model of a family in `ARCHITECTURES`, or any module when `targets` is given.
    targets : callable, optional
        ``targets(name, module) -> bool`` selects linear layers in place of the table.

    Raises
    ------
    ValueError
        The family is unknown, no layer matches, a PEFT adapter wraps a target, or a target named by the table is not a
        linear layer (or no longer is).
    """
    named = list(model.named_modules())
    thin = tuple(f"{name}." for name, module in named if isinstance(module, LowRankLinear))
    adapters = [name for name, module in named if _wrapped(module) is not module]
    choose = _by_table(model) if targets is None else _by_predicate(targets)
    found = []
    for name, module in named:
        # skip a thin layer's factors, and a split layer itself, whose parts are named separately
        if name.startswith(thin) or (isinstance(module, Replacement) and not isinstance(module, Ranked)):
            continue
        target = choose(name, _wrapped(module))
        if target is None:
            continue
        for adapter in adapters:  # around the layer, or around its factors
            if f"{name}.".startswith(f"{adapter}.") or adapter.startswith(f"{name}."):
                kind = type(model.get_submodule(adapter)).__name__
                raise ValueError(f"{name} is wrapped by an adapter, a {kind}: call merge_and_unload() first.")
        if not isinstance(target.module, LINEAR):
            kind = type(module).__name__
            raise ValueError(f"{name} is a {kind}, not a linear layer to factor: load the model unquantized.")
        found.append(target)
    if not found:
        raise ValueError("No linear layer of this model matches the targets: nothing to factor.")
    return found


def named_targets(model: nn.Module) -> list[str]:
    """Names of the modules that the family's table selects, of any type; empty if the family is unknown."""
    family = getattr(getattr(model, "config", None), "model_type", None)
    if family not in ARCHITECTURES:
        return []
    choose = _by_table(model)
    return [name for name, module in model.named_modules() if choose(name, module) is not None]


def check_factorable(targets: Iterable[Target]) -> None:
    """Raise ValueError for a dense layer that cannot be factored or has more than weight and bias; name it.

    Refused: quantized, sharded and offloaded weights, parametrizations, pruning, and a custom forward.
    """
    for target in targets:
        name, layer = target.name, target.module
        if isinstance(layer, Ranked):
            continue
        others = {n for n, _ in (*layer.named_parameters(), *layer.named_buffers())} - {"weight", "bias"}
        hooks = [hook for hook in STATE_HOOKS if getattr(layer, hook, None)]
        own = "forward" in vars(layer) and not hasattr(layer, "_hf_hook")
        if type(layer.weight) not in (Tensor, nn.Parameter) or layer.weight.dtype not in FLOATS:
            kind = f"{type(layer.weight).__name__}, {layer.weight.dtype}"
            raise ValueError(f"{name}.weight is quantized or sharded ({kind}): load the model unquantized and whole.")
        if layer.weight.is_meta or not layer.weight.numel():
            raise ValueError(f"{name}.weight is offloaded: load the model without device_map.")
        if others:
            raise ValueError(f"{name} has {min(others)}: make its parametrization or pruning permanent first.")
        if own or hooks or type(layer).forward not in (nn.Linear.forward, Conv1D.forward):
            what = hooks[0] if hooks else "a custom forward"
            raise ValueError(f"{name}, a {type(layer).__name__}, has {what}, which would be lost: leave it out.")


Choice = Callable[[str, nn.Module], Target | None]


def _wrapped(module: nn.Module) -> nn.Module:
    """The layer inside a PEFT adapter; any other module is returned as it is."""
    for wrapper in ("base_layer", "original_module"):
        if isinstance(inner := getattr(module, wrapper, None), nn.Module):
            return inner
    return module


def _by_predicate(targets: Predicate) -> Choice:
    def choose(name: str, module: nn.Module) -> Target | None:
        chosen = isinstance(module, LINEAR) and targets(name, module)
        return Target(name, None, name, module) if chosen else None

    return choose


def _by_table(model: nn.Module) -> Choice:
    family = getattr(getattr(model, "config", None), "model_type", None)
    if family not in ARCHITECTURES:
        raise ValueError(
            f"Unknown model family {family!r}; known: {', '.join(ARCHITECTURES)}. "
            "For another model, pass targets=lambda name, module: ..., true for each linear layer to factor."
        )
    architecture = ARCHITECTURES[family]
    suffixes = "|".join(re.escape(suffix) for suffix in architecture.targets)
    pattern = re.compile(rf"(?:^|\.){architecture.block}\.({suffixes})$")

    def choose(name: str, module: Any) -> Target | None:
        hit = pattern.search(name)
        return Target(name, int(hit[1]), architecture.targets[hit[2]], module) if hit else None

    return choose
