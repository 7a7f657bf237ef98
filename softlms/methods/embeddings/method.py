"""Compressed embeddings as methods of a chain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from softlms.methods.base import Config, Method, Work
from softlms.methods.embeddings.fit import FITS, latent_size
from softlms.methods.embeddings.module import CompressedEmbedding, CompressedHead
from softlms.methods.embeddings.surgery import check_table, put_codes
from softlms.methods.static import recover
from softlms.utils.ranges import check_positive

__all__ = ["METHODS", "EmbeddingsConfig", "distances"]


@dataclass(frozen=True)
class EmbeddingsConfig(Config):
    """Settings of compressed embeddings.

    Attributes
    ----------
    fit, times
        See `softlms.methods.embeddings.surgery.compress_embeddings`.
    fit_epochs : float
        Passes over the table, for "direction".
    epochs, static_learning_rate : float
        Of recovery afterwards; 0 epochs leave it to the next method of the chain.

    Raises
    ------
    ValueError
        A setting is unknown or out of range.
    """

    fit: str = "direction"
    times: float = 5.0
    fit_epochs: float = 30
    epochs: float = 3
    static_learning_rate: float = 2e-4

    def __post_init__(self) -> None:
        if self.fit not in FITS:
            raise ValueError(f"fit must be one of {', '.join(map(repr, FITS))}, got {self.fit!r}.")
        check_positive(times=self.times, fit_epochs=self.fit_epochs)
        check_positive(most=1, static_learning_rate=self.static_learning_rate)
        if self.epochs:
            check_positive(epochs=self.epochs)

    def unused(self) -> tuple[str, ...]:
        without = () if self.fit == "direction" else ("fit_epochs",)
        return without if self.epochs else (*without, "static_learning_rate")


def apply(model: PreTrainedModel, config: EmbeddingsConfig, work: Work) -> dict[str, Any]:
    """Compress a model's embeddings, and let it recover.

    Returns
    -------
    dict
        "latent": numbers a word; "cosine" and "rmse": see `distances`; "untuned", "steps" and "history".
    """
    table = check_table(model, config.times, config.fit).float()
    words, size = table.shape
    counts = torch.zeros(words, device=table.device)
    for ids in work.rows["input_ids"]:
        counts += torch.bincount(torch.as_tensor(ids, device=table.device), minlength=words)
    k = latent_size(words, size, config.times)
    codes = FITS[config.fit](table, k, counts, config.fit_epochs, work.seed, work.note)
    far = distances(table, codes.table())
    put_codes(model, codes)
    untuned = work.scores(lambda: model)
    recovered = recover(model, config.epochs, config.static_learning_rate, work)
    return {"latent": k, **far, "untuned": untuned} | recovered


def distances(table: Tensor, decoded: Tensor) -> dict[str, float]:
    """ "cosine": the mean of 1 - cos over rows; "rmse": the root of the mean squared error of an entry."""
    cosine = 1 - F.cosine_similarity(table, decoded, dim=1).mean()
    return {"cosine": cosine.item(), "rmse": (table - decoded).square().mean().sqrt().item()}


MODULES = (CompressedEmbedding, CompressedHead)
METHODS = tuple(Method(f"{name}-embeddings", EmbeddingsConfig, apply, MODULES, fixed={"fit": name}) for name in FITS)
