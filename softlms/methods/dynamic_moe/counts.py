"""What experts run for given rows, and how long it takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from softlms.data.inputs import in_eval_mode
from softlms.measure import interleaved
from softlms.methods.dynamic_moe.experts import Experts
from softlms.methods.dynamic_moe.surgery import experts_of

__all__ = ["entering", "executed", "measure_crossover", "ran_by_token", "time_experts"]


@contextmanager
def entering(every: Mapping[str, Experts]) -> Iterator[dict[str, Tensor]]:
    """Keep the states that enter each block's experts in the last forward pass."""
    seen: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: seen.__setitem__(name, inputs[0]))
        for name, module in every.items()
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def executed(model: PreTrainedModel) -> float:
    """FLOPs of the feed-forwards since `set_threshold`, routers included, as a share of those of dense ones."""
    ran, dense = zip(*(experts.flops() for experts in experts_of(model).values()), strict=True)
    return sum(ran) / sum(dense)


@torch.no_grad()
def measure_crossover(experts: Experts, x: Tensor, rounds: int = 3) -> float:
    """The share of the experts up to which gathering their tokens is faster here than computing and masking all.

    Parameters
    ----------
    experts : Experts
    x : Tensor
        States that enter, shape (N, d); as many as in a usual batch.
    rounds : int
    """
    inside = x if experts.before is None else experts.before(x)
    generator = torch.Generator(device=x.device).manual_seed(0)
    draws = torch.rand(len(x), len(experts.U), generator=generator, device=x.device)
    fastest = 0.0
    for share in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8):
        runs = draws < share
        calls = {"gathered": partial(experts._gathered, inside, runs), "masked": partial(experts._masked, inside, runs)}
        seconds = {name: median(taken) for name, taken in interleaved(calls, rounds, warm_up=1).items()}
        if seconds["gathered"] >= seconds["masked"]:
            break
        fastest = share
    return fastest


@torch.no_grad()
def ran_by_token(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """Experts that run for each token, mean over blocks, shape (B, T).

    Parameters
    ----------
    model : PreTrainedModel
        With experts.
    batch : mapping
        As the model's forward takes.
    """
    every = experts_of(model)
    with entering(every) as seen, in_eval_mode(model):
        model(**batch)
    counts = []
    for name, x in seen.items():
        runs = every[name].chosen(x.flatten(0, 1))
        whole = torch.full(x.shape[:2], float(len(every[name].U)), device=x.device)
        counts.append(whole if runs is None else runs.sum(1).reshape(x.shape[:2]).float())
    return torch.stack(counts).mean(0)


@torch.no_grad()
def time_experts(model: PreTrainedModel, batch: Mapping[str, Any], rounds: int = 9) -> dict[str, float]:
    """Seconds in all feed-forwards of a forward pass, as they are set and with everything run.

    Parameters
    ----------
    model : PreTrainedModel
        With experts.
    batch : mapping
        As the model's forward takes.
    rounds : int
        The two take turns; the medians are returned.

    Returns
    -------
    dict
        "as set", routers included, and "all": the products of the dense feed-forward, without routers.
    """
    every = experts_of(model)
    with entering(every) as seen, in_eval_mode(model):
        model(**batch)
    inputs = {name: x.clone() for name, x in seen.items()}

    def whole(module: Experts, x: Tensor) -> Tensor:
        tau, top, module.tau, module.top = module.tau, module.top, 1.0, None
        try:
            return module(x)
        finally:
            module.tau, module.top = tau, top

    with in_eval_mode(model):
        seconds = interleaved(
            {
                "as set": lambda: [every[name](x) for name, x in inputs.items()],
                "all": lambda: [whole(every[name], x) for name, x in inputs.items()],
            },
            rounds,
        )
    return {name: median(taken) for name, taken in seconds.items()}
