"""`SoftTrainer`: a transformers Trainer that learns ranks, meets a parameter budget, and recovers.

The schedule is that of the paper's successor (STAR-KV, arXiv 2606.08382):

1. compress: weights and thresholds train together, alpha at its own, much larger rate, on
   L = L_task + gamma L_cmp, until the budget is met;
2. freeze: alpha stops for good, the ranks are filled up exactly to the budget;
3. recover: L_task alone, with a fresh optimizer and learning-rate schedule, for the steps that are left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import Dataset, Sampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.utils import logging

from softlms.budget import Budget, Costs, count_parameters, refill
from softlms.layers import SoftLinear
from softlms.losses import COMPRESSION_LOSSES, distillation_loss
from softlms.surgery import soft_layers

__all__ = ["BudgetNotMet", "DistillingTrainer", "SoftTrainer"]

logger = logging.get_logger(__name__)

STALL_STEPS = 100  # without movement before a warning
STALL_SHARE = 1e-3  # of all components: what counts as movement


class BudgetNotMet(RuntimeError):
    """Training ended before the thresholds had cut the model down to its budget."""


class EpochLengthGroupedSampler(LengthGroupedSampler):
    """Length-grouped order that depends on seed and epoch alone, so that a resumed run sees the same batches.

    The epoch is asked for rather than set: accelerate's wrappers do not pass ``set_epoch`` on to here.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: Callable[[], int]) -> None:
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self.seed = seed

    def __iter__(self) -> Iterator[int]:
        self.generator.manual_seed(self.seed())
        return super().__iter__()


