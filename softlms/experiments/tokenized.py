"""Text as token ids: a tokenizer trained on the training split, and each split as one long row of ids."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from softlms.data import corpus
from softlms.data.encoders import load_tokenizer
from softlms.data.hub import weights_hash
from softlms.data.text import SPLITS, load_text, source_of
from softlms.experiments.closure import code_of
from softlms.utils.files import process_mark

__all__ = ["TokenizedText", "tokenize_text", "train_tokenizer"]

END = "<|end|>"


@dataclass(frozen=True)
class TokenizedText:
    """A text's splits as token ids.

    Attributes
    ----------
    splits : mapping
        "train", "validation" and "test": arrays of ids.
    tokenizer : Path
        Folder of the tokenizer, for ``AutoTokenizer.from_pretrained``.
    source : str
        Where the text came from; see `softlms.data.text.source_of`.
    """

    splits: Mapping[str, np.ndarray]
    tokenizer: Path
    source: str


def tokenize_text(
    data: str | Path, tokenizer: int | str, folder: Path, *, libraries: tuple[str, ...] = corpus.LIBRARIES
) -> TokenizedText:
    """Load a text, train a tokenizer on its training split, and store both, so that this is done once.

    Parameters
    ----------
    data : str or path
        As for `softlms.data.text.load_text`.
    tokenizer : int or str
        Vocabulary size of a byte-level BPE to train, at least 257 (all bytes and an end mark); or the folder or hub
        name of a tokenizer to use.
    folder : Path
        Holds a subfolder for each text and tokenizer.
    libraries : tuple of str
        Of the embedded corpus.

    Raises
    ------
    ValueError, FileNotFoundError
        As from `load_text`; the vocabulary is too small; or the folder has no tokenizer. Nothing is stored then.
    """
    if isinstance(tokenizer, int) and tokenizer < 257:
        raise ValueError(f"A byte-level vocabulary has 256 bytes and an end mark at least; got {tokenizer}.")
    embedded = data == "embedded"
    # parsing every library takes a minute; their versions identify the text, so it is read only if needed
    texts = {} if embedded else load_text(data)
    content = [f"{name} {version(name)}" for name in libraries] if embedded else [texts[s] for s in SPLITS]
    known = tokenizer if isinstance(tokenizer, int) else weights_hash(tokenizer)
    code = code_of("softlms.data.text:load_text", "softlms.experiments.tokenized:train_tokenizer")
    depends = json.dumps([known, code, version("tokenizers"), *content])
    place = folder / f"text-{hashlib.sha256(depends.encode()).hexdigest()[:12]}"
    if not place.is_dir():
        given = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else None
        texts = texts or load_text(data, libraries=libraries)
        partial = place.with_name(f"{place.name}.partial-{process_mark()}")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        made = given or train_tokenizer(texts["train"], int(tokenizer))
        made.save_pretrained(partial)
        for split in SPLITS:
            ids = made(texts[split], add_special_tokens=False, verbose=False)["input_ids"]
            np.save(partial / f"{split}.npy", np.asarray(ids, dtype=np.int32))
        try:
            partial.rename(place)
        except OSError:
            if not place.is_dir():  # else another process was faster
                raise
            shutil.rmtree(partial)
    return TokenizedText({split: np.load(place / f"{split}.npy") for split in SPLITS}, place, source_of(data, texts))


def train_tokenizer(text: str, vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: every text can be encoded and is decoded unchanged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)
