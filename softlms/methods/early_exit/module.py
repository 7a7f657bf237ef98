"""`ExitingEncoder`: an encoder that rows leave as soon as a head is sure, and `predict`, which says where they left."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from softlms.methods.early_exit.exits import Exits
from softlms.methods.heads import Classifier, classifier_of
from softlms.modules import Attached
from softlms.origin import remember

__all__ = ["ExitingEncoder", "Prediction", "predict", "put_exits"]

WHO = "An early exit"


@dataclass
class Answers:
    """Of the last forward pass with a threshold: logits (B, C) of the heads, and the blocks that ran for each row."""

    logits: Tensor
    blocks: Tensor


class ExitingEncoder(Attached):
    """The encoder with heads behind its blocks.

    Without a threshold it is the encoder that it was. ``model(..., exit_threshold=tau)`` reads each head as soon as its
    block has run: rows whose largest probability is above tau leave with its answer and run through no further block;
    once all have left, no further block is called.

    Parameters
    ----------
    encoder : nn.Module
        Its blocks are kept, and their names.
    exits : Exits
    """

    form = "exiting encoder"

    def __init__(self, encoder: Any, exits: Exits) -> None:
        super().__init__()
        self.config, self.layer, self.exits = encoder.config, encoder.layer, exits
        self.gradient_checkpointing = getattr(encoder, "gradient_checkpointing", False)
        self.whole = type(encoder).forward
        self.attached = False
        self.answers: Answers | None = None
        self.blocks: Tensor | None = None

    def description(self) -> dict[str, Any]:
        head: Any = self.exits.heads[0]
        return {
            "classes": self.exits.classes,
            "dropout": head.dropout.p,
            "cascade": self.exits.cascade,
            "ensemble": self.exits.ensemble,
        }

    @classmethod
    def skeleton(cls, dense: Any, description: Mapping[str, Any]) -> Self:
        options = {name: description[name] for name in ("classes", "dropout", "cascade", "ensemble")}
        exits = Exits(dense.config.hidden_size, number=len(dense.layer) - 1, **options)
        first = next(dense.parameters())
        return cls(dense, exits.to(first.device, first.dtype))

    def attach(self, model: Any) -> None:
        """Have the model's own head give the answers of rows that left; a model without that head has no exits."""
        head = getattr(model, "classifier", None)
        if isinstance(head, nn.Linear) and head.out_features == self.exits.classes:
            head.register_forward_hook(self._answer)
            self.attached = True

    def forward(self, hidden_states: Tensor, *args: Any, exit_threshold: float | None = None, **options: Any) -> Any:
        """As the encoder.

        Raises
        ------
        ValueError
            A threshold below 0, or one in training, with the states of all blocks, with an attention mask that is no
            tensor, or in a model whose own head does not take the exits' answers.
        """
        lost, self.answers, self.blocks = self.answers, None, None
        if lost is not None:
            raise ValueError("The exits' answers were not taken: the model's classifier was replaced or wrapped.")
        if exit_threshold is None:
            return self.whole(self, hidden_states, *args, **options)
        check_threshold(exit_threshold)
        if not self.attached:
            raise ValueError("This model has exits, but not the head that gives their answers: load the classifier.")
        if self.training:
            raise ValueError("Rows leave early in evaluation alone: call model.eval(), or leave exit_threshold out.")
        outputs = ("output_hidden_states", "output_attentions")
        if args or any(options.get(name) or getattr(self.config, name, False) for name in outputs):
            raise ValueError("Rows that left early have no states behind: leave exit_threshold or these outputs out.")
        if not isinstance(options.get("attention_mask"), Tensor | None):
            raise ValueError("Rows leave early with masks that are tensors: load with attn_implementation='sdpa'.")
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=self._until_sure(hidden_states, exit_threshold, options)
        )

    def _until_sure(self, hidden: Tensor, threshold: float, options: Mapping[str, Any]) -> Tensor:
        """States (B, T, d) of all rows, each behind the last block that ran for it."""
        rows = torch.arange(len(hidden), device=hidden.device)
        classes = self.exits.classes
        answers = Answers(hidden.new_zeros(len(hidden), classes), torch.full_like(rows, len(self.layer)))
        self.answers = answers
        left: list[tuple[Tensor, Tensor]] = []
        before, logs = None, hidden.new_zeros(len(hidden), 0, classes)
        for m, block in enumerate(self.layer):
            hidden = block(hidden, **options)
            if m == self.exits.number:
                break
            before = self.exits.says(m, hidden[:, 0], before)
            logs = torch.cat([logs, before.log_softmax(-1)[:, None]], dim=1)
            said = self.exits.together(m, logs)
            sure = said.exp().amax(-1) > threshold
            if not sure.any():
                continue
            answers.logits[rows[sure]], answers.blocks[rows[sure]] = said[sure].to(answers.logits), m + 1
            left.append((rows[sure], hidden[sure]))
            on = ~sure
            if not on.any():
                rows, hidden = rows[on], hidden[on]
                break
            options = {name: _of_rows(value, on) for name, value in options.items()}
            rows, hidden, before, logs = rows[on], hidden[on], before[on], logs[on]
        self.blocks = answers.blocks
        if not left:
            return hidden
        states = hidden.new_zeros(len(answers.blocks), *hidden.shape[1:])
        for places, values in [*left, (rows, hidden)]:
            states[places] = values
        return states

    def _answer(self, head: nn.Module, inputs: Any, logits: Tensor) -> Tensor | None:
        """Logits of the head for rows that ran through all blocks, and of the exits for the others."""
        answers, self.answers = self.answers, None
        if answers is None:
            return None
        early = answers.blocks <= self.exits.number
        return torch.where(early[:, None], answers.logits.to(logits), logits)


