"""Training with a head behind each block, and weights that choose one of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from softlms.distillation import DistillingTrainer
from softlms.methods.depth.loss import depth_loss
from softlms.methods.heads import BlockHead, classifier_of

__all__ = ["Deep", "DepthTrainer"]


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


class DepthTrainer(DistillingTrainer):
    """Trains a `Deep` on its depth loss; distillation moves the target towards the dense model's probabilities.

    Parameters
    ----------
    beta, gamma : float
        See `softlms.methods.depth.loss.depth_loss`.
    **kwargs
        As for `DistillingTrainer`.
    """

    def __init__(self, model: Deep, *, beta: float, gamma: float, **kwargs: Any) -> None:
        self.beta, self.gamma = beta, gamma
        kwargs["args"].label_names = ["labels"]  # forward takes none
        super().__init__(model, **kwargs)

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
        logits = model(**inputs).float()
        target = F.one_hot(labels, logits.shape[-1]).to(logits)
        if self.distillation:
            target = (1 - self.distillation) * target + self.distillation * taught.softmax(-1)
        w: Any = self.accelerator.unwrap_model(model).w
        loss = weight * depth_loss(w, logits, target, self.beta, self.gamma)
        return (loss, {"logits": logits}) if return_outputs else loss
