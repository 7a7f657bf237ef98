"""Ranks of the paper's models at their real size, with the profile that the laptop runs have learned."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import nn
from transformers import BertConfig, PretrainedConfig

from softlms.architectures import find_targets
from softlms.budget import Budget, Costs, count_parameters, refill, uniform_ranks
from softlms.experiments.language_models import SmallModel

__all__ = ["half_ranks", "spread_blocks", "stretch_ranks"]

MULTIPLE = 16
# the table of laptop runs whose learned ranks stand for those of the real model, and the model that they are of
PROFILES: dict[str, tuple[str, Callable[[], PretrainedConfig]]] = {
    "bert-base": ("05_bert_table", lambda: BertConfig(hidden_size=384, intermediate_size=1536, num_hidden_layers=6)),
    "gpt2": ("06_gpt2_table", lambda: SmallModel("gpt2").config),
    "tinyllama-1.1b": ("07_tinyllama_table", lambda: SmallModel("llama").config),
    "mamba-130m": ("08_mamba_table", lambda: SmallModel("mamba").config),
}


def stretch_ranks(
    ranks: Mapping[str, int], shapes: Mapping[str, tuple[int, int]], costs: Costs, limit: float, multiple: int = 16
) -> dict[str, int]:
    """Ranks of a larger model with the profile that a smaller one of its family has learned.

    Parameters
    ----------
    ranks : mapping
        Of the smaller model, by layer name; blocks are numbered in the names.
    shapes : mapping
        (m, n) of the smaller model's layers.
    costs, limit, multiple
        Of the larger model; see `refill`. Block i of L takes the profile of the block at the same relative depth.

    Returns
    -------
    dict
        Ranks by name. Shares of full rank keep their proportions as far as the budget and the multiple let them.
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


def half_ranks(
    model: str, skeleton: nn.Module, *, keep: float = 0.5, results: Path | None = None, measured: Costs | None = None
) -> dict[str, int]:
    """Ranks of a real-sized model that keep a share of its total parameters, in multiples of 16.

    Parameters
    ----------
    model : str
        A key of `FULL_SIZE`.
    skeleton : nn.Module
        That model, dense; shapes are all that is looked at.
    keep : float
    results : Path, optional
        Folder with the laptop runs' ranks: their profile, at the budget next to this one. Without it, uniform ranks.
    measured : Costs, optional
        See `softlms.Budget.costs`: layers that thin is not faster for stay dense.

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
        raise FileNotFoundError(f"{path} is missing: it holds the ranks that the laptop runs have learned.")
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


def spread_blocks(ranks: Mapping[str, int], names: Sequence[str]) -> dict[str, int]:
    """Ranks of a model with fewer blocks: those of blocks evenly over the whole depth."""
    depth = 1 + max(_place(name)[0] for name in ranks)
    blocks = 1 + max(_place(name)[0] for name in names)
    thinned = {}
    for name in names:
        block, kind = _place(name)
        source = round(block * (depth - 1) / max(1, blocks - 1))
        thinned[name] = ranks[f"{name.removesuffix(f'{block}.{kind}')}{source}.{kind}"]
    return thinned


def _place(name: str) -> tuple[int, str]:
    """A layer's block and its name inside it."""
    block = re.search(r"\.(\d+)\.(.+)$", name)
    if block is None:
        raise ValueError(f"{name} stands in no numbered block: its profile cannot be stretched.")
    return int(block[1]), block[2]
