"""Put stored linears in place of a model's dense ones, kind by kind, in so many bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from softlms.architectures import Target, find_targets
from softlms.lowrank.calibration import LayerStatistics
from softlms.lowrank.factorization import linear_targets
from softlms.methods.shared_decoder.codecs import Codec, Source
from softlms.methods.shared_decoder.module import CODECS, StoredLinear
from softlms.modules import replace
from softlms.origin import remember
from softlms.utils.ranges import check_positive

__all__ = ["store_linears", "stored_bytes"]

M = TypeVar("M", bound=PreTrainedModel)
FLOAT = 4  # bytes of a number of the dense model, in float32


def store_linears(
    model: M,
    times: float = 5.0,
    codec: str | Codec = "shared-decoder",
    *,
    symbols: Sequence[str] = (),
    together: bool = True,
    statistics: Mapping[str, LayerStatistics] | None = None,
    seed: int = 0,
    note: Callable[[str], None] = lambda line: None,
) -> M:
    """Replace a model's linears by stored ones; those of a kind share what their codec shares.

    The model is as large and as fast as before once it is loaded: this saves disk and download.

    Parameters
    ----------
    model : PreTrainedModel
        Changed in place; no training follows.
    times : float
        Bytes of a kind's weights in float32 over the bytes that are stored of it, which are never more.
    codec : str or Codec
        A key of `softlms.methods.shared_decoder.module.CODECS`, or such an object with settings of its own.
    symbols : sequence of str
        Kinds, such as "W_fc1"; default: all that softlms factors.
    together : bool
        Encode all layers of a kind together, or each alone in as many bytes.
    statistics : mapping, optional
        From `softlms.calibrate`, for "whitened-svd".
    seed : int
    note : callable
        Called with a line of progress.

    Returns
    -------
    PreTrainedModel
        `model` itself.

    Raises
    ------
    ValueError
        An unknown codec or kind, too few bytes for the codec, missing statistics, or a layer that is factored already,
        shared or not finite. In that case nothing is changed.
    """
    if isinstance(codec, str) and codec not in CODECS:
        raise ValueError(f"codec must be one of {', '.join(map(repr, CODECS))}, got {codec!r}.")
    check_positive(times=times)
    method = CODECS[codec]() if isinstance(codec, str) else codec
    groups = _groups(model, symbols, together)
    linears = linear_targets(model, lambda name, module: any(name in group for group in groups))
    if method.needs_inputs and (statistics is None or not linears.keys() <= statistics.keys()):
        raise ValueError(f"{method.name} needs statistics of each layer's inputs: softlms.calibrate(model, ...).")
    limits = [_limit(group, times, method, linears) for group in groups]
    remember(model)
    for number, (group, limit) in enumerate(zip(groups, limits, strict=True), 1):
        note(f"{method.name}: kind {number} of {len(groups)}, {len(group)} layers in {limit:,} bytes")
        grams = [statistics[name].gram for name in group] if statistics and method.needs_inputs else None
        weights = [linears[name].weight.detach().float().cpu() for name in group]
        encoded = method.encode(Source(weights, grams, seed), limit)
        if encoded.bytes > limit:
            raise AssertionError(f"{method.name} took {encoded.bytes} bytes of {limit}.")
        for name, own, settings in zip(group, encoded.own, encoded.settings, strict=True):
            old = linears[name].weight
            weight = method.decode(encoded.shared, own, settings, (old.shape[0], old.shape[1])).to(old)
            layer = StoredLinear(encoded.shared, own, linears[name].bias, method.name, settings, weight)
            replace(model, name, layer)
    return model


def stored_bytes(model: nn.Module) -> int:
    """Bytes of all stored weights, what is shared once."""
    parts = [part for module in model.modules() if isinstance(module, StoredLinear) for part in module.buffers()]
    return sum(size for size in {part.data_ptr(): part.numel() for part in parts if part.dtype == torch.uint8}.values())


def _groups(model: nn.Module, symbols: Sequence[str], together: bool) -> list[list[str]]:
    kinds: dict[str, list[Target]] = {}
    for target in find_targets(model):
        kinds.setdefault(target.symbol, []).append(target)
    if unknown := set(symbols) - kinds.keys():
        raise ValueError(f"No linears of the kind {', '.join(sorted(unknown))}; this model has {', '.join(kinds)}.")
    chosen = [[target.name for target in kinds[symbol]] for symbol in symbols or kinds]
    return chosen if together else [[name] for group in chosen for name in group]


def _limit(group: Sequence[str], times: float, method: Codec, linears: Mapping[str, nn.Linear]) -> int:
    """Bytes that a group may take; ValueError if its codec needs more."""
    m, n = linears[group[0]].weight.shape
    whole = FLOAT * len(group) * m * n
    limit, least = int(whole / times), method.least(len(group), (m, n))
    if limit < least:
        raise ValueError(
            f"times={times} leaves {limit:,} bytes for the {len(group)} layers like {group[0]}, and {method.name} "
            f"needs {least:,}: times may be at most {whole / least:.1f}."
        )
    return limit