def check_threshold(threshold: float) -> None:
    """Raise ValueError for a threshold that is not a number, or below 0."""
    if not threshold >= 0:
        raise ValueError(f"exit_threshold is a probability: 0 lets all rows leave at once, 1 none; got {threshold!r}.")


def _of_rows(value: Any, on: Tensor) -> Any:
    """The part of an argument that belongs to these rows: masks have the rows first, or one for all."""
    return value[on] if isinstance(value, Tensor) and value.ndim and len(value) == len(on) else value


def put_exits(model: PreTrainedModel, exits: Exits) -> ExitingEncoder:
    """Put heads behind a model's blocks, in place.

    Raises
    ------
    ValueError
        See `softlms.methods.heads.classifier_of`; or the model has exits already.
    """
    parts = check_exits(model)
    remember(model)
    encoder = ExitingEncoder(parts.encoder, exits).train(parts.encoder.training)
    model.get_submodule(parts.base).encoder = encoder
    encoder.attach(model)
    return encoder


def check_exits(model: PreTrainedModel) -> Classifier:
    """The parts of a model that can get exits; ValueError where it cannot."""
    parts = classifier_of(model, WHO)
    if parts.depth < 2:
        raise ValueError(f"{WHO} needs two blocks or more; the model has {parts.depth}.")
    return parts


@dataclass(frozen=True)
class Prediction:
    """Logits (B, C), and the number of blocks that ran for each row (B,)."""

    logits: Tensor
    blocks: Tensor


@torch.no_grad()
def predict(model: PreTrainedModel, exit_threshold: float, **inputs: Tensor) -> Prediction:
    """Predict with early exits.

    Parameters
    ----------
    model : PreTrainedModel
        With exits, in evaluation.
    exit_threshold : float
        A row leaves behind the first block whose head gives a class a larger probability; above 1, none does.
    **inputs : Tensor
        As the model's forward takes.

    Raises
    ------
    ValueError
        The model has no exits, or see `ExitingEncoder.forward`.
    """
    encoder: Any = getattr(model.base_model, "encoder", None)
    if not isinstance(encoder, ExitingEncoder):
        raise ValueError(f"This {type(model).__name__} has no exits: train them first, with the method ztw-exits.")
    logits = model(**inputs, exit_threshold=exit_threshold).logits
    blocks = encoder.blocks
    assert blocks is not None  # set by a pass with a threshold
    if encoder.answers is not None:
        encoder.answers = None
        raise ValueError("The exits' answers were not taken: the model's classifier was replaced or wrapped.")
    return Prediction(logits, blocks)
