"""Pretrained models by short name: from an installed package, a folder, or the hub. Never silently swapped."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from softlms.data.gguf_files import check_gguf, is_gguf
from softlms.data.hub import pretrained, split_revision
from softlms.data.named import NAMED
from softlms.data.tasks import Task

__all__ = ["Encoder", "attention", "find_encoder", "load_classifier", "load_language_model"]


@dataclass(frozen=True)
class Encoder:
    """Where a pretrained model is: an encoder, or a causal language model.

    Attributes
    ----------
    location : str
        A folder, a GGUF file, or a hub name with or without ``@revision``; `softlms.data.hub.pretrained` loads from it.
    source : str
        The same for readers, as shown in tables and captions.
    """

    location: str
    source: str

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The encoder's tokenizer; see `load_tokenizer`."""
        return load_tokenizer(self.location)

    def for_task(self, task: Task) -> PreTrainedModel:
        """The encoder with a new head for `task`, initialized from torch's seed."""
        return self.with_head(task)[0]

    def with_head(self, task: Task) -> tuple[PreTrainedModel, bool]:
        """The encoder as a classifier for `task`, in float32, and whether it came with a head of that shape.

        Otherwise the head is new and initialized from torch's seed. A head of another shape is replaced.

        Raises
        ------
        ValueError
            Weights other than those of a head are missing.
        """
        model, report = load_classifier(
            self.location,
            num_labels=task.num_labels,
            # a checkpoint keeps the problem type of the task it was trained on
            problem_type="single_label_classification" if task.labels else "regression",
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
        new = sorted({*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])})
        # the pooler counts as a head: a language model's checkpoint has none
        lost = [name for name in new if name.startswith(f"{model.base_model_prefix}.") and ".pooler." not in name]
        if lost:
            raise ValueError(f"{self.source} lacks {len(lost)} weights of the model, {lost[0]} first: fetch it again.")
        return model, not new

    def language_model(self) -> PreTrainedModel:
        """The model as a causal language model, in float32.

        Raises
        ------
        ValueError
            It was saved without a causal language model's head, or weights are missing.
        """
        saved_as = pretrained(AutoConfig, self.location).architectures or []
        if not set(saved_as) <= {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()}:
            raise ValueError(
                f"{self.source} is a {', '.join(saved_as)}, which has no head of a causal language model: give one "
                "saved from AutoModelForCausalLM."
            )
        model, report = load_language_model(self.location, dtype=torch.float32, output_loading_info=True)
        if lost := sorted(report["missing_keys"]):
            raise ValueError(f"{self.source} lacks {len(lost)} weights of the model, {lost[0]} first: fetch it again.")
        return model


def load_tokenizer(location: str | Path) -> PreTrainedTokenizerBase:
    """``AutoTokenizer.from_pretrained``, but without files it raises instead of returning an empty tokenizer.

    Raises
    ------
    ValueError
        There is no tokenizer, or it cannot be loaded.
    """
    fix = "save the model's own there (tokenizer.save_pretrained)"
    try:
        tokenizer = pretrained(AutoTokenizer, location)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{str(location)!r} has no tokenizer that can be loaded: {fix}. {reason}") from error
    # all but special tokens (unknown words are one) and the mark of a space
    if not tokenizer.decode(list(range(len(tokenizer))), skip_special_tokens=True).strip():
        raise ValueError(f"{str(location)!r} has no tokenizer: {fix}.")
    return tokenizer


def load_classifier(location: str | Path, **options: Any) -> PreTrainedModel:
    """``AutoModelForSequenceClassification.from_pretrained`` with the attention that trains fastest on this machine.

    On a CPU under bfloat16 autocast, the backward pass of torch's fused attention took about a third of MiniLM's
    training step (profiled with torch 2.13 at 16 x 56 tokens). Eager attention, in matrix products, avoids it.

    Raises
    ------
    OSError, ValueError
        As from `softlms.data.hub.pretrained`.
    """
    return pretrained(AutoModelForSequenceClassification, location, attn_implementation=attention(), **options)


def load_language_model(location: str | Path, **options: Any) -> PreTrainedModel:
    """The same for ``AutoModelForCausalLM``; see `load_classifier`."""
    return pretrained(AutoModelForCausalLM, location, attn_implementation=attention(), **options)


def attention() -> str:
    """The implementation that `load_classifier` describes."""
    return "sdpa" if torch.cuda.is_available() else "eager"


def find_encoder(name: str) -> Encoder:
    """Find a pretrained model.

    Parameters
    ----------
    name : str
        A key of `softlms.data.named.NAMED`, "minilm" or "smollm2" (from its package if that is installed, else from
        the hub); a folder; a GGUF file of a Llama model; or a hub name. A hub name may include a commit, tag or branch,
        ``name@revision``; the default is the newest at the time.

    Raises
    ------
    FileNotFoundError
        `name` looks like a folder but contains no model, or like a GGUF file and there is none.
    ImportError, ValueError
        A GGUF file that cannot be read; see `softlms.data.gguf_files.check_gguf`.
    ValueError
        There is no name before an "@", or no revision after it.
    """
    known = NAMED.get(name)
    if known is not None:
        place = known.find()
        if place is None:
            return Encoder(known.hub, f"hub: {known.hub}")
        if not is_gguf(place):
            return Encoder(str(place), f"package {known.package}")
        check_gguf(place)
        return Encoder(str(place), f"package {known.package}, {place.name}")
    if is_gguf(name):
        file = Path(name).expanduser()
        check_gguf(file)
        return Encoder(str(file), f"file: {file.name}")
    if Path(name).is_dir() or name.startswith((".", "/", "~")):
        folder = Path(name).expanduser()
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{name!r} contains no model: {folder / 'config.json'} is missing.")
        return Encoder(str(folder), f"folder: {folder.name}")
    short, revision = split_revision(name)
    if short in NAMED:
        name = f"{NAMED[short].hub}@{revision}"
    return Encoder(name, f"hub: {name}")
