"""``resize_token_embeddings`` of a model with compressed embeddings: transformers resizes dense tables alone."""

from __future__ import annotations

import functools
from typing import Any

from transformers import PreTrainedModel

from softlms.methods.embeddings.module import CompressedEmbedding, CompressedHead
from softlms.modules import retie

__all__ = ["tied_names"]


def tied_names(model: PreTrainedModel) -> dict[str, str]:
    """Names of the tensors of a compressed head, each with that of the embeddings' tensor that it is."""
    names = {id(module): name for name, module in model.named_modules()}
    outer, inner = names[id(model.get_output_embeddings())], names[id(model.get_input_embeddings())]
    return {f"{outer}.{part}": f"{inner}.{part}" for part in ("codes.weight", "decoder.weight", "decoder.bias")}


_present: Any = PreTrainedModel._resize_token_embeddings
_original = getattr(_present, "before_softlms", _present)


@functools.wraps(_original)
def _resize_token_embeddings(
    self: PreTrainedModel, new_num_tokens: int | None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
) -> Any:
    old: Any = self.get_input_embeddings()
    if not isinstance(old, CompressedEmbedding):
        return _original(self, new_num_tokens, pad_to_multiple_of, mean_resizing)
    words = old.words if new_num_tokens is None else new_num_tokens
    if pad_to_multiple_of is not None:
        words = -(-words // pad_to_multiple_of) * pad_to_multiple_of
    if words == old.words:
        return old
    new = old.resized(words)
    head: Any = self.get_output_embeddings()
    self.set_input_embeddings(new)
    if isinstance(head, CompressedHead):
        self.set_output_embeddings(head.resized(new))
        retie(self, tied_names(self))
    elif head is not None:
        self.set_output_embeddings(self._get_resized_lm_head(head, words, mean_resizing=mean_resizing))
    return new


_resize_token_embeddings.before_softlms = _original  # type: ignore[attr-defined]  # may be reloaded, as in a notebook
PreTrainedModel._resize_token_embeddings = _resize_token_embeddings
