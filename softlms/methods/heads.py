"""A head behind each block of an encoder: what early exits and the search for a depth share.

Shapes: L blocks, rows of d numbers a token, C classes. A head reads the first token's state, h (B, d).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from softlms.modules import Replacement

__all__ = ["BlockHead", "Classifier", "classifier_of"]


@dataclass(frozen=True)
class Classifier:
    """The parts of a model that classifies a row by its first token.

    Attributes
    ----------
    base : str
        Name of the model without its head, such as "bert".
    encoder : nn.Module
        Its blocks are in ``layer``.
    pooler : nn.Linear
    dropout : float
    head : nn.Linear
    """

    base: str
    encoder: Any
    pooler: nn.Linear
    dropout: float
    head: nn.Linear

    @property
    def depth(self) -> int:
        """L."""
        return len(self.encoder.layer)


def classifier_of(model: PreTrainedModel, what: str) -> Classifier:
    """Find these parts.

    Parameters
    ----------
    model : PreTrainedModel
    what : str
        Who needs them, for errors.

    Raises
    ------
    ValueError
        The model has no blocks alone in an encoder, no linear pooler, no linear head for one of two classes or more, or
        reads from left to right; or it has exits, which come last.
    """
    prefix = model.base_model_prefix
    base: Any = getattr(model, prefix, None)
    encoder = getattr(base, "encoder", None)
    if isinstance(encoder, Replacement):
        raise ValueError(f"{what}: the model has exits already, and they come last: start from the one without.")
    parts = [name for name, _ in encoder.named_children()] if isinstance(encoder, nn.Module) else []
    pooler = getattr(getattr(base, "pooler", None), "dense", None)
    head: Any = getattr(model, "classifier", None)
    reads_on = getattr(model.config, "is_decoder", False)
    if parts != ["layer"] or not isinstance(pooler, nn.Linear) or not isinstance(head, nn.Linear) or reads_on:
        raise ValueError(
            f"{what} needs a classifier with blocks in an encoder, a pooler and a linear head, as "
            f"BertForSequenceClassification; {type(model).__name__} is none."
        )
    if head.out_features < 2:
        raise ValueError(f"{what} needs two classes or more; this {type(model).__name__} has one output, a score.")
    if model.config.problem_type == "multi_label_classification":
        raise ValueError(f"{what} needs one class for each row; this model gives each row any number of labels.")
    return Classifier(prefix, base.encoder, pooler, model.dropout.p, head)


class BlockHead(nn.Module):
    """The model's own kind of head behind any block: dropout and a linear layer of tanh(P h + p).

    Parameters
    ----------
    size, classes : int
        d and C.
    dropout : float
    extra : int
        Further inputs of the linear layer.
    """

    def __init__(self, size: int, classes: int, dropout: float, extra: int = 0) -> None:
        super().__init__()
        self.pooler = nn.Linear(size, size)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(size + extra, classes)

    @classmethod
    def like(cls, parts: Classifier, extra: int = 0) -> Self:
        """A head with the values of the model's own; those of further inputs are 0."""
        classes, size = parts.head.weight.shape
        head = cls(size, classes, parts.dropout, extra).to(parts.head.weight)
        with torch.no_grad():
            head.pooler.weight.copy_(parts.pooler.weight)
            head.pooler.bias.copy_(parts.pooler.bias)
            head.classifier.weight.zero_()[:, :size] = parts.head.weight
            head.classifier.bias.copy_(parts.head.bias)
        return head

    def forward(self, first: Tensor, more: Tensor | None = None) -> Tensor:
        """Logits (B, C) of the first token's state (B, d), and of further inputs (B, extra)."""
        pooled = self.dropout(torch.tanh(self.pooler(first)))
        return self.classifier(pooled if more is None else torch.cat([pooled, more], dim=-1))
