"""When `SoftTrainer` fixes its ranks, and how strongly it pushes the thresholds until then."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from softlms.budget import BudgetNotMet

__all__ = ["SoftSchedule"]

logger = logging.get_logger(__name__)

BUDGET = {"keep", "count", "multiple"}  # settings that define how much is kept
AIM = 0.5  # of the deadline: when the push aims to meet the budget
DECADES = 8.0  # by which the push can grow or fall until the deadline
SMALLEST_PUSH = 1e-8  # if the task has no gradient in the thresholds at first
STALL_STEPS = 100  # without movement before a warning
STALL_SHARE = 1e-3  # of all components: smaller changes do not count as movement


class SoftSchedule(TrainerCallback):
    """Watches the budget and sets the push; its state is stored in the trainer state of checkpoints.

    Attributes
    ----------
    gamma : float
        Current weight of the compression loss.
    frozen_at : int or None
        The step at which the ranks were fixed.
    note : dict
        Record of this training for the model card, once the ranks are fixed.
    """

    # not an ExportableState: the Trainer would rebuild that without its trainer
    KEY = "softlms"

    def __init__(self, trainer: Any) -> None:  # a SoftTrainer, which imports this
        self.trainer = trainer
        self.gamma = trainer.gamma or 0.0  # if it adapts, the first step sets it
        self.frozen_at: int | None = None
        self.note: dict[str, Any] = {}
        self.last_move = (0, self.components())  # step, components
        self._before: list[Tensor] = []  # alphas

    def components(self) -> int:
        """Number of live components of all layers. (The number of weights does not change above break-even.)"""
        return sum(self.trainer.ranks.values())

    def restore(self, state: TrainerState) -> None:
        """Restore the state from a checkpoint; without one, only set the phase of alpha."""
        stored = state.stateful_callbacks.get(self.KEY)
        if stored is not None:
            self.frozen_at, self.last_move = stored["frozen_at"], tuple(stored["last_move"])
            if self.trainer.gamma is None:
                self.gamma = stored.get("gamma", self.gamma)
            if self.frozen_at is not None:
                self.note = stored.get("note", {})
                self.trainer.write_note()
        for layer in self.trainer.soft_layers.values():
            layer.threshold.alpha.requires_grad_(self.frozen_at is None)
            layer.threshold.hard |= self.frozen_at is not None

    def changed(self, state: TrainerState) -> list[str]:
        """Settings that differ from those of the run that wrote a checkpoint."""
        before = state.stateful_callbacks.get(self.KEY, {}).get("settings", {})
        return [name for name, value in before.items() if self.trainer.settings.get(name) != value]

    def check_finite(self, state: TrainerState) -> None:
        """Raise an error that names the layer if training has diverged."""
        for name, layer in self.trainer.soft_layers.items():
            if not torch.isfinite(layer.sigma).all() or layer.rank == 0:
                raise RuntimeError(f"Training diverged by step {state.global_step} in {name}: lower learning_rate.")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Apply settings that differ from those of the resumed checkpoint."""
        trainer = self.trainer
        self._start_afresh(state)
        changed = set(self.changed(state))
        if self.frozen_at is None and "alpha_learning_rate" in changed:
            trainer.set_alpha_rate(state.max_steps)
        if self.frozen_at is not None and BUDGET & changed and trainer.cost() > trainer.limit:
            trainer.fix_ranks()
            trainer.optimizer.state.clear()  # the loaded moments would move cut sigma away from zero
            state.best_metric = state.best_model_checkpoint = state.best_global_step = None  # of the larger model

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._start_afresh(state)

    def _start_afresh(self, state: TrainerState) -> None:
        """At the cut the optimizer is new; to save it, and to load it, FSDP lets it take a step of zero."""
        if self.frozen_at == state.global_step:
            self.trainer.optimizer.state.clear()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._before = [alpha.detach().clone() for alpha in self.trainer.alphas]

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        if self.frozen_at is not None:
            return
        if self.trainer.gamma is None and self.gamma == 0:
            gradients = [alpha.grad.abs() for alpha in self.trainer.alphas if alpha.grad is not None]
            size = torch.stack(gradients).mean().item() if gradients else 0.0
            if not math.isfinite(size):
                return  # in half precision the first steps may overflow: they are skipped
            self.gamma = max(size, SMALLEST_PUSH)
        self.trainer.add_push()

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        for layer in self.trainer.soft_layers.values():
            layer.project_()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.frozen_at is None:
            self._compress(state, control)
        state.stateful_callbacks[self.KEY] = {
            "frozen_at": self.frozen_at,
            "last_move": self.last_move,
            "gamma": self.gamma,
            "note": self.note,
            "ranks": None if self.frozen_at is None else self.trainer.ranks,
            "settings": self.trainer.settings,
            "layers": self.trainer.layer_forms(),
        }

    def _compress(self, state: TrainerState, control: TrainerControl) -> None:
        trainer = self.trainer
        kept = trainer.cost()
        late = trainer.deadline < 1 and state.global_step >= trainer.deadline * state.max_steps
        if kept <= trainer.limit or late:
            self.check_finite(state)
            self.frozen_at = state.global_step
            trainer.freeze()
            at = f"step {state.global_step} of {state.max_steps}"
            if kept <= trainer.limit:
                logger.info(f"Budget met at {at}; ranks are fixed from here.")
            else:
                share, allowed = self._shares(kept)
                logger.warning(
                    f"At the deadline, {at}, {share:.3f} of the linears' cost was kept: all thresholds were raised "
                    f"together to the budget of {allowed:.3f}."
                )
            if not trainer.learns():
                logger.info("No weight of the model learns: training ends here, with nothing left to recover.")
                control.should_training_stop = True
            elif state.global_step >= state.max_steps:
                logger.warning("The budget was met at the very last step, so none is left to recover. Train longer.")
            return
        if trainer.gamma is None:
            self._adapt(state)
        else:
            self._watch_stall(state, kept)

    def _adapt(self, state: TrainerState) -> None:
        """Push harder if the thresholds, at the pace of this step, would miss the budget; else push less."""
        trainer = self.trainer
        end = trainer.deadline * state.max_steps
        left = max(0.0, AIM * end - state.global_step)
        ahead = [alpha + left * (alpha - before) for alpha, before in zip(trainer.alphas, self._before, strict=True)]
        late = trainer.cost(ahead) > trainer.limit
        self.gamma *= 10 ** ((DECADES if late else -DECADES) / end)

    def _watch_stall(self, state: TrainerState, kept: float) -> None:
        """Warn if a constant push does not move the thresholds."""
        trainer = self.trainer
        step, before = self.last_move
        now = self.components()
        if abs(before - now) > STALL_SHARE * sum(min(shape) for shape in trainer.shapes.values()):
            self.last_move = (state.global_step, now)
        elif state.global_step - step == STALL_STEPS:
            share, allowed = self._shares(kept)
            logger.warning(
                f"The ranks have not changed for {STALL_STEPS} steps, with {share:.3f} of the linears kept and "
                f"a budget of {allowed:.3f}: leave gamma ({trainer.gamma}) out, so that it adapts, or raise it or "
                "alpha_learning_rate."
            )

    def _shares(self, kept: float) -> tuple[float, float]:
        """Shares of the dense linears' cost: kept, and allowed by the budget."""
        whole = self.trainer.costs.dense - self.trainer.costs.rest
        return kept / whole, self.trainer.limit / whole

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        kept = self.trainer.cost()
        if self.frozen_at is None and kept > self.trainer.limit:
            share, allowed = self._shares(kept)
            raise BudgetNotMet(
                f"After {state.global_step} steps {share:.3f} of the linears' cost is kept, the budget allows "
                f"{allowed:.3f}. Train longer, or set a deadline below {self.trainer.deadline}: it forces the budget."
            )
