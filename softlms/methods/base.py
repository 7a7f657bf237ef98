"""What a method declares, and what it receives to work with."""

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
from softlms.modules import Replacement
from softlms.utils.files import last_checkpoint

__all__ = ["DISTILLATION", "Config", "Method", "Work", "training_arguments"]

DISTILLATION = 0.9  # share of the dense model's logits in the loss of all training after a cut

Trained = TypeVar("Trained", bound=DistillingTrainer)


@dataclass(frozen=True)
class Config:
    """Settings of a method: a dataclass that validates itself in ``__post_init__``.

    A field with the name of a recipe setting takes its value from the recipe (`softlms.experiments.recipe.Recipe`).
    """

    def unused(self) -> tuple[str, ...]:
        """Settings that have no effect given the others: no run depends on them."""
        return ()


@dataclass
class Work:
    """What a method receives besides a model and its settings.

    Attributes
    ----------
    rows : Dataset
        Training rows, with a column ``teacher_logits`` if `distillation` is above 0 and there is no `teacher`.
    collator : callable
    seed : int
    folder : Path
        For checkpoints; interrupted training resumes from them.
    arguments : callable
        ``arguments(folder, learning_rate, epochs)`` returns training arguments.
    distillation, teacher
        See `softlms.DistillingTrainer`.
    costs : Costs, optional
        Costs of the dense model, if they were measured.
    score : callable, optional
        ``score(model)`` returns metrics on rows that may be used for choices. If None, no model is scored.
    batch_size : int
        Rows in a pass that computes the loss alone.
    note : callable
        Receives one line of progress.
    shared : dict
        Objects in memory that methods of one dense model share, such as its factors.
    """

    rows: datasets.Dataset
    collator: DataCollator
    seed: int
    folder: Path
    arguments: Callable[[Path, float, float], TrainingArguments]
    distillation: float = 0.0
    teacher: PreTrainedModel | None = None
    costs: Costs | None = None
    score: Callable[[PreTrainedModel], dict[str, Any]] | None = None
    batch_size: int = 64
    note: Callable[[str], None] = lambda line: None
    shared: dict[str, Any] = field(default_factory=dict)

    def training(self, name: str, learning_rate: float, epochs: float) -> dict[str, Any]:
        """Keyword arguments of every trainer of a method: arguments, rows, collator, distillation, teacher."""
        return {
            "args": self.arguments(self.folder / name, learning_rate, epochs),
            "train_dataset": self.rows,
            "data_collator": self.collator,
            "distillation": self.distillation,
            "teacher": self.teacher,
        }

    def scores(self, model: Callable[[], PreTrainedModel]) -> dict[str, Any]:
        """Scores of a model, which is built only if there is a `score`."""
        return {} if self.score is None else self.score(model())

    def train(self, trainer: Trained) -> Trained:
        """Train, from the last complete checkpoint if there is one."""
        trainer.remove_callback(PrinterCallback)  # the history is kept; a notebook shows one line per run
        trainer.train(resume_from_checkpoint=last_checkpoint(Path(str(trainer.args.output_dir))))
        return trainer


def training_arguments(
    folder: Path, learning_rate: float, epochs: float, *, batch_size: int, seed: int, bf16: bool, **options: Any
) -> TrainingArguments:
    """Arguments common to all training, for the available device.

    Parameters
    ----------
    folder : Path
        For checkpoints.
    learning_rate, epochs, batch_size, seed, bf16
        As in ``transformers.TrainingArguments``.
    **options
        Any other of these arguments.
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
        use_cpu=not torch.cuda.is_available(),  # bf16 on a CPU needs this
        dataloader_pin_memory=torch.cuda.is_available(),
        **options,
    )


@dataclass(frozen=True)
class Method:
    """A compression method.

    Attributes
    ----------
    name : str
        Used in the name of a chain, such as "soft" in "whitened+soft".
    config : type
        Its settings, a `Config`.
    apply : callable
        ``apply(model, config, work)`` changes the model in place, trains it if needed, and leaves it deployed. It
        returns what a stored run records: plain values by name. Over a chain, "steps" are added up and "history" is
        concatenated.
    modules : tuple of type
        The classes that it puts into models; models with these can be saved and loaded.
    takes_factors : bool
        Its name follows the name of a factorization.
    fixed : mapping
        Settings implied by the name.
    """

    name: str
    config: type[Config]
    apply: Callable[[PreTrainedModel, Any, Work], dict[str, Any]]
    modules: tuple[type[Replacement], ...] = ()
    takes_factors: bool = False
    fixed: Mapping[str, Any] = field(default_factory=dict)
