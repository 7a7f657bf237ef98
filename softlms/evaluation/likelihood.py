"""Perplexity of language models, by a protocol that goes with the number; and of a 3-gram model for comparison."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from softlms.data.inputs import in_eval_mode
from softlms.utils.ranges import check_at_least_one

__all__ = ["Perplexity", "Protocol", "Trigram", "measure_perplexity", "perplexity"]

LARGEST = math.log(sys.float_info.max)


@torch.inference_mode()
def perplexity(
    model: PreTrainedModel, tokens: Sequence[int], *, window: int = 128, stride: int = 64, batch_tokens: int = 4096
) -> float:
    """exp of the mean negative log-likelihood of a text's tokens, in overlapping windows.

    The first window scores all its tokens but the first. Each later window starts `stride` tokens further and scores
    only its last `stride` tokens, so that each has at least ``window - stride`` tokens of context. A smaller stride
    lowers the perplexity and takes longer: compare only numbers with the same window and stride.

    With ``stride=window``, as in most papers, windows do not overlap: the first token of each has no context and is not
    scored. The last window is extended backwards to full length.

    Parameters
    ----------
    model : PreTrainedModel
        A causal language model in any form; evaluated without dropout, in its own dtype.
    tokens : sequence of int
        The text, tokenized as one piece.
    window : int
        Number of tokens that the model sees at once, 2 or more.
    stride : int
        From 1 to `window`.
    batch_tokens : int
        Approximate tokens per forward pass, at least one window; memory is three times that of their logits.

    Returns
    -------
    float
        Infinity if the model's outputs are not finite, or the result exceeds the range of a float.

    Raises
    ------
    ValueError
        Fewer than two tokens, a window of one, or a stride that skips tokens.
    """
    if window < 2:
        raise ValueError(f"window must be 2 or more, got {window}: a token needs one before it.")
    if not 1 <= stride <= window:
        raise ValueError(f"stride must be 1 to window ({window}), got {stride}: a longer one skips tokens.")
    if len(tokens) < 2:
        raise ValueError(f"Perplexity needs two tokens or more, got {len(tokens)}.")
    text = torch.as_tensor(tokens).long()
    # (start, first scored, end): each token with a predecessor in its window is scored once
    spans = [(0, 1, min(window, len(text)))]
    while spans[-1][2] < len(text):
        end = min(spans[-1][2] + stride, len(text))
        spans.append((end - window, max(spans[-1][2], end - window + 1), end))
    total, windows = 0.0, max(1, batch_tokens // window)
    with in_eval_mode(model):
        for i in range(0, len(spans), windows):
            batch = spans[i : i + windows]
            ids = torch.stack([text[start:end] for start, _, end in batch]).to(model.device)
            logits = model(ids, use_cache=False).logits[:, :-1].float()
            losses = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").cpu().double()
            total += sum(losses[row, first - start - 1 :].sum().item() for row, (start, first, _) in enumerate(batch))
    return _exp(total / sum(end - first for _, first, end in spans))


@dataclass(frozen=True)
class Protocol:
    """How perplexity is measured in papers: in windows without overlap. Only numbers of one protocol compare.

    The text, tokenized as one piece, is cut from its start into windows of `window` tokens, and each is read on its
    own. The rest at the end is a shorter window; it is left out only if nothing in it can be predicted.

    Attributes
    ----------
    window : int
        Tokens of text in a window, 2 or more. The model never reads more: the last is only predicted.
    bos : bool
        Put the tokenizer's beginning-of-sequence token before each window, and predict all tokens of the text. Without
        it the first token of a window has no context, and is not predicted.
    tokens : int, optional
        Only the first tokens of the text; by default all.
    bf16 : bool
        Under bfloat16 autocast; else in the model's own precision. The losses are float32 either way.

    Raises
    ------
    ValueError
        A window below 2, or longer than `tokens`.
    """

    window: int = 1024
    bos: bool = False
    tokens: int | None = None
    bf16: bool = False

    def __post_init__(self) -> None:
        check_at_least_one(window=self.window, tokens=1 if self.tokens is None else self.tokens)
        if self.window < 2:
            raise ValueError(f"window must be 2 or more, got {self.window}: a token needs one before it.")
        if self.tokens is not None and self.window > self.tokens:
            raise ValueError(f"A window of {self.window} tokens is longer than the text's first {self.tokens}.")

    def __str__(self) -> str:
        first = "each after BOS, every token predicted" if self.bos else "no BOS, first token of each not predicted"
        text = "whole text" if self.tokens is None else f"first {self.tokens:,} tokens of the text"
        return f"windows of {self.window} tokens without overlap, {first}, {text}" + ", bfloat16 autocast" * self.bf16

    def check(self, tokens: int, longest: int | None = None, bos: int | None = None) -> None:
        """Check that a text can be measured, before any work.

        Parameters
        ----------
        tokens : int
            Tokens in the text.
        longest : int, optional
            Tokens that the model reads at most; None if it has no limit.
        bos : int, optional
            Id of the tokenizer's BOS token; None if it has none.

        Raises
        ------
        ValueError
            The text is empty, shorter than a window or than the tokens asked for; the window is too long for the model;
            or there is no BOS token to put before it.
        """
        if not tokens:
            raise ValueError("The text has no tokens: there is nothing to predict.")
        if self.tokens is not None and self.tokens > tokens:
            raise ValueError(f"The text has {tokens} tokens, not {self.tokens}: ask for fewer, or for all (None).")
        if self.window > tokens:
            raise ValueError(f"A window of {self.window} tokens is longer than the text, which has {tokens}.")
        if longest is not None and self.window > longest:
            raise ValueError(f"A window of {self.window} tokens is longer than the {longest} that the model reads.")
        if self.bos and bos is None:
            raise ValueError("The tokenizer has no BOS token: set bos=False, or give the model's own tokenizer.")


@dataclass(frozen=True)
class Perplexity:
    """A perplexity with the protocol that it was measured by.

    Attributes
    ----------
    value : float
        exp of the mean negative log-likelihood of the predicted tokens; infinity as from `perplexity`.
    protocol : Protocol
    tokens, predicted : int
        Tokens of the text that was cut into windows, and how many of them were predicted.
    """

    value: float
    protocol: Protocol
    tokens: int
    predicted: int

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.protocol}: {self.predicted:,} of {self.tokens:,} predicted)"


@torch.inference_mode()
def measure_perplexity(
    model: PreTrainedModel,
    tokens: Sequence[int] | np.ndarray,
    protocol: Protocol,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    batch_tokens: int = 4096,
) -> Perplexity:
    """Perplexity of a text by a protocol.

    Parameters
    ----------
    model : PreTrainedModel
        A causal language model in any form; evaluated without dropout.
    tokens : sequence of int
        The text, tokenized as one piece without special tokens.
    protocol : Protocol
    tokenizer : PreTrainedTokenizerBase, optional
        The model's own; it gives BOS, and is needed only for that.
    batch_tokens : int
        As for `perplexity`.

    Raises
    ------
    ValueError
        As from `Protocol.check`.
    """
    bos = getattr(tokenizer, "bos_token_id", None)
    protocol.check(len(tokens), getattr(model.config, "max_position_embeddings", None), bos)
    text, window = torch.as_tensor(tokens[: protocol.tokens]).long(), protocol.window
    whole = len(text) // window * window
    pieces = [*text[:whole].view(-1, window).split(max(1, batch_tokens // window)), text[None, whole:]]
    total, predicted = 0.0, 0
    with in_eval_mode(model), torch.autocast(model.device.type, torch.bfloat16, enabled=protocol.bf16):
        for piece in pieces:
            ids = (F.pad(piece, (1, 0), value=bos) if protocol.bos and piece.numel() else piece).to(model.device)
            if ids.shape[1] < 2:  # the rest: nothing, or one token without context
                continue
            logits = model(ids[:, :-1], use_cache=False).logits.float()
            losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
            total += losses.double().sum().item()
            predicted += losses.numel()
    return Perplexity(_exp(total / predicted), protocol, len(text), predicted)


def _exp(mean: float) -> float:
    return math.exp(mean) if mean < LARGEST else math.inf  # NaN compares false


class Trigram:
    """Interpolated Kneser-Ney 3-gram model on token ids, with one discount for all orders.

    Parameters
    ----------
    tokens : sequence of int
        Training text.
    vocabulary : int
        Number of token ids.
    discount : float
        Between 0 and 1.

    Notes
    -----
    Kneser and Ney (1995) as interpolated by Chen and Goodman (1999), section 2.7.
    """

    def __init__(self, tokens: Sequence[int] | np.ndarray, vocabulary: int, discount: float = 0.75) -> None:
        text = np.asarray(tokens, dtype=np.int64)
        self.vocabulary, self.discount = vocabulary, discount
        trigrams = _Counts((text[:-2] * vocabulary + text[1:-1]) * vocabulary + text[2:])
        # lower orders count the different contexts of a word, not its occurrences
        # the start of the text has no context, and counts once
        opening = text[:1] * vocabulary + text[1:2]
        bigrams = _Counts(np.concatenate([opening, trigrams.keys % vocabulary**2]))
        unigrams = _Counts(np.concatenate([np.arange(vocabulary), bigrams.keys % vocabulary]), minus=1)
        self.orders = (trigrams, bigrams)
        self.contexts = tuple(_Counts(counts.keys // vocabulary, weights=counts.values) for counts in self.orders)
        self.followers = tuple(_Counts(counts.keys // vocabulary) for counts in self.orders)
        types = unigrams.values.sum()
        seen = (unigrams.values > 0).sum()
        self.unigram = (np.maximum(unigrams.values - discount, 0) + discount * seen / vocabulary) / types

    def perplexity(self, tokens: Sequence[int] | np.ndarray) -> float:
        """exp of the mean negative log-likelihood of all tokens but the first two."""
        text, V = np.asarray(tokens, dtype=np.int64), self.vocabulary
        probability = self.unigram[text[2:]]
        histories = (text[1:-1], text[:-2] * V + text[1:-1])
        for order, history in zip((1, 0), histories, strict=True):
            total = self.contexts[order].of(history)
            found = np.maximum(self.orders[order].of(history * V + text[2:]) - self.discount, 0)
            kept = self.discount * self.followers[order].of(history) * probability
            probability = np.where(total > 0, (found + kept) / np.maximum(total, 1), probability)
        return float(np.exp(-np.log(probability).mean()))


class _Counts:
    """Counts of keys, looked up in bulk; 0 for a key that never occurs."""

    def __init__(self, keys: np.ndarray, *, weights: np.ndarray | None = None, minus: int = 0) -> None:
        self.keys, place = np.unique(keys, return_inverse=True)
        self.values = np.bincount(place, weights).astype(np.int64) - minus

    def of(self, keys: np.ndarray) -> np.ndarray:
        place = np.searchsorted(self.keys, keys).clip(max=len(self.keys) - 1)
        return np.where(self.keys[place] == keys, self.values[place], 0)
