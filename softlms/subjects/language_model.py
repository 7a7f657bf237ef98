"""A causal language model and a text."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, default_data_collator

from softlms.data.encoders import find_encoder, load_language_model
from softlms.data.text import blocks, find_splits, load_text, source_of
from softlms.evaluation.likelihood import Protocol, measure_perplexity
from softlms.subjects.base import Subject, check_tokens
from softlms.subjects.settings import Compression
from softlms.utils.machine import device

__all__ = ["LanguageModel"]

PASS = 512  # tokens in a forward pass of training, unless a row is longer: logits of 49152 words take 100 MB


class LanguageModel(Subject):
    """The dense model's logits are too large to store: a copy of it stays in memory as the teacher.

    Parameters
    ----------
    settings : Compression
        With a text.

    Raises
    ------
    ValueError, OSError
        There is no such text, model or tokenizer, or a text is shorter than one row.
    """

    metrics = ("perplexity",)

    def __init__(self, settings: Compression) -> None:
        source, length = str(settings.text), settings.max_length
        if length < 2:
            raise ValueError(f"max_length must be at least 2, got {length}: a token needs one before it.")
        # some copies of WikiText come without their training text
        learned, self.scored = ("train", "validation")
        if find_splits(source) == ("validation", "test"):
            learned, self.scored = ("validation", "test")
        texts = load_text(source, (learned, self.scored))
        self.settings, self.learned = settings, learned
        self.data = {"text": source_of(source, texts), "learned_from": learned}
        self.content = {"words": hashlib.sha256(json.dumps(texts).encode()).hexdigest()}
        self.origin = find_encoder(settings.model)
        self.tokenizer = self.origin.tokenizer()
        ids = self._ids(texts[learned])[: settings.train_tokens]
        self.ids: Any = self._ids(texts[self.scored])[: settings.test_tokens]
        for split, found in ((learned, ids), (self.scored, self.ids)):
            if len(found) < length:
                raise ValueError(
                    f"The {split} text has {len(found)} tokens, fewer than a row of {length}: lower max_length."
                )
        # checkpoints after each tenth of the steps: a single epoch may take hours
        self.options = _passes(settings.batch_size, length) | {"save_strategy": "steps", "save_steps": 0.1}
        self.largest = int(max(ids.max(), self.ids.max()))
        self.train, self.longest, self.collator = blocks(ids, length), length, default_data_collator
        self.measured = Protocol(window=length, tokens=settings.test_tokens)
        self.protocol = f"{self.scored} perplexity: {self.measured}"

    def _ids(self, text: str) -> np.ndarray:
        return np.asarray(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int64)

    @staticmethod
    def load(folder: Path) -> PreTrainedModel:
        return load_language_model(folder)

    def dense(self) -> PreTrainedModel:
        model = self.origin.language_model()
        check_tokens(model, self.longest, self.largest)
        if model.config.model_type == "mamba" and device().type == "cpu" and not importlib.util.find_spec("numba"):
            raise ValueError("Mamba trains on a CPU with the package numba: pip install 'softlms[mamba]'.")
        return model.to(device())

    def fitted(self, model: PreTrainedModel, work: Path, note: Callable[[str], None]) -> PreTrainedModel:
        note(f"learning from the {self.learned} text of {self.data['text']}: {len(self.train):,} rows")
        return model

    def scores(self, model: PreTrainedModel) -> dict[str, float]:
        return {"perplexity": measure_perplexity(model, self.ids, self.measured, batch_tokens=PASS).value}

    def shown(self, score: float) -> str:
        return f"{score:.2f}"

    def teaching(self, dense: PreTrainedModel) -> dict[str, Any]:
        given = {"rows": self.train, "batch_size": self.options["batch_size"]}
        if not self.settings.distillation:
            return given
        teacher = copy.deepcopy(dense).requires_grad_(False)
        teacher.config.use_cache = False  # for generation only
        return given | {"teacher": teacher}


def _passes(batch_size: int, length: int) -> dict[str, int]:
    """Rows of a step are accumulated: a forward pass takes as many as divide them within `PASS` tokens."""
    most = max(1, PASS // length)
    rows = max(number for number in range(1, min(batch_size, most) + 1) if batch_size % number == 0)
    return {"batch_size": rows, "gradient_accumulation_steps": batch_size // rows}
