"""Training of routers: the model is frozen, and each router learns what its experts' outputs are worth.

Shapes: N tokens, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import datasets
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DataCollator, PreTrainedModel

from softlms.data.inputs import batches, in_eval_mode, token_mask, without_logits
from softlms.methods.autoencoder import fit
from softlms.methods.dynamic_moe.experts import Experts

__all__ = ["TARGETS", "entering_states", "train_routers"]


@torch.no_grad()
def entering_states(
    model: PreTrainedModel,
    experts: Mapping[str, Experts],
    rows: datasets.Dataset,
    collator: DataCollator,
    tokens: int,
    batch_size: int = 32,
) -> dict[str, Tensor]:
    """States (N, d) that enter each block's experts, of the rows' first `tokens` tokens other than padding."""
    seen: dict[str, list[Tensor]] = {name: [] for name in experts}
    mask: list[Tensor | None] = [None]

    def see(name: str) -> Callable[..., None]:
        def hook(_: object, inputs: tuple[Tensor]) -> None:
            states = inputs[0].reshape(-1, inputs[0].shape[-1])
            seen[name].append(states if mask[0] is None else states[mask[0].flatten()])

        return hook

    hooks = [module.register_forward_pre_hook(see(name)) for name, module in experts.items()]
    try:
        with in_eval_mode(model):
            for batch in batches(model, rows, collator, batch_size):
                mask[0] = token_mask(batch)
                model(**batch, **without_logits(model, experts.values()))
                if sum(map(len, next(iter(seen.values())))) >= tokens:
                    break
    finally:
        for handle in hooks:
            handle.remove()
    return {name: torch.cat(parts)[:tokens].float() for name, parts in seen.items()}


def by_norm(experts: Experts, x: Tensor) -> Tensor:
    """What a dynamic-k router learns: the norm of each expert's output, (N, E)."""
    return experts.outputs(x)


def by_activation(experts: Experts, x: Tensor) -> Tensor:
    """What a MoEfication router learns: each expert's share of the largest sum of activations, 0 to 1, (N, E)."""
    inside = x if experts.before is None else experts.before(x)
    sums = experts._neurons(inside).clamp(min=0).reshape(len(x), *experts.U.shape[:2]).sum(-1)
    return sums / sums.amax(1, keepdim=True).clamp(min=torch.finfo(sums.dtype).tiny)


def _squared(R: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(R, target)


def _binary(R: Tensor, target: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(R, target)


# what is learned, and its loss
TARGETS: Mapping[str, tuple[Callable[[Experts, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "norm": (by_norm, _squared),
    "activation": (by_activation, _binary),
}


def train_routers(
    experts: Mapping[str, Experts],
    states: Mapping[str, Tensor],
    *,
    target: str,
    epochs: float,
    batch: int,
    learning_rate: float,
    seed: int,
    note: Callable[[str], None],
) -> dict[str, float]:
    """Train every router with Adam, in place.

    Parameters
    ----------
    experts : mapping
    states : mapping
        See `entering_states`.
    target : {"norm", "activation"}
    epochs, batch, learning_rate
    seed : int
        Of the routers' first values and the order of the tokens.
    note : callable
        Called with lines of progress.

    Returns
    -------
    dict
        Of each block, the correlation of what its router says with what it learned, over tokens and experts.

    Raises
    ------
    ValueError
        An expert's output is not finite.
    """
    learned, loss_of = TARGETS[target]
    found = {}
    for number, (name, module) in enumerate(experts.items()):
        x = states[name]
        dtype = module.U.dtype
        with torch.no_grad():
            goal = torch.cat([learned(module, part.to(dtype)).float() for part in x.split(1024)])
        module.router.float()
        if not goal.isfinite().all():
            raise ValueError(f"{name}: an expert's output is not finite on the training rows: check the model.")
        torch.manual_seed(seed + number)
        for linear in (module.router.enter, module.router.leave):
            torch.nn.init.kaiming_uniform_(linear.weight, a=math.sqrt(5))
        scale = goal.mean().clamp(min=torch.finfo(goal.dtype).tiny) if target == "norm" else goal.new_ones(())

        def loss(
            chosen: Tensor, progress: float, module: Experts = module, x: Tensor = x, goal: Tensor = goal / scale
        ) -> Tensor:
            return loss_of(module.router(x[chosen]), goal[chosen])

        note(f"router {number + 1} of {len(experts)}")
        options: dict[str, Any] = {"step": 0.5, "factor": 0.1, "seed": seed, "note": lambda line: None}
        fit(module.router, loss, len(x), epochs=epochs, batch=batch, learning_rate=learning_rate, **options)
        with torch.no_grad():
            said = torch.cat([module.router(part) for part in x.split(1024)])
        module.router.to(dtype)
        module.trained = True
        found[name] = torch.corrcoef(torch.stack([said.flatten(), goal.flatten()]))[0, 1].item()
    return found
