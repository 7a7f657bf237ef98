"""A classifier, or an encoder that becomes one, and a task."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import DataCollatorWithPadding, PreTrainedModel

from softlms.data.encoders import find_encoder, load_classifier
from softlms.data.tasks import encode, load_task
from softlms.distillation import DistillingTrainer
from softlms.evaluation.metrics import add_teacher_logits, evaluate
from softlms.subjects.base import Subject, check_tokens
from softlms.subjects.settings import Compression
from softlms.utils.files import last_checkpoint
from softlms.utils.machine import device

__all__ = ["Classifier"]


class Classifier(Subject):
    """The dense model's logits are few: they are computed once and stored with the rows.

    Parameters
    ----------
    settings : Compression
        With a task.

    Raises
    ------
    ValueError, OSError
        There is no such task, data, model or tokenizer.
    """

    has_head: bool
    scored = "dev"

    def __init__(self, settings: Compression) -> None:
        data = load_task(str(settings.task), settings.data)
        content = json.dumps({split: rows.to_dict() for split, rows in data.splits.items()})
        self.content = {"sentences": hashlib.sha256(content.encode()).hexdigest()}
        self.settings, self.task, self.data = settings, data.task, {"data": data.source}
        self.metrics = data.task.metrics
        self.origin = find_encoder(settings.model)
        self.tokenizer = self.origin.tokenizer()
        if self.tokenizer.pad_token is None:
            raise ValueError(f"The tokenizer of {self.origin.source} has no padding token: set one, and save it again.")
        rows = encode(data, self.tokenizer, settings.max_length)
        self.train, self.dev = rows["train"], rows["dev"]
        self.options = {"batch_size": settings.batch_size, "save_strategy": "epoch"}
        self.longest = max(self.train["length"])
        self.collator = DataCollatorWithPadding(self.tokenizer)

    @staticmethod
    def load(folder: Path) -> PreTrainedModel:
        return load_classifier(folder)

    def dense(self) -> PreTrainedModel:
        model, self.has_head = self.origin.with_head(self.task)
        longest = max(self.longest, *self.dev["length"])
        check_tokens(model, longest, max(max(ids) for rows in (self.train, self.dev) for ids in rows["input_ids"]))
        if model.config.pad_token_id is None:  # sequence classifiers on language models need it
            model.config.pad_token_id = self.tokenizer.pad_token_id
        model.to(device())
        if self.has_head and "accuracy" in self.metrics:
            self._check_head(model)
        return model

    def _check_head(self, model: PreTrainedModel) -> None:
        """A head of another task may have the right shape, and would be a bad teacher."""
        accuracy = self.scores(model)["accuracy"]
        commonest = max(Counter(self.dev["labels"]).values()) / len(self.dev)
        if accuracy < commonest - 0.02:
            raise ValueError(
                f"{self.settings.model} has a head, but is right on {accuracy:.1%} of {self.task.name}'s dev rows, and "
                f"the commonest answer alone is on {commonest:.1%}. Is it fine-tuned for another task? Give the "
                "encoder without its head."
            )

    def fitted(self, model: PreTrainedModel, work: Path, note: Callable[[str], None]) -> PreTrainedModel:
        """The model with a head for the task; a new one is always loaded from its folder, trained now or before."""
        if self.has_head:
            return model
        folder, half = work / "dense", work / "dense.saving"
        if not folder.is_dir():
            note(f"{self.origin.source} has no head for {self.task.name}: fine-tuning a new one first")
            settings, place = self.settings, work / "fine-tuning"
            args = self.arguments(place, settings.dense_learning_rate, settings.dense_epochs)
            trainer = DistillingTrainer(model, args=args, train_dataset=self.train, data_collator=self.collator)
            trainer.train(resume_from_checkpoint=last_checkpoint(place))
            if not all(values.isfinite().all() for values in model.parameters()):
                raise RuntimeError("Fine-tuning diverged: lower dense_learning_rate.")
            shutil.rmtree(half, ignore_errors=True)  # a kill may have left it half-written
            model.save_pretrained(half)
            half.rename(folder)
        dense = load_classifier(folder, dtype=torch.float32)
        dense.config.name_or_path = self.origin.location  # that folder is temporary: the model card names the source
        return dense.to(device())

    def scores(self, model: PreTrainedModel) -> dict[str, float]:
        return evaluate(model, self.task, self.dev, self.collator)

    def shown(self, score: float) -> str:
        return f"{100 * score:.1f}"

    def teaching(self, dense: PreTrainedModel) -> dict[str, Any]:
        if not self.settings.distillation:
            return {"rows": self.train}
        return {"rows": add_teacher_logits(self.train, dense, self.collator)}
