"""Training with a head behind each block, and weights that choose one of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from softlms.data.inputs import prepared
from softlms.distillation import DistillingTrainer
from softlms.methods.depth.loss import depth_loss, weigh
from softlms.methods.heads import BlockHead, classifier_of

__all__ = ["Deep", "DepthTrainer", "Mixed"]


class Deep(nn.Module):
    """A classifier with a head behind each of its L blocks, all with the values of its own, and w = 0.

    Parameters
    ----------
    model : PreTrainedModel
        Trained in place.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        parts = classifier_of(model, "A search for the depth")
        self.base: Any = model.base_model
        self.config = model.config
        self.heads = nn.ModuleList(BlockHead.like(parts) for _ in range(parts.depth))
        self.w = nn.Parameter(torch.zeros(parts.depth, device=parts.head.weight.device))

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """Logits of all heads, shape (B, L, C)."""
        states = self.base(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            output_hidden_states=True,
        ).hidden_states[1:]
        return torch.stack([head(state[:, 0]) for head, state in zip(self.heads, states, strict=True)], dim=1)


class Mixed(nn.Module):
    """The model before the cut: its answer is z, what all heads say together.

    Parameters
    ----------
    deep : Deep
    """

    def __init__(self, deep: Deep) -> None:
        super().__init__()
        self.deep, self.config = deep, deep.config

    @property
    def device(self) -> torch.device:
        """Of its weights."""
        return self.deep.w.device

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> SequenceClassifierOutput:
        """z as logits, shape (B, C)."""
        logs = self.deep(input_ids, attention_mask, token_type_ids).log_softmax(-1)
        return SequenceClassifierOutput(logits=weigh(self.deep.w, logs))


class DepthTrainer(DistillingTrainer):
    """Trains a `Deep` on its depth loss; distillation moves the target towards the dense model's probabilities.

    Parameters
    ----------
    model : Deep
    whole : PreTrainedModel
        The model inside it, which says how rows are padded.
    beta, gamma : float
        See `softlms.methods.depth.loss.depth_loss`.
    depth_learning_rate : float
        Of w, without weight decay.
    **kwargs
        As for `DistillingTrainer`.
    """

    def __init__(
        self,
        model: Deep,
        *,
        whole: PreTrainedModel,
        beta: float,
        gamma: float,
        depth_learning_rate: float,
        **kwargs: Any,
    ) -> None:
        self.whole, self.beta, self.gamma, self.depth_learning_rate = whole, beta, gamma, depth_learning_rate
        super().__init__(model, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW (or the optimizer in `args`), with w in its own group."""
        if self.optimizer is None:
            optimizer, w = super().create_optimizer(model), self.model.w
            for group in optimizer.param_groups:
                group["params"] = [values for values in group["params"] if values is not w]
            optimizer.add_param_group({"params": [w], "lr": self.depth_learning_rate, "weight_decay": 0.0})
        return self.optimizer

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return prepared(self.whole, super()._prepare_inputs(inputs))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The depth loss of a batch."""
        weight = self._weight(inputs) if model.training else 1.0
        taught, labels = inputs.pop("teacher_logits", None), inputs.pop("labels")
        if self.distillation and self.teacher is not None:
            taught = self._taught(self.teacher, inputs)
        logits = model(**inputs).float()
        target = F.one_hot(labels, logits.shape[-1]).to(logits)
        if self.distillation:
            target = (1 - self.distillation) * target + self.distillation * taught.softmax(-1)
        w: Any = self.accelerator.unwrap_model(model).w
        loss = weight * depth_loss(w, logits, target, self.beta, self.gamma)
        return (loss, {"logits": logits}) if return_outputs else loss
