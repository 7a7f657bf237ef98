"""Small GPT-2, Llama and Mamba of the real transformers classes, trained from scratch on real text, and their runs."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, default_data_collator

from softlms.architectures import find_targets
from softlms.experiments import Bench, Recipe, Run
from softlms.perplexity import perplexity
from softlms.provenance import code_hash
from softlms.tasks import Task, TaskData
from softlms.text import TokenizedText, blocks
from softlms.zoo import Encoder, attention

__all__ = ["FAMILIES", "LanguageBench", "Size", "small_config"]


@dataclass(frozen=True)
class Size:
    """Of a model that is trained from scratch.

    Attributes
    ----------
    hidden, layers : int
    vocabulary : int
        Token ids; the embeddings are tied to the head.
    window : int
        Tokens a row.
    """

    hidden: int = 256
    layers: int = 6
    vocabulary: int = 4096
    window: int = 128


def small_config(family: str, size: Size) -> PretrainedConfig:
    """Configuration of a small model, its proportions those of the large one.

    Raises
    ------
    ValueError
        Unknown family.
    """
    if family not in FAMILIES:
        raise ValueError(f"Unknown family {family!r}; known: {', '.join(FAMILIES)}.")
    common = {"vocab_size": size.vocabulary, "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 0}
    return FAMILIES[family](size, common | {"pad_token_id": 0})


# heads of 64; gpt2's feed-forward is 4 x hidden, TinyLlama's 2.75 x with an eighth of the key-value heads
FAMILIES = {
    "gpt2": lambda size, common: transformers.GPT2Config(
        n_embd=size.hidden, n_layer=size.layers, n_head=size.hidden // 64 or 1, n_positions=2 * size.window, **common
    ),
    "llama": lambda size, common: transformers.LlamaConfig(
        hidden_size=size.hidden, num_hidden_layers=size.layers, num_attention_heads=size.hidden // 64 or 1,
        num_key_value_heads=size.hidden // 128 or 1, intermediate_size=size.hidden * 11 // 4,
        max_position_embeddings=2 * size.window, **common,
    ),
    "mamba": lambda size, common: transformers.MambaConfig(
        hidden_size=size.hidden, num_hidden_layers=size.layers, **common
    ),
}  # fmt: skip


LANGUAGE_MODELLING = Task("text", ("text",), (), ("perplexity",))


class LanguageBench(Bench):
    """A small language model and a text: as `Bench`, with perplexity in place of a task's metrics.

    The dense model is trained from scratch once, for all seeds: a seed decides the order of the rows and the choice of
    calibration rows in what comes after, as if it were a checkpoint that somebody published.

    Parameters
    ----------
    family : {"gpt2", "llama", "mamba"}
    size : Size
    text : TokenizedText
    folder : Path
        Holds a subfolder for each run.
    train_tokens, test_tokens : int, optional
        Use only the first tokens of the training split, and of the other two.
    note : callable
        Takes a line of progress.
    """

    def __init__(
        self,
        family: str,
        size: Size,
        text: TokenizedText,
        folder: Path,
        *,
        train_tokens: int | None = None,
        test_tokens: int | None = None,
        note: Callable[[str], None] = print,
    ) -> None:
        small_config(family, size)  # refuses what is unknown
        self.family, self.size, self.text = family, size, text
        self.train_tokens, self.test_tokens = train_tokens, test_tokens
        source = f"{family}, hidden {size.hidden}, {size.layers} layers, trained here"
        data = TaskData(dataclasses.replace(LANGUAGE_MODELLING, name=family), {}, text.source)
        super().__init__(Encoder(family, source), data, folder, max_length=size.window, note=note)

    @cached_property
    def splits(self) -> dict[str, Any]:
        """Rows of the training split; "dev" and "test" are arrays of ids."""
        ids = self.text.splits
        return {
            "train": blocks(ids["train"][: self.train_tokens], self.size.window),
            "dev": ids["validation"][: self.test_tokens],
            "test": ids["test"][: self.test_tokens],
        }

    @property
    def collator(self) -> Any:
        return default_data_collator

    def new_model(self) -> PreTrainedModel:
        return AutoModelForCausalLM.from_config(small_config(self.family, self.size), attn_implementation=attention())

    def load_model(self, folder: Path) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention())

    def targets(self) -> dict[str, tuple[int, int]]:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(small_config(self.family, self.size))
        return {target.name: target.shape for target in find_targets(model)}

    def scores(self, model: PreTrainedModel, splits: tuple[str, ...] = ("dev", "test")) -> dict[str, dict[str, float]]:
        """Perplexity with a window and half of it as stride."""
        window = self.size.window
        return {
            split: {"perplexity": perplexity(model, self.splits[split], window=window, stride=window // 2)}
            for split in splits
        }

    def run(self, method: str, recipe: Recipe, seed: int) -> Run:
        return super().run(method, recipe, 0 if method == "dense" else seed)

    def _place(self, method: str, recipe: Recipe, seed: int) -> tuple[str, Path]:
        return super()._place(method, recipe, 0 if method == "dense" else seed)

    def _inputs(self) -> dict[str, Any]:
        ids = hashlib.sha256(b"".join(self.text.splits[split].tobytes() for split in sorted(self.text.splits)))
        return {
            "config": small_config(self.family, self.size).to_dict(),
            "ids": ids.hexdigest(),
            "window": self.size.window,
            "train_tokens": self.train_tokens,
            "test_tokens": self.test_tokens,
            "language code": code_hash(("language_models", "perplexity", "text", "scan", "fused")),
        }
