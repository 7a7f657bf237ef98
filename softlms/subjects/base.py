"""What is compressed, and on what: all in which a classifier and a language model differ."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
from transformers import DataCollator, PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from softlms.data.encoders import Encoder
from softlms.methods.base import training_arguments
from softlms.subjects.settings import Compression

__all__ = ["Subject", "check_tokens"]


class Subject(ABC):
    """A model and its data. Making one reads and tokenizes the data, and loads no weights.

    Attributes
    ----------
    settings : Compression
    origin : Encoder
        Where the dense model is.
    tokenizer : PreTrainedTokenizerBase
    train : Dataset
        Rows to learn from.
    longest : int
        Tokens in the longest of them.
    collator : callable
    content : dict
        Hash of the data, by the name that an error gives it.
    data : dict
        Where the data is from, for the notes of the compressed model.
    scored : str
        Name of the split that is scored.
    metrics : tuple of str
    protocol : str
        How scores are measured, if there is more than one way.
    options : dict
        Of all training: rows in a pass, and when checkpoints are saved; see `softlms.methods.base.training_arguments`.
    """

    settings: Compression
    origin: Encoder
    tokenizer: PreTrainedTokenizerBase
    train: datasets.Dataset
    longest: int
    collator: DataCollator
    content: dict[str, str]
    data: dict[str, str]
    scored: str
    metrics: tuple[str, ...]
    protocol: str = ""
    options: dict[str, Any]

    @staticmethod
    @abstractmethod
    def load(folder: Path) -> PreTrainedModel:
        """A model that was saved."""

    @abstractmethod
    def dense(self) -> PreTrainedModel:
        """The model to start from, in float32, where training will put it: all other work is as fast there.

        Raises
        ------
        ValueError
            It cannot be used with these rows.
        """

    @abstractmethod
    def scores(self, model: PreTrainedModel) -> dict[str, float]:
        """Value of each metric on the split that is scored."""

    @abstractmethod
    def shown(self, score: float) -> str:
        """A score for the table."""

    @abstractmethod
    def teaching(self, dense: PreTrainedModel) -> dict[str, Any]:
        """What `softlms.methods.base.Work` says of rows and teacher: if distilled, logits of the dense model."""

    @abstractmethod
    def fitted(self, model: PreTrainedModel, work: Path, note: Callable[[str], None]) -> PreTrainedModel:
        """The model after the training that it needs before it can be compressed, if any."""

    def arguments(self, folder: Path, learning_rate: float, epochs: float) -> TrainingArguments:
        """Arguments of all training; see `softlms.methods.base.Work`."""
        return training_arguments(
            folder,
            learning_rate,
            epochs,
            seed=self.settings.seed,
            bf16=self.settings.bf16,
            save_total_limit=1,
            logging_steps=50,
            **self.options,
        )


def check_tokens(model: PreTrainedModel, longest: int, largest: int) -> None:
    """Rows longer than the model reads, or unknown tokens, would stop training in the middle.

    Parameters
    ----------
    model : PreTrainedModel
    longest : int
        Tokens in the longest row.
    largest : int
        The largest token id.

    Raises
    ------
    ValueError
    """
    positions = getattr(model.config, "max_position_embeddings", longest)  # a state space model has no limit
    if longest > positions:
        raise ValueError(f"Rows are up to {longest} tokens long, and the model reads {positions}: lower max_length.")
    known = model.get_input_embeddings().num_embeddings
    if largest >= known:
        raise ValueError(f"The tokenizer returns token {largest}, the model has {known}: use the model's tokenizer.")
