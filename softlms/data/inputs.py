"""How a data set is fed to a model: the columns that its forward takes, in correctly prepared batches."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import datasets
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import MODEL_FOR_MASKED_LM_MAPPING, DataCollator, PreTrainedModel

__all__ = [
    "IGNORED", "batches", "in_eval_mode", "lengths", "positions", "prepared", "token_mask", "wants_positions",
    "without_logits",
]  # fmt: skip

IGNORED = -100  # label that every loss skips
ANSWERS = ("start_positions", "end_positions")  # labels under other names
RENAMED = ("label", "label_ids")  # to labels, by transformers' collators


def batches(
    model: PreTrainedModel,
    dataset: datasets.Dataset,
    data_collator: DataCollator,
    batch_size: int,
    *,
    labels: bool = False,
) -> Iterator[dict[str, Any]]:
    """Iterate over a data set in order, as keyword arguments for the model's forward.

    Parameters
    ----------
    model : PreTrainedModel
        It gets all columns that its forward takes, as with ``transformers.Trainer``.
    dataset : datasets.Dataset
    data_collator : callable
        Pads a batch on either side, as for ``transformers.Trainer``.
    batch_size : int
    labels : bool
        Include the labels.

    Raises
    ------
    ValueError
        The model takes none of the columns.
    """
    taken, columns = _parameters(model), dataset.column_names
    inputs = [column for column in columns if column in taken and not _is_label(column)]
    if not inputs:
        raise ValueError(f"{_name(model)} takes none of the columns {', '.join(columns)}: use softlms.encode.")
    if labels:
        inputs += [column for column in columns if column in RENAMED or (column in taken and _is_label(column))]
    for batch in DataLoader(dataset.select_columns(inputs), batch_size, collate_fn=data_collator):
        yield {name: values.to(model.device) for name, values in prepared(model, batch).items()}


def prepared(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Prepare a batch so that each row gives the same result as alone, whatever padding comes before it.

    Outside generation, transformers numbers positions from the first column of a batch, padding or not. Rows padded on
    the left therefore get their own ``position_ids``. A causal language model must not predict a row's first token from
    padding, so the label of that token is ignored.

    Parameters
    ----------
    model : PreTrainedModel
        Models that skip padding when they number tokens (the RoBERTa family), or take no ``position_ids``, get none.
    batch : mapping
        As returned by a collator.

    Raises
    ------
    ValueError
        The model classifies a row by its first column, which is padding.
    """
    ready = dict(batch)
    mask, labels = token_mask(ready), ready.get("labels")
    if mask is None or mask.ndim != 2:
        return ready
    first = mask.long().argmax(1, keepdim=True)
    if first.any():
        if _reads_first_column(model):
            raise ValueError(
                f"{_name(model)} reads the first token of a row, and here padding precedes it: pad on the right "
                "(tokenizer.padding_side = 'right')."
            )
        if "position_ids" not in ready and wants_positions(model):
            ready["position_ids"] = positions(mask)
    if labels is not None and labels.shape == mask.shape and _is_causal(model):
        ready["labels"] = labels.scatter(1, first, IGNORED)
    return ready


def without_logits(model: nn.Module, layers: Iterable[nn.Module]) -> dict[str, Any]:
    """More arguments for a forward pass of which only what `layers` see is read.

    They spare a causal language model its cache, and its logits except each row's last: of 32 windows of 512 tokens and
    49152 words these are 3 GB. If one of the layers is in the head, the logits stay.
    """
    taken, whole = _parameters(model), _unwrapped(model)
    base = getattr(whole, "base_model", whole)
    body = set() if base is whole else set(base.modules())
    spared = {"use_cache": False} | ({"logits_to_keep": 1} if body.issuperset(layers) else {})
    return {name: value for name, value in spared.items() if name in taken}


def positions(mask: Tensor) -> Tensor:
    """Positions (batch, length), counted from each row's first token, for a mask (batch, length)."""
    first = mask.long().argmax(1, keepdim=True)
    return (torch.arange(mask.shape[1], device=mask.device) - first).clamp(min=0)


def token_mask(batch: Mapping[str, Any]) -> Tensor | None:
    """Tokens other than padding, shape (batch, length): all if there is no attention mask; None without tokens."""
    if batch.get("attention_mask") is not None:
        return batch["attention_mask"].bool()
    if "input_ids" in batch:
        return torch.ones_like(batch["input_ids"], dtype=torch.bool)
    if "inputs_embeds" in batch:
        return torch.ones_like(batch["inputs_embeds"][..., 0], dtype=torch.bool)
    return None


def lengths(dataset: datasets.Dataset) -> list[int]:
    """Tokens in each row; 0 for rows without tokens, such as images."""
    column = next((c for c in ("input_ids", "inputs_embeds") if c in dataset.column_names), None)
    return [len(tokens) for tokens in dataset[column]] if column else [0] * len(dataset)


def _unwrapped(model: Any) -> Any:
    """The model inside PEFT's wrappers, which accept any argument and pass it on."""
    return getattr(model, "get_base_model", lambda: model)()


def _name(model: nn.Module) -> str:
    return type(_unwrapped(model)).__name__


def _parameters(model: nn.Module) -> Collection[str]:
    return inspect.signature(_unwrapped(model).forward).parameters.keys()


def _is_label(column: str) -> bool:
    return "label" in column or column in ANSWERS


def _reads_first_column(model: Any) -> bool:
    """True for classifiers on encoders; XLNet and causal models read the last token, wherever it is."""
    return "SequenceClassification" in _name(model) and type(model.config) in MODEL_FOR_MASKED_LM_MAPPING


def wants_positions(model: nn.Module) -> bool:
    """Whether the model takes positions, and would number padding too if it got none."""
    return "position_ids" in _parameters(model) and not any(
        # RoBERTa's positions start after the padding id, Qwen-VL's have three dimensions
        (name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None)
        or hasattr(module, "get_rope_index")
        for name, module in model.named_modules()
    )


def _is_causal(model: Any) -> bool:
    """Whether its loss compares a token's label with the output at the token before."""
    can_generate = getattr(model, "can_generate", None)
    return can_generate is not None and can_generate() and not model.config.is_encoder_decoder


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Turn dropout off inside; afterwards, also after an error, each module is in its previous mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
