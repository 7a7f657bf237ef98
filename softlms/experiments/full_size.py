"""The paper's models at their real size: compressed end to end, with time and memory, without their weights.

Time and memory depend on shapes alone, so a model made from its configuration, with random weights, stands for the
trained one; a checkpoint does as well.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd
import psutil
import torch
import transformers
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from softlms.architectures import find_targets
from softlms.budget import Budget, count_parameters, parameter_costs
from softlms.data.hub import pretrained
from softlms.experiments.provenance import append_rows
from softlms.fused import split_fused
from softlms.kernels.selective_scan import fast_scan
from softlms.layers import LowRankLinear
from softlms.machine import hardware, use_threads, versions
from softlms.measure import random_rows
from softlms.modules import make_linear, replace
from softlms.ranges import check_at_least_one
from softlms.surgery import decompose, deploy

__all__ = ["FULL_SIZE", "compress_full_size", "describe_full_size", "find_full_size", "peak_gb", "print_full_size"]

# class and configuration, as published on the hub
FULL_SIZE: dict[str, tuple[str, Callable[[], PretrainedConfig]]] = {
    "bert-base": ("BertForSequenceClassification", transformers.BertConfig),
    "gpt2": ("GPT2LMHeadModel", transformers.GPT2Config),
    "tinyllama-1.1b": (
        "LlamaForCausalLM",
        lambda: transformers.LlamaConfig(
            hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
            num_key_value_heads=4, max_position_embeddings=2048, rms_norm_eps=1e-5,
        ),
    ),
    "mamba-130m": (
        "MambaForCausalLM",
        lambda: transformers.MambaConfig(hidden_size=768, num_hidden_layers=24, vocab_size=50280),
    ),
}  # fmt: skip


def compress_full_size(
    model: str,
    *,
    keep: float = 0.5,
    count: str = "total",
    layers: int | None = None,
    split: bool = False,
    threads: int = 2,
    tokens: int = 64,
) -> dict[str, Any]:
    """Build, decompose, cut to the budget, deploy and compare with the recomposed dense model.

    Parameters
    ----------
    model : str
        A key of `FULL_SIZE`, or the folder or hub name of a checkpoint.
    keep, count
        See `softlms.Budget`.
    layers : int, optional
        Only so many blocks, for a quick look; all when not given.
    split : bool
        Take GPT-2's fused projections apart first.
    threads : int
        Of torch.
    tokens : int
        Of the random row that the outputs are compared on.

    Returns
    -------
    dict
        "model", "weights" ("random" or "checkpoint"), "keep", "count", "split", "blocks", "parameters_total",
        "kept_linear", "kept_total", seconds of each step ("build_s", "decompose_s", "deploy_s"), "peak_gb" (of this
        process, all it did before included), "error" (norm of the difference of the outputs, over that of the
        recomposed dense model's), "hardware", "versions".

    Raises
    ------
    ValueError, OSError
        The budget cannot be met, a number is below 1, or there is no such model: before any work.
    """
    check_at_least_one(threads=threads, tokens=tokens)
    create, config = find_full_size(model, layers)
    with torch.device("meta"):
        skeleton = create(None)
    if split:
        split_fused(skeleton)
    shapes = {target.name: target.shape for target in find_targets(skeleton)}
    Budget(keep, count).limit(parameter_costs(shapes, count_parameters(skeleton).rest, count))  # refuses what cannot be

    seconds = {}
    with use_threads(threads), fast_scan():
        torch.manual_seed(0)
        started = time.perf_counter()
        compressed = create(None if model in FULL_SIZE else model).eval()
        if split:
            split_fused(compressed)
        dense = count_parameters(compressed)
        seconds["build_s"], started = time.perf_counter() - started, time.perf_counter()
        # one at a time: a bar that moves, and one layer's SVD in memory
        for name in track(shapes, f"decomposing {model}", transient=True, disable=not sys.stdout.isatty()):
            decompose(compressed, targets=lambda candidate, module, name=name: candidate == name)  # type: ignore[misc]
        seconds["decompose_s"], started = time.perf_counter() - started, time.perf_counter()
        deploy(compressed, keep=keep, count=count)
        seconds["deploy_s"] = time.perf_counter() - started
        kept = count_parameters(compressed)
        row = random_rows(config.vocab_size, 1, tokens)
        with torch.inference_mode():
            thin = compressed(**row).logits
            dense_again = _recomposed(compressed)(**row).logits
        error = ((thin - dense_again).norm() / dense_again.norm()).item()
        made_on = hardware()
    peak = peak_gb()
    return {
        "model": model,
        "weights": "random" if model in FULL_SIZE else "checkpoint",
        "keep": keep,
        "count": count,
        "split": split,
        "blocks": config.num_hidden_layers,
        "parameters_total": dense.total,
        "kept_linear": kept.kept("linear"),
        "kept_total": kept.kept("total"),
        **seconds,
        "peak_gb": peak,
        "error": error,
        "hardware": made_on,
        "versions": versions(),
    }


def print_full_size(*, model: str, out: str = "", **options: Any) -> None:
    """The ``softlms full-size`` command: a table of `compress_full_size`; a row more of the CSV that `out` names."""
    result = compress_full_size(model, **options)
    title = "{model}, {blocks} blocks, {keep} of {count} kept; {hardware}".format(**result)
    table = Table(show_header=False, title=title)
    for name, value in describe_full_size(result).items():
        table.add_row(str(name), value)
    Console().print(table)
    if out:
        append_rows(out, pd.DataFrame([result]))


def peak_gb() -> float:
    """The most memory that this process has held, in GB."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / 1e9
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)


