"""Costs that a budget may count besides parameters: FLOPs of a forward pass, or its measured time."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from softlms.architectures import Predicate, find_targets
from softlms.budget import Costs
from softlms.kernels.selective_scan import fast_scan
from softlms.layers import LowRankLinear, kept_parameters
from softlms.modules import Replacement, make_linear
from softlms.utils.machine import use_threads
from softlms.utils.ranges import check_at_least_one

__all__ = ["count_flops", "measure_latency", "random_rows"]

SHARES = (0.05, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 1.0)  # of break-even: ranks to time


def count_flops(
    model: PreTrainedModel, *, batch: int = 1, tokens: int = 128, targets: Predicate | None = None
) -> Costs:
    """FLOPs (multiplications and additions) of a forward pass, as costs for a budget.

    Parameters
    ----------
    model : PreTrainedModel
        Dense; not changed.
    batch, tokens : int
        Rows, and tokens per row: attention grows with the square of the tokens, the linears do not.
    targets : callable, optional
        See `find_targets`.

    Returns
    -------
    Costs
        Of matrix products and convolutions. Elementwise work (norms, activations, Mamba's scan) counts no FLOPs here,
        but takes time: see `measure_latency`.

    Raises
    ------
    ValueError
        A number below 1.
    """
    check_at_least_one(batch=batch, tokens=tokens)
    shapes = _shapes(model, targets)
    inputs = random_rows(model.config.vocab_size, batch, tokens)
    attention = model.config._attn_implementation
    try:
        if attention:  # fused kernels are not counted on every device
            model.set_attn_implementation("eager")
        with FlopCounterMode(display=False) as counter, torch.inference_mode(), fast_scan():
            rows = _rows(model, shapes, {name: values.to(model.device) for name, values in inputs.items()})
    finally:
        if attention:
            model.set_attn_implementation(attention)
    prices = {name: FlopPrice(rows[name], *shape) for name, shape in shapes.items()}
    dense = sum(price(min(shapes[name])) for name, price in prices.items())
    return Costs("flops", shapes, prices, counter.get_total_flops() - dense)


def measure_latency(
    model: PreTrainedModel,
    *,
    batch: int = 1,
    tokens: int = 128,
    rounds: int = 15,
    threads: int = 1,
    targets: Predicate | None = None,
) -> Costs:
    """Seconds of a forward pass on this machine, as costs for a budget. Each kind of layer is timed dense and thin.

    Parameters
    ----------
    model : PreTrainedModel
        Dense, on the device and in the precision in which it will run; not changed.
    batch, tokens : int
        Rows, and tokens per row; 1 token is a decoding step.
    rounds : int
        Measured calls of each layer, after two warm-up calls. Sizes are interleaved; the median counts.
    threads : int
        Torch threads, restored afterwards.
    targets : callable, optional
        See `find_targets`.

    Returns
    -------
    Costs
        Time of a layer, interpolated linearly between the measured ranks. `Costs.rest` is the time of the forward pass
        outside the target layers. A layer as slow as its dense form has the dense cost, and is better kept dense.

    Raises
    ------
    ValueError
        A number below 1.
    """
    check_at_least_one(batch=batch, tokens=tokens, rounds=rounds, threads=threads)
    shapes = _shapes(model, targets)
    inputs = {k: v.to(model.device) for k, v in random_rows(model.config.vocab_size, batch, tokens).items()}
    with use_threads(threads), torch.inference_mode(), fast_scan():
        rows = _rows(model, shapes, inputs)
        kinds = {name: (rows[name], *shape) for name, shape in shapes.items()}
        timed = {
            kind: _time_kind(kind, model, rounds)
            for kind in track(
                sorted(set(kinds.values())), "timing layers", transient=True, disable=not sys.stdout.isatty()
            )
        }
        whole = interleaved({"model": lambda: model(**inputs)}, max(3, rounds // 3))["model"]
    prices = {name: timed[kind] for name, kind in kinds.items()}
    layers = sum(price(min(shapes[name])) for name, price in prices.items())
    return Costs("latency", shapes, prices, max(0.0, statistics.median(whole) - layers))


def random_rows(vocabulary: int, batch: int, tokens: int) -> dict[str, Tensor]:
    """A batch of random tokens without padding."""
    ids = torch.randint(vocabulary, (batch, tokens))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def interleaved(
    calls: Mapping[str, Callable[[], Any]], rounds: int, description: str = "", warm_up: int = 2
) -> dict[str, list[float]]:
    """Seconds of each call. Calls are interleaved, so that other load on the machine affects all equally."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    shown = bool(description) and sys.stdout.isatty()
    for _ in track(range(rounds + warm_up), description, transient=True, disable=not shown):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - started)
    return {name: taken[warm_up:] for name, taken in seconds.items()}


def _shapes(model: nn.Module, targets: Predicate | None) -> dict[str, tuple[int, int]]:
    found = find_targets(model, targets)
    for target in found:
        if isinstance(target.module, Replacement):
            raise ValueError(f"{target.name} is factored already: measure costs on the dense model.")
    return {target.name: target.shape for target in found}


def _rows(
    model: PreTrainedModel, shapes: Mapping[str, tuple[int, int]], inputs: Mapping[str, Tensor]
) -> dict[str, int]:
    """Number of inputs of each layer in a forward pass; a pooler, for example, has fewer than a block."""
    rows = dict.fromkeys(shapes, 0)

    def count(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows[name] += args[0].numel() // shapes[name][1]

        return hook

    hooks = [model.get_submodule(name).register_forward_pre_hook(count(name)) for name in shapes]
    try:
        model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return rows


@dataclass(frozen=True)
class FlopPrice:
    """FLOPs of an m x n layer as a function of its rank, for a given number of inputs."""

    rows: int
    m: int
    n: int

    def __call__(self, rank: int) -> float:
        return 2 * self.rows * kept_parameters(self.m, self.n, rank)


@dataclass(frozen=True)
class TimePrice:
    """Seconds of an m x n layer by rank, interpolated linearly between measured ranks; dense from break-even on."""

    m: int
    n: int
    ranks: tuple[int, ...]
    thin: tuple[float, ...]
    dense: float

    def __call__(self, rank: int) -> float:
        if rank * (self.m + self.n) >= self.m * self.n:
            return self.dense
        return min(self.dense, float(np.interp(rank, self.ranks, self.thin)))


def _time_kind(kind: tuple[int, int, int], model: PreTrainedModel, rounds: int) -> TimePrice:
    """Time layers of one shape and number of inputs, dense and at several ranks."""
    rows, m, n = kind
    x = torch.randn(rows, n).to(model.device, model.dtype)
    ranks = sorted({max(1, round(share * m * n / (m + n) / 16) * 16) for share in SHARES})
    ranks = [rank for rank in ranks if rank <= min(m, n)]
    zeros = x.new_zeros
    layers: dict[Any, nn.Module] = {rank: LowRankLinear(zeros(rank, n), zeros(m, rank), zeros(m)) for rank in ranks}
    layers["dense"] = make_linear(zeros(m, n), zeros(m))
    calls = {str(name): (lambda layer=layer: layer(x)) for name, layer in layers.items()}
    seconds = {name: statistics.median(taken) for name, taken in interleaved(calls, rounds).items()}
    # a larger rank never costs less
    thin = np.maximum.accumulate([seconds[str(rank)] for rank in ranks])
    return TimePrice(m, n, tuple(ranks), tuple(thin.tolist()), seconds["dense"])
