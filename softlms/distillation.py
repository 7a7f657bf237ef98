"""`DistillingTrainer`: a transformers Trainer with a teacher. Its steps do not depend on how rows are batched."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedModel, Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler

from softlms.data.inputs import IGNORED, in_eval_mode, prepared
from softlms.losses import distillation_loss

__all__ = ["DistillingTrainer"]

PREPARED = ("forward", "_is_accelerate_prepared")  # attributes that accelerate sets on a model


class EpochLengthGroupedSampler(LengthGroupedSampler):
    """Length-grouped order that depends only on seed and epoch, so that a resumed run sees the same batches.

    The epoch is read, not set: accelerate's wrappers do not pass ``set_epoch`` on to this sampler.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: Callable[[], int]) -> None:
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self.seed = seed

    def __iter__(self) -> Iterator[int]:
        self.generator.manual_seed(self.seed())
        return super().__iter__()


class DistillingTrainer(Trainer):
    """A Trainer that can mix the task loss with distillation from a dense model.

    Parameters
    ----------
    distillation : float
        Share d of the distillation loss, 0 to 1: L_task = (1 - d) L_labels + d KL. For a language model both are means
        over the predicted tokens. Above 0 the data set needs a column ``teacher_logits`` (see
        `softlms.evaluation.metrics.add_teacher_logits`), unless there is a `teacher`.
    teacher : PreTrainedModel, optional
        Computes its logits for each batch, without gradients or dropout and in the training's precision: for outputs
        that are too large to store, a vocabulary for each token. It is moved to the training's device.
    **kwargs
        As for ``transformers.Trainer``.

    Raises
    ------
    ValueError
        `distillation` is out of range, there is no teacher or more than one, or the teacher is the model itself.
    """

    optimizer: Any
    lr_scheduler: Any
    compute_loss_func: Any
    _signature_columns: list[str]

    def __init__(
        self, model: nn.Module, *, distillation: float = 0.0, teacher: PreTrainedModel | None = None, **kwargs: Any
    ) -> None:
        if not 0 <= distillation <= 1:
            raise ValueError(f"distillation is a share, 0 to 1; got {distillation!r}.")
        stored = "teacher_logits" in getattr(kwargs.get("train_dataset"), "column_names", ())
        if distillation and not (stored or teacher):
            raise ValueError(
                "distillation needs a column 'teacher_logits' (use softlms.add_teacher_logits first), or a teacher."
            )
        if teacher and (stored or not distillation):
            given = "a column 'teacher_logits'" if stored else "distillation=0"
            raise ValueError(f"A teacher is given, and {given}: leave one of them out.")
        if teacher and not {*map(id, teacher.parameters())}.isdisjoint(map(id, model.parameters())):
            raise ValueError("The teacher shares weights with the model, which will change: give copy.deepcopy(model).")
        super().__init__(model, **kwargs)
        self.distillation = distillation
        self.teacher = None if teacher is None else teacher.to(self.args.device)
        # the model's loss is the mean over its batch, as classifiers ignore num_items_in_batch; see `_weight`
        self.model_accepts_loss_kwargs = False
        self.loss_is_scaled_for_ga = False
        if self.compute_loss_func is not None:
            self.compute_loss_func = partial(self._mean_of, self.compute_loss_func)
        self._mean_items: Tensor | None = None

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self.distillation and "teacher_logits" not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, "teacher_logits"]

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            return EpochLengthGroupedSampler(
                sampler.batch_size, sampler.lengths, lambda: seed + int(self.state.epoch or 0)
            )
        return sampler

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in Trainer; afterwards the model computes in its own precision again, whatever it was trained in."""
        held = self.model.__dict__
        own = {name: held[name] for name in PREPARED if name in held}
        try:
            return super().train(*args, **kwargs)
        finally:
            # accelerate replaces forward by one under autocast for good: restore the previous one
            self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
            for name in PREPARED:
                held.pop(name, None)
            held.update(own)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The task loss, in training mixed with distillation."""
        taught, labels = inputs.pop("teacher_logits", None), inputs.get("labels")
        weight = self._weight(inputs) if model.training else 1.0
        distills = self.distillation and model.training
        if distills and self.teacher is not None:
            taught = self._taught(self.teacher, inputs)
        loss, outputs = super().compute_loss(model, inputs, True)  # mean over this batch
        if distills:
            counted = None
            if labels is not None and labels.ndim > 1 and labels.shape == outputs.logits.shape[:-1]:  # of tokens
                counted = self._counted(labels)
            divergence = distillation_loss(outputs.logits, taught, counted=counted)
            loss = (1 - self.distillation) * loss + self.distillation * divergence
        return (weight * loss, outputs) if return_outputs else weight * loss

    @torch.no_grad()
    def _taught(self, teacher: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
        """The teacher's logits for a batch."""
        given = {name: values for name, values in inputs.items() if name not in self.label_names}
        with in_eval_mode(teacher), self.accelerator.autocast():
            return teacher(**given).logits

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Move to the model's device; rows padded on the left get their own positions."""
        return prepared(self.model, super()._prepare_inputs(inputs))

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, None]:
        """The batches of one optimizer step; stores their mean number of labels over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._mean_items = None
        if batches and all("labels" in batch for batch in batches):
            items = torch.stack([self._items(batch).to(device) for batch in batches])
            self._mean_items = self.accelerator.gather(items).float().mean()
        return batches, None

    def _mean_of(self, function: Callable[..., Tensor], outputs: Any, labels: Any, **_: Any) -> Tensor:
        """The user's loss, as a mean over this batch like the model's own loss."""
        return function(outputs, labels, num_items_in_batch=None if labels is None else self._count(labels))

    def _items(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Number of labels in a batch that its loss is a mean over."""
        return self._count(prepared(self.model, batch)["labels"])

    def _count(self, labels: Tensor) -> Tensor:
        return self._counted(labels).sum()

    def _counted(self, labels: Tensor) -> Tensor:
        """Which outputs have a label that counts, in the shape of `labels`."""
        counted = labels.ne(IGNORED)
        return F.pad(counted[..., 1:], (0, 1)) if self._loss_shifts_labels else counted

    def _weight(self, batch: Mapping[str, Tensor]) -> Tensor | float:
        """Weight of a batch's mean loss in the accumulated step: its labels, over their mean number per batch.

        This weights accumulated batches and processes like the rows of one large batch.
        """
        return 1.0 if self._mean_items is None else self._items(batch) / self._mean_items
