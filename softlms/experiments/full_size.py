"""The paper's models at full size: their ranks, and the time and memory that compressing them takes.

Time and memory depend on shapes alone, so a model with random weights can replace the trained one. A checkpoint works
as well.
"""

from __future__ import annotations

import copy
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import torch
import transformers
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn
from transformers import AutoConfig, BertConfig, PretrainedConfig, PreTrainedModel

from softlms.architectures import find_targets
from softlms.budget import Budget, Costs, count_parameters, parameter_costs, refill, uniform_ranks
from softlms.data.hub import pretrained
from softlms.experiments.language_models import SmallModel
from softlms.experiments.provenance import append_rows
from softlms.fused import split_fused
from softlms.kernels.selective_scan import fast_scan
from softlms.layers import LowRankLinear
from softlms.measure import random_rows
from softlms.modules import make_linear, replace
from softlms.surgery import decompose, deploy
from softlms.utils.machine import hardware, use_threads, versions
from softlms.utils.ranges import check_at_least_one

__all__ = [
    "FULL_SIZE",
    "compress_full_size",
    "describe_full_size",
    "find_full_size",
    "half_ranks",
    "peak_gb",
    "print_full_size",
    "spread_blocks",
    "stretch_ranks",
]

# model class and configuration, as published on the hub
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

MULTIPLE = 16
# laptop runs whose learned ranks are used for the real model, and the small model they were learned on
PROFILES: dict[str, tuple[str, Callable[[], PretrainedConfig]]] = {
    "bert-base": ("05_bert_table", lambda: BertConfig(hidden_size=384, intermediate_size=1536, num_hidden_layers=6)),
    "gpt2": ("06_gpt2_table", lambda: SmallModel("gpt2").config),
    "tinyllama-1.1b": ("07_tinyllama_table", lambda: SmallModel("llama").config),
    "mamba-130m": ("08_mamba_table", lambda: SmallModel("mamba").config),
}


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
    """Build a model, decompose it, cut it to the budget, deploy it, and compare it with its dense form.

    Parameters
    ----------
    model, layers
        See `find_full_size`.
    keep, count
        See `softlms.Budget`.
    split : bool
        Split GPT-2's fused projections first.
    threads : int
        Torch's threads.
    tokens : int
        Length of the random row on which the outputs are compared.

    Returns
    -------
    dict
        "model", "weights" ("random" or "checkpoint"), "keep", "count", "split", "blocks", "parameters_total",
        "kept_linear", "kept_total", seconds of each step ("build_s", "decompose_s", "deploy_s"), "peak_gb" (see
        `peak_gb`), "error" (norm of the outputs' difference, relative to the dense outputs), "hardware", "versions".

    Raises
    ------
    ValueError, OSError
        Before any work: the budget cannot be met, a number is below 1, or there is no such model.
    """
    check_at_least_one(threads=threads, tokens=tokens)
    create, config = find_full_size(model, layers)
    with torch.device("meta"):
        skeleton = create(None)
    if split:
        split_fused(skeleton)
    shapes = {target.name: target.shape for target in find_targets(skeleton)}
    Budget(keep, count).limit(parameter_costs(shapes, count_parameters(skeleton).rest, count))  # may raise

    seconds = {}
    with use_threads(threads), fast_scan():
        torch.manual_seed(0)
        started = time.perf_counter()
        compressed = create(None if model in FULL_SIZE else model).eval()
        if split:
            split_fused(compressed)
        dense = count_parameters(compressed)
        seconds["build_s"], started = time.perf_counter() - started, time.perf_counter()
        # one layer at a time: the bar moves, and only one SVD is in memory
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
    """Run ``softlms full-size``: print what `compress_full_size` measured, and add a row to the CSV file `out`."""
    result = compress_full_size(model, **options)
    title = "{model}, {blocks} blocks, {keep} of {count} kept; {hardware}".format(**result)
    table = Table(show_header=False, title=title)
    for name, value in describe_full_size(result).items():
        table.add_row(str(name), value)
    Console().print(table)
    if out:
        append_rows(out, pd.DataFrame([result]))


def peak_gb() -> float:
    """Peak memory of this process since it started, in GB."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / 1e9
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)


def describe_full_size(result: Mapping[str, Any]) -> pd.Series:
    """The result of `compress_full_size` in words."""
    return pd.Series(
        {
            "parameters": f"{result['parameters_total'] / 1e6:.1f} M",
            "kept": f"{result['kept_linear']:.4f} of the linears, {result['kept_total']:.4f} of the total",
            "build, decompose, deploy": "{build_s:.1f} s, {decompose_s:.1f} s, {deploy_s:.1f} s".format(**result),
            "peak memory": f"{result['peak_gb']:.1f} GB",
            "deployed against recomposed": f"{result['error']:.1e} of the outputs' norm",
        }
    )


def find_full_size(model: str, layers: int | None) -> tuple[Callable[[str | None], PreTrainedModel], PretrainedConfig]:
    """Find a model: a function that builds it from a checkpoint or with random weights (None), and its configuration.

    Parameters
    ----------
    model : str
        A key of `FULL_SIZE`, or the folder or hub name of a checkpoint.
    layers : int, optional
        Number of blocks to use.

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
            raise ValueError(f"The config.json of {model} names no model class (architectures).")
        name = config.architectures[0]
    if layers is not None:
        if not 1 <= layers <= config.num_hidden_layers:
            raise ValueError(f"layers must be 1 to {config.num_hidden_layers}, got {layers}.")
        config.num_hidden_layers = layers
    kind = getattr(transformers, name)

    def create(checkpoint: str | None) -> PreTrainedModel:
        return kind(config) if checkpoint is None else pretrained(kind, checkpoint, config=config, dtype=torch.float32)

    return create, config