class DistillingTrainer(Trainer):
    """A Trainer whose task loss may be mixed with distillation from a dense model's stored logits.

    Parameters
    ----------
    distillation : float
        Share of the distillation loss, 0 to 1: L_task = (1 - d) L_labels + d KL. Above 0 the data set needs a
        column ``teacher_logits`` (see `softlms.evaluation.add_teacher_logits`).
    **kwargs
        As for ``transformers.Trainer``.

    Raises
    ------
    ValueError
        `distillation` is out of range, or the column is missing.
    """

    optimizer: Any
    lr_scheduler: Any
    _signature_columns: list[str]

    def __init__(self, model: nn.Module, *, distillation: float = 0.0, **kwargs: Any) -> None:
        if not 0 <= distillation <= 1:
            raise ValueError(f"distillation is a share, 0 to 1; got {distillation!r}.")
        columns = getattr(kwargs.get("train_dataset"), "column_names", ())
        if distillation and "teacher_logits" not in columns:
            raise ValueError("distillation needs a column 'teacher_logits': use softlms.add_teacher_logits first.")
        super().__init__(model, **kwargs)
        self.distillation = distillation
        # every loss here is a mean over its batch: let the Trainer divide by the accumulation steps, once for all
        self.model_accepts_loss_kwargs = False

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
        """Trainer's train; afterwards the model computes in its own precision again, whatever it was trained in."""
        try:
            return super().train(*args, **kwargs)
        finally:
            # accelerate replaces forward by one under autocast, for good
            self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
            for name in ("forward", "_is_accelerate_prepared"):
                self.model.__dict__.pop(name, None)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The task's loss, mixed with distillation where the batch carries the teacher's logits."""
        teacher = inputs.pop("teacher_logits", None)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if self.distillation and model.training:
            loss = (1 - self.distillation) * loss + self.distillation * distillation_loss(outputs.logits, teacher)
        return (loss, outputs) if return_outputs else loss


class SoftTrainer(DistillingTrainer):
    """Learns the rank of every soft layer until the model meets its budget, then recovers.

    Parameters
    ----------
    model : PreTrainedModel
        Decomposed by `softlms.decompose`.
    keep, count, multiple
        See `softlms.Budget`.
    costs : Costs, optional
        Of the dense model, from `softlms.count_flops` or `softlms.measure_latency`; see `softlms.allocate`.
    gamma : float
        Weight of the compression loss, positive. Adam's steps do not depend on the size of a gradient: where this one
        outweighs the task's in every threshold, all rise alike and the ranks are those of one threshold for all,
        however small the rate; lower it until the task is heard (0.03 for whitened factors, see notebook 05).
    alpha_learning_rate : float
        Rate of the thresholds, positive; constant while they learn.
    compression_loss : {"adaptive", "linear"}
        L_acmp or L_cmp.
    weigh_by_size : bool
        Weigh each layer's compression loss by its number of parameters (mean weight 1) instead of equally.
    deadline : float
        Share of the training's steps, above 0 and at most 1. Where the budget is not met by then, all thresholds are
        raised together until it is, so that the rest of the steps is left to recover. With 1 nothing is forced:
        a budget that is not met is an error.
    distillation : float
        See `DistillingTrainer`.
    **kwargs
        As for ``transformers.Trainer``: args, train_dataset, data_collator, ... Resuming, logging, mixed precision
        and ``accelerate launch`` are inherited.

    Raises
    ------
    ValueError
        The model is not decomposed, the budget cannot be met, or a setting is out of range: before any work.
    BudgetNotMet
        From `train`, when its steps end before the budget is met. The model is left in its soft form.

    Notes
    -----
    Defaults from the successor (alpha rate 1e-2, gamma 0.1, no weight decay on alpha). Exact fit, size weights, the
    deadline and the constant rates while compressing are ours.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        keep: float,
        count: str,
        multiple: int = 1,
        costs: Costs | None = None,
        gamma: float = 0.1,
        alpha_learning_rate: float = 1e-2,
        compression_loss: str = "adaptive",
        weigh_by_size: bool = False,
        deadline: float = 1.0,
        distillation: float = 0.0,
        **kwargs: Any,
    ) -> None:
        self.soft_layers = soft_layers(model)
        self.shapes = {n: (layer.out_features, layer.in_features) for n, layer in self.soft_layers.items()}
        self.budget = Budget(keep, count, multiple)
        if costs is not None and PartialState().num_processes > 1:  # each process has measured others
            (costs,) = broadcast_object_list([costs])
        self.costs = self.budget.costs(self.shapes, count_parameters(model, _is_soft).rest, costs)
        self.limit = self.budget.limit(self.costs)
        for name, value in (("gamma", gamma), ("alpha_learning_rate", alpha_learning_rate)):
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value!r}.")
        if not 0 < deadline <= 1:
            raise ValueError(f"deadline is a share of the steps, above 0 and at most 1; got {deadline!r}.")
        if compression_loss not in COMPRESSION_LOSSES:
            known = ", ".join(map(repr, COMPRESSION_LOSSES))
            raise ValueError(f"compression_loss must be one of {known}, got {compression_loss!r}.")
        self.gamma = gamma
        self.deadline = deadline
        self.alpha_learning_rate = alpha_learning_rate
        self.compression_loss = COMPRESSION_LOSSES[compression_loss]
        sizes = torch.tensor([float(m * n) for m, n in self.shapes.values()])
        self.layer_weights = sizes / sizes.mean() if weigh_by_size else torch.ones_like(sizes)
        for option in ("optimizers", "model_init"):
            if option in kwargs:
                raise ValueError(f"{option} cannot be given: SoftTrainer rebuilds its optimizer when alpha is frozen.")
        for name, layer in self.soft_layers.items():
            if layer.U.dtype != torch.float32:
                raise ValueError(
                    f"{name} is in {layer.U.dtype}, too coarse to learn thresholds: load the model with "
                    "dtype=torch.float32; for mixed precision pass TrainingArguments(bf16=True)."
                )
        args = kwargs.get("args")
        if args is not None and args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = True  # alpha has no gradient any more once it is frozen
        super().__init__(model, distillation=distillation, **kwargs)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError("SoftTrainer does not run under FSDP or DeepSpeed yet: use one device, or DDP.")
        self.schedule = SoftSchedule(self)
        self.add_callback(self.schedule)

    @property
    def alphas(self) -> list[Tensor]:
        """The thresholds, in the order of the layers."""
        return [layer.threshold.alpha for layer in self.soft_layers.values()]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """L_task, plus gamma L_cmp while the thresholds learn."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training and self.schedule.frozen_at is None:
            alpha = torch.stack(self.alphas)
            loss = loss + self.gamma * self.compression_loss(alpha, self.layer_weights.to(alpha.device))
        return (loss, outputs) if return_outputs else loss

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Trainer's train; called again on a model whose thresholds are frozen, it recovers only."""
        self.optimizer = self.lr_scheduler = None
        if self.schedule.frozen_at is not None:
            self.schedule.frozen_at = 0
        return super().train(resume_from_checkpoint, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW (or what `args` name) with alpha in a group of its own: its rate, no weight decay."""
        if self.optimizer is None:
            self.schedule.restore(self.state)
            optimizer = super().create_optimizer(model)
            alphas = {id(alpha) for alpha in self.alphas}
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if id(p) not in alphas]
            if self.schedule.frozen_at is None:
                group = {"params": self.alphas, "lr": self.alpha_learning_rate, "weight_decay": 0.0}
                optimizer.add_param_group(group)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        """While compressing, constant rates after a warm-up of the weights; then `args`' own schedule for the rest."""
        frozen_at = self.schedule.frozen_at
        if frozen_at is not None:
            return super().create_scheduler(num_training_steps - frozen_at, optimizer)
        if self.lr_scheduler is None:
            optimizer = optimizer or self.optimizer
            warmup = self.args.get_warmup_steps(num_training_steps)
            weights: Callable[[int], float] = lambda step: min(1.0, (step + 1) / (warmup + 1))  # noqa: E731
            groups = len(optimizer.param_groups)
            self.lr_scheduler = LambdaLR(optimizer, [weights] * (groups - 1) + [lambda step: 1.0])
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        # a model from before the cut is never the best one
        return self.schedule.frozen_at is not None and super()._determine_best_metric(metrics, trial)

    def cost(self) -> float:
        """What the soft layers would cost, in the budget's count, if deployed now."""
        return self.costs.of({name: layer.rank for name, layer in self.soft_layers.items()})

    def freeze(self) -> None:
        """Cut or fill the ranks up to the budget, fix them, and start afresh with optimizer and learning rate."""
        met, multiple = self.cost() <= self.limit, self.budget.multiple
        start = self.budget.start(self.shapes)
        if met:
            rounded = {name: layer.rank // multiple * multiple for name, layer in self.soft_layers.items()}
            larger = {name: max(rounded[name], least) for name, least in start.items()}
            start = larger if self.costs.of(larger) <= self.limit else start
        margins = {name: layer.margins(dead=True).tolist() for name, layer in self.soft_layers.items()}
        for name, scores in margins.items():  # sigma that were cut for good do not come back
            if multiple < len(scores) < min(self.shapes[name]):
                del scores[len(scores) // multiple * multiple :]
            start[name] = min(start[name], len(scores))
        for name, rank in refill(self.costs, start, self.limit, margins, multiple).items():
            self.soft_layers[name].set_rank_(rank)
            self.soft_layers[name].freeze_()
        # the same object, emptied: accelerate would keep a replaced optimizer, and its moments, in memory
        self.optimizer.param_groups.pop()
        self.optimizer.state.clear()
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"]
        self.lr_scheduler = None
        # for the model card
        self.model.config.softlms = getattr(self.model.config, "softlms", {}) | {
            "keep": self.budget.keep,
            "count": self.budget.count,
            "gamma": self.gamma,
            "alpha_learning_rate": self.alpha_learning_rate,
            "ranks_fixed_at_step": self.state.global_step,
        }
        self.callback_handler.lr_scheduler = self.create_scheduler(self.state.max_steps)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's log, with the kept share of parameters and the mean alpha beside the loss."""
        if "loss" in logs:
            self.schedule.check_finite(self.state)
            parameters = count_parameters(self.model, _is_soft)
            alpha = torch.stack(self.alphas).detach()
            logs |= {
                "kept_linear": parameters.kept("linear"),
                "kept_total": parameters.kept("total"),
                "alpha_mean": alpha.mean().item(),
                "alpha_max": alpha.max().item(),
            }
        super().log(logs, start_time)


class SoftSchedule(TrainerCallback):
    """Watches the budget; what it knows travels in the checkpoint's trainer state."""

    # not as an ExportableState: the Trainer would build a new one of those without its trainer
    KEY = "softlms"

    def __init__(self, trainer: SoftTrainer) -> None:
        self.trainer = trainer
        self.frozen_at: int | None = None
        self.last_move = (0, self.components())  # step, components

    def components(self) -> int:
        """Live components of all layers. Weights would not do: down to break-even a layer keeps them all."""
        return sum(layer.rank for layer in self.trainer.soft_layers.values())

    def restore(self, state: TrainerState) -> None:
        """Take over what a checkpoint holds; without one, only alpha's phase is set."""
        stored = state.stateful_callbacks.get(self.KEY)
        if stored is not None:
            self.frozen_at, self.last_move = stored["frozen_at"], tuple(stored["last_move"])
        for alpha in self.trainer.alphas:
            alpha.requires_grad_(self.frozen_at is None)

    def check_finite(self, state: TrainerState) -> None:
        """An error that names the layer where training has diverged."""
        for name, layer in self.trainer.soft_layers.items():
            if not torch.isfinite(layer.sigma).all() or layer.rank == 0:
                raise RuntimeError(f"Training diverged by step {state.global_step} in {name}: lower learning_rate.")

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        for layer in self.trainer.soft_layers.values():
            layer.project_()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.frozen_at is None:
            self._compress(state)
        state.stateful_callbacks[self.KEY] = {"frozen_at": self.frozen_at, "last_move": self.last_move}

    def _compress(self, state: TrainerState) -> None:
        trainer = self.trainer
        kept = trainer.cost()
        late = trainer.deadline < 1 and state.global_step >= trainer.deadline * state.max_steps
        if kept <= trainer.limit or late:
            self.check_finite(state)
            self.frozen_at = state.global_step
            trainer.freeze()
            how = "met" if kept <= trainer.limit else "forced"
            logger.info(f"Budget {how} at step {state.global_step} of {state.max_steps}; ranks are fixed from here.")
            if state.global_step >= state.max_steps:
                logger.warning("The budget was met at the very last step: none is left to recover. Train longer.")
            return
        step, before = self.last_move
        now, whole = self.components(), trainer.costs.dense - trainer.costs.rest
        if abs(before - now) > STALL_SHARE * sum(min(shape) for shape in trainer.shapes.values()):
            self.last_move = (state.global_step, now)
        elif state.global_step - step == STALL_STEPS:
            logger.warning(
                f"The ranks have not moved for {STALL_STEPS} steps, with {kept / whole:.3f} of the linears kept and "
                f"a budget of {trainer.limit / whole:.3f}: raise gamma ({trainer.gamma}) or alpha_learning_rate "
                f"({trainer.alpha_learning_rate})."
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = self.trainer
        kept, whole = trainer.cost(), trainer.costs.dense - trainer.costs.rest
        if self.frozen_at is None and kept > trainer.limit:
            raise BudgetNotMet(
                f"After {state.global_step} steps {kept / whole:.3f} of the linears' cost is kept, the budget allows "
                f"{trainer.limit / whole:.3f}. Train longer, or raise gamma ({trainer.gamma}) or alpha_learning_rate "
                f"({trainer.alpha_learning_rate})."
            )


def _is_soft(name: str, module: nn.Module) -> bool:
    return isinstance(module, SoftLinear)
