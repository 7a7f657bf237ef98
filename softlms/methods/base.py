"""What a method says of itself, and what it is given to work with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import datasets
import torch
from transformers import DataCollator, PreTrainedModel, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from softlms.budget import Costs
from softlms.distillation import DistillingTrainer
from softlms.files import last_checkpoint
from softlms.modules import Replacement

__all__ = ["DISTILLATION", "Config", "Method", "Work", "training_arguments"]

DISTILLATION = 0.9  # share of the dense model's logits in the loss of everything that trains after a cut

Trained = TypeVar("Trained", bound=DistillingTrainer)


@dataclass(frozen=True)
class Config:
    """Settings of a method: a dataclass that checks itself, in ``__post_init__``.

    A field with the name of a recipe's setting takes its value from there (`softlms.experiments.recipe.Recipe`).
    """

    def unused(self) -> tuple[str, ...]:
        """Settings that mean nothing beside the others: no run depends on them."""
        return ()


@dataclass
class Work:
    """What a method is given besides a model and its settings.

    Attributes
    ----------
    rows : Dataset
        Training rows; with a column ``teacher_logits`` where `distillation` is above 0.
    collator : callable
    seed : int
    folder : Path
        For checkpoints; a training that was interrupted goes on from them.
    arguments : callable
        ``arguments(folder, learning_rate, epochs)`` makes a training's arguments.
    distillation : float
        See `softlms.DistillingTrainer`.
    costs : Costs, optional
        What the budget counts of the dense model, where that was measured.
    score : callable, optional
        ``score(model)`` gives metrics on rows that choices may be made on. Where there is none, no model is scored.
    note : callable
        Takes a line of progress.
    shared : dict
        What methods of one dense model share in memory, such as its factors.
    """

    rows: datasets.Dataset
    collator: DataCollator
    seed: int
    folder: Path
    arguments: Callable[[Path, float, float], TrainingArguments]
    distillation: float = 0.0
    costs: Costs | None = None
    score: Callable[[PreTrainedModel], dict[str, Any]] | None = None
    note: Callable[[str], None] = lambda line: None
    shared: dict[str, Any] = field(default_factory=dict)

    def training(self, name: str, learning_rate: float, epochs: float) -> dict[str, Any]:
        """What every trainer of a method takes: arguments, rows, collator, distillation."""
        return {
            "args": self.arguments(self.folder / name, learning_rate, epochs),
            "train_dataset": self.rows,
            "data_collator": self.collator,
            "distillation": self.distillation,
        }

    def scores(self, model: Callable[[], PreTrainedModel]) -> dict[str, Any]:
        """Scores of a model, which is made where there is a score for it."""
        return {} if self.score is None else self.score(model())

    def train(self, trainer: Trained) -> Trained:
        """Train, from the last whole checkpoint on where there is one."""
        trainer.remove_callback(PrinterCallback)  # the history is kept; a notebook shows one line a run
        trainer.train(resume_from_checkpoint=last_checkpoint(Path(str(trainer.args.output_dir))))
        return trainer


def training_arguments(
    folder: Path, learning_rate: float, epochs: float, *, batch_size: int, seed: int, bf16: bool, **options: Any
) -> TrainingArguments:
    """What all trainings have in common, on the device that is there.

    Parameters
    ----------
    folder : Path
        For checkpoints.
    learning_rate, epochs, batch_size, seed, bf16
        As in ``transformers.TrainingArguments``.
    **options
        Anything else of these.
    """
    return TrainingArguments(
        str(folder),
        learning_rate=learning_rate,
        num_train_epochs=epochs,
        per_device_train_batch_size=batch_size,
        seed=seed,
        bf16=bf16,
        weight_decay=0.01,
        warmup_steps=0.06,
        train_sampling_strategy="group_by_length",
        report_to=[],
        use_cpu=not torch.cuda.is_available(),  # bf16 on a CPU must be asked for in these words
        dataloader_pin_memory=torch.cuda.is_available(),
        **options,
    )


@dataclass(frozen=True)
class Method:
    """One thing that is done to a model.

    Attributes
    ----------
    name : str
        In the name of a chain, such as "soft" in "whitened+soft".
    config : type
        Its settings, a `Config`.
    apply : callable
        ``apply(model, config, work)`` changes the model in place, trains it where it has to, and leaves it deployed. It
        gives what a stored run shall hold of it: plain values by name. "steps" are added up over a chain, and
        "history" is put together.
    modules : tuple of type
        The classes that it puts into models: folders of models with these are saved and loaded.
    takes_factors : bool
        Its name follows that of a factorization.
    fixed : mapping
        Settings that the name says.
    """

    name: str
    config: type[Config]
    apply: Callable[[PreTrainedModel, Any, Work], dict[str, Any]]
    modules: tuple[type[Replacement], ...] = ()
    takes_factors: bool = False
    fixed: Mapping[str, Any] = field(default_factory=dict)
