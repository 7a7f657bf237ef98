"""What the heads say about rows that run through all blocks, for any rule of leaving."""

from __future__ import annotations

from typing import Any

import datasets
import torch
from torch import Tensor
from transformers import DataCollator, PreTrainedModel

from softlms.data.inputs import in_eval_mode
from softlms.methods.early_exit.module import ExitingEncoder
from softlms.methods.early_exit.training import first_states

__all__ = ["said_by_all"]


@torch.no_grad()
def said_by_all(model: PreTrainedModel, rows: datasets.Dataset, collator: DataCollator, batch_size: int = 64) -> Tensor:
    """Log-probabilities of the heads' ensembles (of the heads, where they stand alone), and last the model's own.

    Parameters
    ----------
    model : PreTrainedModel
        With exits.
    rows : Dataset
        N rows.
    collator : callable
    batch_size : int

    Returns
    -------
    Tensor
        Shape (N, L, C).

    Raises
    ------
    ValueError
        The model has no exits.
    """
    encoder: Any = getattr(model.base_model, "encoder", None)
    if not isinstance(encoder, ExitingEncoder):
        raise ValueError(f"This {type(model).__name__} has no exits.")
    states = first_states(model, encoder.layer, rows, collator, batch_size)
    with in_eval_mode(model):
        whole: Any = model
        own = whole.classifier(whole.base_model.pooler(states[:, -1:]))  # both read the first token alone
        _, together = encoder.exits(states[:, :-1])
    return torch.cat([together, own.log_softmax(-1)[:, None]], dim=1)