def describe_full_size(result: Mapping[str, Any]) -> pd.Series:
    """What `compress_full_size` measured, in words."""
    return pd.Series(
        {
            "parameters": f"{result['parameters_total'] / 1e6:.1f} M",
            "kept": f"{result['kept_linear']:.4f} of the linears, {result['kept_total']:.4f} of the total",
            "build, decompose, deploy": ", ".join(
                f"{result[f'{step}_s']:.1f} s" for step in ("build", "decompose", "deploy")
            ),
            "peak memory": f"{result['peak_gb']:.1f} GB",
            "deployed against recomposed": f"{result['error']:.1e} of the outputs' norm",
        }
    )


def find_full_size(model: str, layers: int | None) -> tuple[Callable[[str | None], PreTrainedModel], PretrainedConfig]:
    """What makes a model, from a checkpoint's folder or name or with random weights (None), and its configuration.

    Parameters
    ----------
    model : str
        A key of `FULL_SIZE`, or the folder or hub name of a checkpoint.
    layers : int, optional
        Only so many blocks.

    Raises
    ------
    ValueError, OSError
        There is no such model, or it has fewer blocks.
    """
    if model in FULL_SIZE:
        name, make = FULL_SIZE[model]
        config = make()
    else:
        config = pretrained(AutoConfig, model)
        if not config.architectures:
            raise ValueError(f"{model} does not say in config.json what class it is (architectures).")
        name = config.architectures[0]
    if layers is not None:
        if not 1 <= layers <= config.num_hidden_layers:
            raise ValueError(f"layers must be 1 to {config.num_hidden_layers}, got {layers}.")
        config.num_hidden_layers = layers
    kind = getattr(transformers, name)

    def create(checkpoint: str | None) -> PreTrainedModel:
        return kind(config) if checkpoint is None else pretrained(kind, checkpoint, config=config, dtype=torch.float32)

    return create, config


def _recomposed(model: PreTrainedModel) -> PreTrainedModel:
    """The dense model that a deployed one stands for."""
    dense = copy.deepcopy(model)
    for name, layer in [(n, m) for n, m in dense.named_modules() if isinstance(m, LowRankLinear)]:
        replace(dense, name, make_linear(layer.weight, layer.bias))
    return dense