def half_ranks(
    model: str, skeleton: nn.Module, *, keep: float = 0.5, results: Path | None = None, measured: Costs | None = None
) -> dict[str, int]:
    """Find ranks, multiples of 16, at which a full-size model keeps a share of its total parameters.

    Parameters
    ----------
    model : str
        A key of `FULL_SIZE`.
    skeleton : nn.Module
        That model, dense; only its shapes matter.
    keep : float
    results : Path, optional
        Folder with the ranks that the laptop runs learned; those at the nearest budget are stretched to this model.
        Uniform ranks when not given.
    measured : Costs, optional
        See `softlms.Budget.costs`. Layers that factors would not make faster stay dense.

    Raises
    ------
    FileNotFoundError
        The folder has no such table.
    """
    shapes = {target.name: target.shape for target in find_targets(skeleton)}
    budget = Budget(keep, "total", MULTIPLE)
    costs = budget.costs(shapes, count_parameters(skeleton), measured)
    limit = budget.limit(costs)
    if results is None:
        return uniform_ranks(costs, limit, MULTIPLE)
    table_name, config = PROFILES[model]
    path = results / f"{table_name}_ranks.csv"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: it holds the ranks that the laptop runs learned.")
    table = pd.read_csv(path)
    learned = table[(table.method == "whitened+soft") & (table.seed == table.seed.min())]
    learned = learned[learned.task == learned.task.iloc[0]]
    share = limit / (costs.dense - costs.rest)
    nearest = min(sorted(learned.keep.unique()), key=lambda kept: abs(kept - share))
    learned = learned[learned.keep == nearest]
    ranks = dict(zip(learned.layer, learned["rank"], strict=True))
    with torch.device("meta"):
        small = type(skeleton)(config())
    return stretch_ranks(ranks, {t.name: t.shape for t in find_targets(small)}, costs, limit, MULTIPLE)


def stretch_ranks(
    ranks: Mapping[str, int], shapes: Mapping[str, tuple[int, int]], costs: Costs, limit: float, multiple: int = 16
) -> dict[str, int]:
    """Apply the ranks learned by a smaller model to a larger one of its family, block by block at the same depth.

    Parameters
    ----------
    ranks, shapes : mapping
        Ranks and (m, n) of the smaller model's layers, by names that contain the block's number.
    costs, limit, multiple
        Of the larger model; see `refill`.

    Returns
    -------
    dict
        Ranks by name. Shares of full rank keep their proportions as far as budget and multiple allow.
    """
    small: dict[str, dict[int, float]] = {}
    for name, rank in ranks.items():
        block, kind = _place(name)
        small.setdefault(kind, {})[block] = rank / min(shapes[name])
    places = {name: _place(name) for name in costs.shapes}
    depth = 1 + max(block for block, _ in places.values())
    scores = {}
    for name, (block, kind) in places.items():
        shares = small[kind]
        share = shares[round(block * (len(shares) - 1) / max(1, depth - 1))]
        full = min(costs.shapes[name])
        scores[name] = [-(i + 1) / (share * full) for i in range(full)]
    start = {name: min(multiple, *shape) for name, shape in costs.shapes.items()}
    return refill(costs, start, limit, scores, multiple)


def spread_blocks(ranks: Mapping[str, int], names: Sequence[str]) -> dict[str, int]:
    """Ranks for a model with fewer blocks, taken evenly over the whole depth."""
    depth = 1 + max(_place(name)[0] for name in ranks)
    blocks = 1 + max(_place(name)[0] for name in names)
    thinned = {}
    for name in names:
        block, kind = _place(name)
        source = round(block * (depth - 1) / max(1, blocks - 1))
        thinned[name] = ranks[f"{name.removesuffix(f'{block}.{kind}')}{source}.{kind}"]
    return thinned


def _recomposed(model: PreTrainedModel) -> PreTrainedModel:
    """A deployed model with its factors multiplied."""
    dense = copy.deepcopy(model)
    for name, layer in [(n, m) for n, m in dense.named_modules() if isinstance(m, LowRankLinear)]:
        replace(dense, name, make_linear(layer.weight, layer.bias))
    return dense


def _place(name: str) -> tuple[int, str]:
    """A layer's block and its name inside it."""
    block = re.search(r"\.(\d+)\.(.+)$", name)
    if block is None:
        raise ValueError(f"{name} is in no numbered block: its rank cannot be stretched.")
    return int(block[1]), block[2]
