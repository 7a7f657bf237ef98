"""Causal language models and their runs: small ones trained here from scratch, or a checkpoint."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    default_data_collator,
)

from softlms.data.encoders import Encoder, attention, load_tokenizer
from softlms.data.hub import pretrained, weights_hash
from softlms.data.inputs import in_eval_mode
from softlms.data.tasks import Task, TaskData
from softlms.data.text import blocks
from softlms.evaluation.likelihood import Protocol, Trigram, measure_perplexity, perplexity
from softlms.evaluation.zero_shot import check_questions, zero_shot
from softlms.experiments.bench import Bench
from softlms.experiments.closure import not_in_keys
from softlms.experiments.recipe import Recipe
from softlms.experiments.store import Run
from softlms.experiments.tokenized import TokenizedText
from softlms.fused import split_fused

__all__ = ["FAMILIES", "LanguageBench", "SmallModel"]

LANGUAGE_MODELLING = Task("text", ("text",), (), ("perplexity",))
PROMPT, SAMPLE = 24, 32  # tokens
QUESTIONS = 400  # rows of a zero-shot task


@dataclass(frozen=True)
class SmallModel:
    """A model of the real transformers class, trained from scratch.

    Parameters
    ----------
    family : {"gpt2", "llama", "mamba"}
    hidden, layers : int
    vocabulary : int
        Token ids; the embeddings are tied to the head.

    Raises
    ------
    ValueError
        Unknown family.
    """

    family: str
    hidden: int = 256
    layers: int = 6
    vocabulary: int = 4096

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"Unknown family {self.family!r}; known: {', '.join(FAMILIES)}.")

    @property
    def source(self) -> str:
        return f"{self.family}, hidden {self.hidden}, {self.layers} layers, trained here"

    @property
    def config(self) -> PretrainedConfig:
        """The family's configuration, with the proportions of the large model."""
        ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
        return FAMILIES[self.family](self, {"vocab_size": self.vocabulary, "tie_word_embeddings": True} | ends)


# heads of 64; gpt2's feed-forward is 4 x hidden, TinyLlama's 2.75 x and fewer heads for keys and values
FAMILIES: dict[str, Callable[[SmallModel, dict[str, Any]], PretrainedConfig]] = {
    "gpt2": lambda model, common: transformers.GPT2Config(
        n_embd=model.hidden, n_layer=model.layers, n_head=model.hidden // 64 or 1, n_positions=512, **common
    ),
    "llama": lambda model, common: transformers.LlamaConfig(
        hidden_size=model.hidden, num_hidden_layers=model.layers, num_attention_heads=model.hidden // 64 or 1,
        num_key_value_heads=model.hidden // 128 or 1, intermediate_size=model.hidden * 11 // 4,
        max_position_embeddings=512, **common,
    ),
    "mamba": lambda model, common: transformers.MambaConfig(
        hidden_size=model.hidden, num_hidden_layers=model.layers, **common
    ),
}  # fmt: skip


