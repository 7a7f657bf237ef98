"""Times of interleaved calls, and the gain of single tricks."""

from __future__ import annotations

import multiprocessing
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch.nn.functional import linear
from transformers import LlamaConfig
from transformers.activations import GELUTanh, NewGELUActivation
from transformers.models.llama.modeling_llama import LlamaMLP

from softlms.kernels.allocator import keep_memory
from softlms.layers import LowRankLinear
from softlms.measure import interleaved
from softlms.utils.machine import use_threads

__all__ = ["summarize_times", "time_tricks"]


def summarize_times(seconds: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """Median and quartiles of each call's times, and how much faster it is than the first.

    Parameters
    ----------
    seconds : mapping
        As from `softlms.measure.interleaved`.

    Returns
    -------
    dict
        "median_ms", "quartile1_ms", "quartile3_ms" and "speed_up" of each call.
    """
    first = statistics.median(next(iter(seconds.values())))
    times = {}
    for name, taken in seconds.items():
        low, middle, high = statistics.quantiles(taken, n=4) if len(taken) > 1 else (*taken, *taken, *taken)
        ms = {"median_ms": 1e3 * middle, "quartile1_ms": 1e3 * low, "quartile3_ms": 1e3 * high}
        times[name] = ms | {"speed_up": first / middle}
    return times


def time_tricks(*, tokens: int = 128, rounds: int = 21) -> pd.DataFrame:
    """Time single tricks, each alone, at the sizes of the models' layers; one thread, fp32.

    Parameters
    ----------
    tokens : int
        Tokens in one row.
    rounds : int
        Measured calls, after two warm-up calls.

    Returns
    -------
    DataFrame
        "trick", microseconds without and with it ("without_us", "with_us", medians), and "gain", their ratio.
    """
    x, wide = torch.randn(1, tokens, 768), torch.randn(1, tokens, 3072)
    odd, even = (LowRankLinear(torch.randn(r, 768), torch.randn(768, r), torch.zeros(768)) for r in (127, 128))
    downs = [torch.randn(96, 768) for _ in range(3)]
    ups = [torch.randn(768, 96) for _ in range(3)]
    stacked = torch.cat(downs)

    def apart() -> None:
        for down, up in zip(downs, ups, strict=True):
            linear(linear(x, down), up)

    def together() -> None:
        for down, up in zip(linear(x, stacked).chunk(3, -1), ups, strict=True):
            linear(down, up)

    tricks: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "rank 128 instead of 127 (768 x 768)": (partial(odd, x), partial(even, x)),
        "down-projections of Q, K, V in one product (rank 96)": (apart, together),
        "GPT-2's GELU in one pass": (partial(NewGELUActivation(), wide), partial(GELUTanh(), wide)),
    }
    table = {}
    with torch.inference_mode(), use_threads(1):
        for name, (without, using) in tricks.items():
            times = summarize_times(interleaved({"without": without, "with": using}, rounds))
            table[name] = [1e3 * times[key]["median_ms"] for key in ("without", "with")]
    table["freed memory kept (TinyLlama's MLP, rank 640)"] = [
        _in_new_process(_mlp, tokens, rounds, keep) for keep in (False, True)
    ]
    rows = [
        {"trick": name, "tokens": tokens, "without_us": without, "with_us": using, "gain": without / using}
        for name, (without, using) in table.items()
    ]
    return pd.DataFrame(rows)


def _in_new_process(measure: Callable[..., float], *arguments: object) -> float:
    """Call in a fresh process: an allocator's speed depends on what the process freed before."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, *arguments).result()


def _mlp(tokens: int, rounds: int, keep: bool) -> float:
    """Microseconds of an MLP of TinyLlama's size with three layers of rank 640."""
    mlp = LlamaMLP(LlamaConfig(hidden_size=2048, intermediate_size=5632))
    for name in ("gate_proj", "up_proj", "down_proj"):
        m, n = mlp.get_submodule(name).weight.shape
        mlp.set_submodule(name, LowRankLinear(torch.randn(640, n), torch.randn(m, 640), None))
    x = torch.randn(1, tokens, 2048)
    with torch.inference_mode(), use_threads(1), keep_memory() if keep else nullcontext():
        return 1e6 * statistics.median(interleaved({"": partial(mlp, x)}, rounds)[""])
