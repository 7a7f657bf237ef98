"""Why a speed-up falls short of what its FLOPs allow: the linear layers by themselves, and all that is not one."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from transformers import PreTrainedModel

from softlms.architectures import find_targets
from softlms.experiments.speed import build_forms, linear_weights
from softlms.kernels.allocator import keep_memory
from softlms.kernels.selective_scan import fast_scan
from softlms.machine import use_threads
from softlms.measure import interleaved
from softlms.ranges import check_at_least_one

__all__ = ["split_speed"]


def split_speed(
    model: str,
    *,
    layers: int | None = None,
    keep: float = 0.5,
    results: Path | None = None,
    tokens: int = 128,
    rounds: int = 9,
) -> pd.DataFrame:
    """Time the blocks, and their linear layers alone, one after the other on random inputs; one row, one thread.

    Parameters
    ----------
    model, layers, keep, results, tokens, rounds
        See `softlms.experiments.speed.compare_speed`.

    Returns
    -------
    DataFrame
        A row for each form: milliseconds of the blocks ("blocks_ms"), of their linear layers ("linears_ms") and of the
        rest ("rest_ms", their difference), GFLOPs a second in the linear layers ("gflops_per_s"), the speed-up over
        dense of the blocks ("speed_up") and of their linear layers ("linears_speed_up"), and what FLOPs alone would
        give the latter ("linears_flop_limit").

    Raises
    ------
    ValueError, FileNotFoundError
        A number below 1, or as from `softlms.experiments.speed.build_forms`.
    """
    check_at_least_one(tokens=tokens, rounds=rounds)
    forms = build_forms(model, layers=layers, keep=keep, results=results)
    states = torch.randn(1, tokens, forms["dense"].config.hidden_size, device=forms["dense"].device)
    states = states.to(forms["dense"].dtype)
    calls: dict[str, Callable[[], object]] = {}
    for form, network in forms.items():
        calls[f"{form}, blocks"] = partial(network.base_model, inputs_embeds=states)
        calls[f"{form}, linears"] = _linears(network, tokens)
    with torch.inference_mode(), fast_scan(), keep_memory(), use_threads(1):
        seconds = interleaved(calls, rounds, f"{model}: blocks and their linear layers", 1)
    taken = {name: 1e3 * statistics.median(values) for name, values in seconds.items()}
    flops = {form: 2 * tokens * sum(w.numel() for w in linear_weights(network)) for form, network in forms.items()}
    rows = []
    for form in forms:
        blocks, linears = taken[f"{form}, blocks"], taken[f"{form}, linears"]
        rows.append(
            {
                "model": model,
                "form": form,
                "tokens": tokens,
                "blocks_ms": blocks,
                "linears_ms": linears,
                "rest_ms": blocks - linears,
                "gflops_per_s": flops[form] / linears / 1e6,
                "speed_up": taken["dense, blocks"] / blocks,
                "linears_speed_up": taken["dense, linears"] / linears,
                "linears_flop_limit": flops["dense"] / flops[form],
            }
        )
    return pd.DataFrame(rows)


def _linears(model: PreTrainedModel, tokens: int) -> Callable[[], None]:
    """The linear layers that compression looks at, in their order."""
    targets = find_targets(model)
    widths = {target.shape[1] for target in targets}
    inputs = {n: torch.randn(1, tokens, n, device=model.device, dtype=model.dtype) for n in widths}

    def run() -> None:
        for target in targets:
            target.module(inputs[target.shape[1]])

    return run