class LanguageBench(Bench):
    """A causal language model and a text: like `Bench`, with perplexity instead of a task's metrics.

    The dense model is trained once for all seeds, or taken from a checkpoint. A seed decides the order of the rows and
    the choice of calibration rows in the later steps.

    Parameters
    ----------
    model : SmallModel or Encoder
        Trained from scratch, or a checkpoint (see `softlms.data.encoders.find_encoder`).
    name : str
        The model's name in tables.
    text : TokenizedText
        Made with the model's tokenizer.
    folder : Path
        Holds a subfolder for each run.
    window : int
        Tokens per row. Without a protocol perplexity is measured in windows of as many, which overlap by half.
    train_tokens, test_tokens : int, optional
        Use only the first tokens of the training split, or of the other two.
    protocol : Protocol, optional
        How perplexity is measured. The data's source in tables then names it, so that it goes with every number.
    beyond : mapping
        What else models are scored on, by the name in tables: texts of other domains (their test split, by the
        protocol), and tasks asked zero-shot (the first `QUESTIONS` rows of dev).
    split : bool
        Split GPT-2's fused projections before they are factored (`softlms.split_fused`).
    threads : int
        See `Bench`.
    note : callable
        Called with a line of progress.

    Raises
    ------
    ValueError
        A window that is too long for the model or longer than a split; a protocol that does not fit the model and
        a text, or comes with `test_tokens`; something beyond without a protocol; or a task without a prompt.
    """

    def __init__(
        self,
        model: SmallModel | Encoder,
        name: str,
        text: TokenizedText,
        folder: Path,
        *,
        window: int = 128,
        train_tokens: int | None = None,
        test_tokens: int | None = None,
        protocol: Protocol | None = None,
        beyond: Mapping[str, TokenizedText | TaskData] | None = None,
        split: bool = False,
        threads: int = 1,
        note: Callable[[str], None] = print,
    ) -> None:
        self.model, self.text, self.window, self.split = model, text, window, split
        self.train_tokens, self.test_tokens, self.protocol = train_tokens, test_tokens, protocol
        self.beyond = dict(beyond or {})
        encoder = model if isinstance(model, Encoder) else Encoder(str(text.tokenizer), model.source)
        source = text.source if protocol is None else f"{text.source}; {protocol}"
        data = TaskData(dataclasses.replace(LANGUAGE_MODELLING, name=name), {}, source)
        super().__init__(encoder, data, folder, max_length=window, threads=threads, note=note)
        read = getattr(self.config, "max_position_embeddings", None)  # a state space has no limit
        longest = read or window
        shortest = min(map(len, (text.splits["train"][:train_tokens], *self._held_out.values())))
        if not 2 <= window <= min(longest, shortest):
            raise ValueError(
                f"window must be 2 to {min(longest, shortest)} tokens (the model reads {longest}, the shortest split "
                f"has {shortest}), got {window}."
            )
        if protocol is not None:
            if test_tokens is not None:
                raise ValueError(f"test_tokens ({test_tokens}) and protocol both say what is scored: give one.")
            other_texts = [other.splits["test"] for other in self.beyond.values() if isinstance(other, TokenizedText)]
            for ids in (*self._held_out.values(), *other_texts):
                protocol.check(len(ids), read, self._tokenizer.bos_token_id)
        elif self.beyond:
            raise ValueError(f"{', '.join(self.beyond)} are scored by a protocol: give one.")
        for other in self.beyond.values():
            if isinstance(other, TaskData):
                check_questions(other, "dev", QUESTIONS)

    @cached_property
    def config(self) -> PretrainedConfig:
        if isinstance(self.model, SmallModel):
            return self.model.config
        return pretrained(AutoConfig, self.model.location, dtype=torch.float32)

    @property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.text.tokenizer)

    @property
    def _held_out(self) -> dict[str, Any]:
        ids = self.text.splits
        return {"dev": ids["validation"][: self.test_tokens], "test": ids["test"][: self.test_tokens]}

    @cached_property
    def splits(self) -> dict[str, Any]:
        """Rows of the training split; "dev" and "test" are arrays of ids."""
        return {"train": blocks(self.text.splits["train"][: self.train_tokens], self.window)} | self._held_out

    @property
    def collator(self) -> Any:
        return default_data_collator

    def new_model(self) -> PreTrainedModel:
        if isinstance(self.model, Encoder):
            return self.load_model(self.model.location)
        return AutoModelForCausalLM.from_config(self.config, attn_implementation=attention())

    def load_model(self, folder: str | Path) -> PreTrainedModel:
        return pretrained(AutoModelForCausalLM, folder, attn_implementation=attention(), dtype=torch.float32)

    def untrained_model(self) -> PreTrainedModel:
        # torch counts no FLOPs for its fused attention on a CPU
        return AutoModelForCausalLM.from_config(self.config, attn_implementation="eager")

    def prepare(self, model: PreTrainedModel) -> PreTrainedModel:
        return split_fused(model) if self.split else model

    def scores(self, model: PreTrainedModel, splits: tuple[str, ...] | None = None) -> dict[str, dict[str, float]]:
        """Perplexity on splits; if they are not given on dev and test, and all that is beyond."""
        scores = {split: self._perplexity(model, self.splits[split]) for split in splits or ("dev", "test")}
        for name, other in {} if splits else self.beyond.items():
            if isinstance(other, TokenizedText):
                scores[name] = self._perplexity(model, other.splits["test"])
            else:
                bf16 = self.protocol is not None and self.protocol.bf16
                asked = zero_shot(model, self._tokenizer, other, rows=QUESTIONS, bf16=bf16)
                scores[name] = {"accuracy": asked.accuracy}
        return scores

    def _perplexity(self, model: PreTrainedModel, ids: Any) -> dict[str, float]:
        """By the protocol, or in windows that overlap by half."""
        if self.protocol is not None:
            return {"perplexity": measure_perplexity(model, ids, self.protocol, self._tokenizer).value}
        return {"perplexity": perplexity(model, ids, window=self.window, stride=self.window // 2)}

    def trigram(self) -> dict[str, dict[str, float]]:
        """Scores of a 3-gram model of the same tokens, trained on the same text."""
        text = self.text.splits["train"][: self.train_tokens]
        trigram = Trigram(text, self.config.vocab_size)
        return {split: {"perplexity": trigram.perplexity(ids)} for split, ids in self._held_out.items()}

    def extras(self, model: PreTrainedModel) -> dict[str, Any]:
        """ "sample": the model's greedy continuation of the first tokens of the test split."""
        tokenizer = self._tokenizer
        start = torch.as_tensor(self.splits["test"][None, :PROMPT]).long().to(model.device)
        with in_eval_mode(model):
            ids = model.generate(
                start, attention_mask=torch.ones_like(start), max_new_tokens=SAMPLE, do_sample=False,
                pad_token_id=tokenizer.eos_token_id,
            )  # fmt: skip
        return {"prompt": tokenizer.decode(ids[0, :PROMPT]), "sample": tokenizer.decode(ids[0, PROMPT:])}

    @not_in_keys
    def run(self, method: str, recipe: Recipe, seed: int) -> Run:
        if recipe.distillation:
            raise ValueError("Language models are trained without distillation here: set distillation=0.")
        return super().run(method, recipe, 0 if method == "dense" else seed)

    @not_in_keys
    def _place(self, method: str, recipe: Recipe, seed: int) -> tuple[str, Path]:
        return super()._place(method, recipe, 0 if method == "dense" else seed)

    @not_in_keys
    def _inputs(self, pair: str) -> dict[str, Any]:
        known = weights_hash(self.model.location) if isinstance(self.model, Encoder) else self.model.config.to_dict()
        inputs: dict[str, Any] = {
            "model": known,
            "ids": self._hashes[""],
            "window": self.window,
            "train_tokens": self.train_tokens,
            "test_tokens": self.test_tokens,
        }
        if self.protocol is not None:
            inputs["protocol"] = str(self.protocol)
        inputs |= {f"beyond.{name}": self._hashes[name] for name in self.beyond}
        return inputs | ({} if pair == "dense" else {"split": self.split})

    @cached_property
    @not_in_keys
    def _hashes(self) -> dict[str, str]:
        """Of all that is read or scored: of what is beyond by its name, of the text itself by none."""
        content = {"": b"".join(self.text.splits[split].tobytes() for split in sorted(self.text.splits))}
        for name, other in self.beyond.items():
            text = isinstance(other, TokenizedText)
            content[name] = other.splits["test"].tobytes() if text else repr(other.splits["dev"][:]).encode()
        return {name: hashlib.sha256(what).hexdigest() for name, what in content.items()}
