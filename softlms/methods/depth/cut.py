"""Removing blocks: what is left is an ordinary model of the same class."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from softlms.methods.heads import BlockHead, classifier_of
from softlms.origin import note_dense

__all__ = ["keep_blocks", "put_head"]


def keep_blocks(model: PreTrainedModel, blocks: Sequence[int]) -> None:
    """Remove all other blocks, in place.

    Parameters
    ----------
    model : PreTrainedModel
    blocks : sequence of int
        Rising, from 0.

    Raises
    ------
    ValueError
        See `softlms.methods.heads.classifier_of`; or no blocks, blocks that the model does not have, or out of order.
    """
    parts = classifier_of(model, "Removing blocks")
    if not blocks or sorted({*blocks}) != [*blocks] or not 0 <= blocks[0] <= blocks[-1] < parts.depth:
        raise ValueError(f"blocks are rising numbers from 0 to {parts.depth - 1}, one or more; got {[*blocks]}.")
    note_dense(model)  # what was removed shows in the totals
    parts.encoder.layer = nn.ModuleList(parts.encoder.layer[block] for block in blocks)
    for place, block in enumerate(parts.encoder.layer):
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = place
    model.config.num_hidden_layers = len(blocks)


@torch.no_grad()
def put_head(model: PreTrainedModel, head: BlockHead) -> None:
    """Give the model's own pooler and classifier the values of a head."""
    parts = classifier_of(model, "A head")
    for own, values in ((parts.pooler, head.pooler), (parts.head, head.classifier)):
        own.weight.copy_(values.weight)
        own.bias.copy_(values.bias)
