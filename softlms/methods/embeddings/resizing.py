"""``resize_token_embeddings`` of a model with compressed embeddings: transformers resizes dense tables alone."""

from __future__ import annotations

import functools
from typing import Any

from transformers import PreTrainedModel

from softlms.methods.embeddings.module import CompressedEmbedding, CompressedHead, Table
from softlms.modules import replace, retie

__all__ = ["put", "tied_names"]


def tied_names(model: PreTrainedModel) -> dict[str, str]:
    """Names of the tensors of a compressed head, each with that of the embeddings' tensor that it is."""
    names = {id(module): name for name, module in model.named_modules()}
    outer, inner = names[id(model.get_output_embeddings())], names[id(model.get_input_embeddings())]
    return {f"{outer}.{part}": f"{inner}.{part}" for part in ("codes.weight", "decoder.weight", "decoder.bias")}


def put(model: PreTrainedModel, name: str, module: Table) -> None:
    """Replace a module: mode and hooks are taken over, and what learns in the new one is as it is there."""
    learns = {values: values.requires_grad for values in module.parameters()}
    replace(model, name, module)
    for values, learned in learns.items():
        values.requires_grad_(learned)


_present: Any = PreTrainedModel._resize_token_embeddings
_original = getattr(_present, "before_softlms", _present)


@functools.wraps(_original)
def _resize_token_embeddings(
    self: PreTrainedModel, new_num_tokens: int | None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
) -> Any:
    old: Any = self.get_input_embeddings()
    if not isinstance(old, CompressedEmbedding):
        return _original(self, new_num_tokens, pad_to_multiple_of, mean_resizing)
    if not mean_resizing:
        raise ValueError("A new word of compressed embeddings starts as the mean of all: leave mean_resizing at True.")
    words = old.words if new_num_tokens is None else new_num_tokens
    if pad_to_multiple_of is not None:
        words = -(-words // pad_to_multiple_of) * pad_to_multiple_of
    if words == old.words:
        return old
    new = old.resized(words)
    head: Any = self.get_output_embeddings()
    names = {id(module): name for name, module in self.named_modules()}
    put(self, names[id(old)], new)
    if isinstance(head, CompressedHead):
        wide, outer = head.resized(new), names[id(head)]
        put(self, outer, wide)
        for pair in self.all_tied_weights_keys.items():  # the bias may have another name too, as BERT's has
            if f"{outer}.bias" in pair:
                place, _, leaf = pair[1 - pair.index(f"{outer}.bias")].rpartition(".")
                setattr(self.get_submodule(place), leaf, wide.bias)
        retie(self, tied_names(self))
    elif head is not None:
        self.set_output_embeddings(self._get_resized_lm_head(head, words, mean_resizing=mean_resizing))
    return new


_resize_token_embeddings.before_softlms = _original  # type: ignore[attr-defined]  # may be reloaded, as in a notebook
PreTrainedModel._resize_token_embeddings = _resize_token_embeddings
