"""Put codes and a decoder in place of a model's table of embeddings, and of a head tied to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from softlms.architectures import FLOATS
from softlms.methods.embeddings.fit import FITS, Codes, latent_size
from softlms.methods.embeddings.module import CompressedEmbedding, CompressedHead, Decoder, Table
from softlms.methods.embeddings.resizing import put, tied_names
from softlms.modules import retie
from softlms.origin import remember

__all__ = ["check_table", "compress_embeddings", "put_codes"]

M = TypeVar("M", bound=PreTrainedModel)


def compress_embeddings(
    model: M,
    times: float = 5.0,
    fit: str = "direction",
    *,
    counts: Tensor | None = None,
    epochs: float = 30,
    seed: int = 0,
    note: Callable[[str], None] = lambda line: None,
) -> M:
    """Replace a model's table of word embeddings by codes and a decoder; a head tied to it stays tied.

    Parameters
    ----------
    model : PreTrainedModel
        Changed in place.
    times : float
        Numbers of the table over those that are stored, all counted: codes, decoder and bias.
    fit : {"direction", "svd", "frequency"}
        See `softlms.methods.embeddings.fit`.
    counts : Tensor, optional
        How often each word occurs, shape (V,); needed by "frequency".
    epochs, seed
        Passes over the table, and the order of its rows, for "direction".
    note : callable
        Called with a line of progress.

    Returns
    -------
    PreTrainedModel
        `model` itself.

    Raises
    ------
    ValueError
        An unknown fit; too few numbers for a code, or too many; or a table that is compressed already, has a class of
        its own, is not finite, or is shared by more than the head, which would come untied. In that case nothing is
        changed.
    """
    table = check_table(model, times, fit)
    words, size = table.shape
    if fit == "frequency" and (counts is None or counts.shape != (words,) or not counts.sum() > 0):
        raise ValueError(f"fit 'frequency' needs counts, how often each of the {words} words occurs in a text.")
    known = torch.zeros(words) if counts is None else counts
    k = latent_size(words, size, times)
    codes = FITS[fit](table.float(), k, known.to(table.device), epochs, seed, note)
    return put_codes(model, codes)


def check_table(model: PreTrainedModel, times: float, fit: str) -> Tensor:
    """The table, shape (V, d), if it can be compressed; else a ValueError, see `compress_embeddings`."""
    if fit not in FITS:
        raise ValueError(f"fit must be one of {', '.join(map(repr, FITS))}, got {fit!r}.")
    table: Any = model.get_input_embeddings()
    if isinstance(table, Table):
        raise ValueError("The embeddings are compressed already: compress the dense model instead.")
    if type(table) is not nn.Embedding or table.max_norm is not None or table.scale_grad_by_freq or table.sparse:
        raise ValueError(
            f"The embeddings are a {type(table).__name__}: codes have none of the options and classes of others. Leave "
            "them out."
        )
    weight = table.weight.detach()
    if weight.is_meta or weight.dtype not in FLOATS or not weight.isfinite().all():
        raise ValueError("The embeddings are offloaded, quantized, NaN or infinite: load the model whole, unquantized.")
    head = model.get_output_embeddings()
    places = [name for name, module in model.named_modules(remove_duplicate=False) if module is table]
    if len(places) > 1:
        raise ValueError(f"The embeddings are in {' and '.join(places)}, and would come untied: leave them out.")
    for name, module in model.named_modules(remove_duplicate=False):
        held = any(values is table.weight for values in module.parameters(recurse=False))
        if held and module not in (table, head):
            raise ValueError(f"{name} shares the table of embeddings, and would come untied: leave them out.")
        if held and module is head and type(head) is not nn.Linear:
            raise ValueError(f"{name}, a {type(head).__name__}, is tied to the embeddings, and would come untied.")
    words, size = weight.shape
    k = latent_size(words, size, times)
    if not (times > 1 and k >= 1):
        most = words * size / (words + 2 * size)
        raise ValueError(f"times must be above 1 and at most {most:.0f} for {words} words of {size}, got {times}.")
    return weight


@torch.no_grad()
def put_codes(model: M, found: Codes) -> M:
    """Put codes in place of the table; see `compress_embeddings`."""
    table: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    tied = head is not None and head.weight is table.weight
    remember(model)
    found = Codes(*(part.to(table.weight.dtype).contiguous() for part in (found.codes, found.decoder, found.bias)))
    words, k = found.codes.shape
    codes = nn.Embedding(words, k, table.padding_idx, _weight=found.codes)
    decoder = Decoder(found.decoder, found.bias)
    put(model, names[id(table)], CompressedEmbedding(codes, decoder).requires_grad_(table.weight.requires_grad))
    if tied:
        put(model, names[id(head)], CompressedHead(codes, decoder, head.bias))
        retie(model, tied_names(model))
    return model
