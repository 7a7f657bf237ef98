"""`SoftTrainer`: a transformers Trainer that learns ranks, meets a parameter budget, and recovers.

The schedule follows the paper's successor (STAR-KV, arXiv 2606.08382):

1. compress: weights and thresholds train together on L = L_task + gamma L_cmp, alpha at its own, much larger rate,
   until the budget is met; gamma adapts, so that it is met in time (`add_push`: L_task's gradient alone is clipped);
2. freeze: alpha stops learning, the ranks are filled up exactly to the budget, and T shrinks no survivor any more;
3. recover: L_task only, with a fresh optimizer and learning-rate schedule, for the remaining steps.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from accelerate.utils.constants import FSDP_MODEL_NAME
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from softlms.budget import Budget, Costs, ParameterCount, count_parameters, refill
from softlms.distillation import DistillingTrainer
from softlms.losses import COMPRESSION_LOSSES
from softlms.model_card import notes, plain
from softlms.schedule import BUDGET, SoftSchedule
from softlms.sharding import average_gradients, check_parallel, keep_whole, split_groups, start_alike
from softlms.surgery import budget_shapes, soft_layers
from softlms.utils.ranges import check_positive

__all__ = ["SoftTrainer"]

logger = logging.get_logger(__name__)

DEADLINE = 0.6  # of the steps
SMALLEST_MEAN = 1e-30  # where no layer has anything to save, as in a flat measured time
PACE = 4.0  # thresholds rising together at their rate would meet the budget in 1 / PACE of the time to the deadline


class SoftTrainer(DistillingTrainer):
    """Learns the rank of every soft layer until the model meets its budget, then recovers.

    Parameters
    ----------
    model : PreTrainedModel
        A model decomposed by `softlms.decompose`.
    keep, count, multiple
        See `softlms.Budget`.
    costs : Costs, optional
        Of the dense model, from `softlms.count_flops` or `softlms.measure_latency`; see `softlms.allocate`.
    gamma : float, optional
        Constant positive weight of the compression loss; its gradient is added to the clipped one of the task. Adam's
        steps do not depend on the size of a gradient: if this gradient exceeds the task's in every threshold, all rise
        equally, and the ranks are those of one threshold for all, however small the rate. By default gamma adapts: it
        starts at the mean size of the task's own gradients in alpha, grows at each step at whose pace the budget would
        be missed, and falls at the others.
    alpha_learning_rate : float, optional
        Positive learning rate of the thresholds, in their units per step, constant while they learn. By default it
        follows from factors, budget and steps: all thresholds, rising together, would meet the budget in a quarter of
        the time until the deadline.
    compression_loss : {"adaptive", "linear"}
        L_acmp or L_cmp.
    weigh_by_size : bool
        Weight each layer's compression loss by its number of parameters (mean weight 1) instead of equally.
    weigh_by_saving : bool
        Weight it by what the layer's live components save on average, if they were cut down to one (mean weight 1).
        For parameters and FLOPs below break-even, that is what the next one saves. Above, where the first cuts save
        nothing, it is less the further up a layer is; but were it nothing, a layer that came back whole would stay so,
        at the others' expense.
    deadline : float
        Share of the training steps, above 0 and at most 1. If the budget is not met by then, all thresholds are raised
        together until it is, with a warning, so that the remaining steps can recover. With 1 nothing is forced, and a
        budget that is not met is an error.
    distillation : float
        See `DistillingTrainer`.
    **kwargs
        As for ``transformers.Trainer``: args, train_dataset, data_collator, ... Resuming, logging, mixed precision,
        ``accelerate launch``, DDP and FSDP2 are inherited.

    Raises
    ------
    ValueError
        The model is not decomposed, the budget cannot be met, a setting is out of range, or it would run under
        DeepSpeed or a form of FSDP that cannot work (see `check_parallel`). Raised before any work.
        From `train`: the model was deployed, the ranks in the resumed checkpoint were fixed for a smaller budget, or
        the checkpoint is of a run without FSDP and this one is under it.
    BudgetNotMet
        From `train` with a deadline of 1, if its steps end before the budget is met. The model stays in its soft form.

    Notes
    -----
    The successor uses an alpha rate of 1e-2, gamma 0.1 and no weight decay on alpha. The derived rate, adaptive gamma,
    exact fit, size weights, deadline, and constant rates during compression are ours.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        keep: float,
        count: str = "linear",
        multiple: int = 1,
        costs: Costs | None = None,
        gamma: float | None = None,
        alpha_learning_rate: float | None = None,
        compression_loss: str = "adaptive",
        weigh_by_size: bool = False,
        weigh_by_saving: bool = False,
        deadline: float = DEADLINE,
        distillation: float = 0.0,
        **kwargs: Any,
    ) -> None:
        self.soft_layers = soft_layers(model)
        self.shapes = budget_shapes(model)
        self.dense_ranks = {name: min(shape) for name, shape in self.shapes.items() if name not in self.soft_layers}
        # stored in a checkpoint to describe its run
        settings = {
            "keep": keep,
            "count": count,
            "multiple": multiple,
            "gamma": gamma,
            "alpha_learning_rate": alpha_learning_rate,
            "compression_loss": compression_loss,
            "weigh_by_size": weigh_by_size,
            "weigh_by_saving": weigh_by_saving,
            "deadline": deadline,
            "distillation": distillation,
        }
        self.settings: dict[str, Any] = plain(settings, "SoftTrainer")
        self.budget = Budget(*(self.settings[name] for name in ("keep", "count", "multiple")))
        if costs is not None and PartialState().num_processes > 1:  # each process has measured different costs
            (costs,) = broadcast_object_list([costs])
        self.costs = self.budget.costs(self.shapes, self.count_parameters(model), costs)
        self.limit = self.budget.limit(self.costs)
        self.settings["costs"] = costs and self.costs.digest
        if self.costs.of(self.budget.start(self.shapes) | self.dense_ranks) > self.limit:
            raise ValueError(
                f"keep={keep} cannot be met: the {len(self.dense_ranks)} layers that decompose(ranks=...) left whole "
                "are too large for it. Allocate the ranks at this keep."
            )
        given = {"gamma": gamma, "alpha_learning_rate": alpha_learning_rate}
        check_positive(**{name: value for name, value in given.items() if value is not None})
        if not 0 < deadline <= 1:
            raise ValueError(f"deadline is a share of the steps, above 0 and at most 1; got {deadline!r}.")
        if compression_loss not in COMPRESSION_LOSSES:
            known = ", ".join(map(repr, COMPRESSION_LOSSES))
            raise ValueError(f"compression_loss must be one of {known}, got {compression_loss!r}.")
        self.gamma: float | None = self.settings["gamma"]
        self.alpha_learning_rate: float | None = self.settings["alpha_learning_rate"]
        self.deadline: float = self.settings["deadline"]
        self.compression_loss = COMPRESSION_LOSSES[compression_loss]
        if weigh_by_size and weigh_by_saving:
            raise ValueError("weigh_by_size and weigh_by_saving are two ways to weigh a layer: choose one.")
        for option in ("optimizers", "model_init"):
            if option in kwargs:
                raise ValueError(f"{option} cannot be given: SoftTrainer rebuilds its optimizer when alpha is frozen.")
        for name, layer in self.soft_layers.items():
            if layer.U.dtype != torch.float32:
                raise ValueError(
                    f"{name} is in {layer.U.dtype}, too coarse to learn thresholds: load the model with "
                    "dtype=torch.float32; for mixed precision pass TrainingArguments(bf16=True)."
                )
        notes(model.config)  # rejects what no model card can store
        args = kwargs.get("args")
        if args is not None and args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = True  # frozen alpha has no gradient
        super().__init__(model, distillation=distillation, **kwargs)
        check_parallel(self.accelerator.state, fsdp=bool(self.args.fsdp))
        self.whole: nn.ModuleList | None = None  # under FSDP: what is not sharded
        if self.is_fsdp_enabled:
            start_alike(self.accelerator, model)
            layers = self.soft_layers.values()
            sigma = nn.ParameterList(layer.sigma for layer in layers)
            self.whole = keep_whole(self.accelerator, [sigma, *(layer.threshold for layer in layers)])
        self.schedule = SoftSchedule(self)
        self.add_callback(self.schedule)

    @property
    def alphas(self) -> list[Tensor]:
        """The thresholds, in the order of the layers."""
        return [layer.threshold.alpha for layer in self.soft_layers.values()]

    @property
    def ranks(self) -> dict[str, int]:
        """Number of live components of each layer by name; a layer left whole has all."""
        return {name: self.dense_ranks.get(name) or self.soft_layers[name].rank for name in self.shapes}

    def count_parameters(self, model: nn.Module) -> ParameterCount:
        """Parameters with the layers that the budget counts as targets."""
        return count_parameters(model, lambda name, module: name in self.shapes)

    def add_push(self) -> None:
        """Add the gradient of gamma L_cmp to that of the thresholds.

        To the gradients, not to the loss, and after they are clipped: the push can grow to hundreds of times the
        task's gradient, and within a common norm it would take from the weights what they learn (ours).
        """
        with torch.enable_grad():
            alpha = torch.stack(self.alphas).detach().requires_grad_()
            loss = self.schedule.gamma * self.compression_loss(alpha, self.layer_weights().to(alpha))
            (gradient,) = torch.autograd.grad(loss, alpha)
        for threshold, own in zip(self.alphas, gradient, strict=True):
            threshold.grad = own if threshold.grad is None else threshold.grad + own

    def layer_weights(self) -> Tensor:
        """Weights of the soft layers' compression losses, shape (layers,), mean 1 (or all 0)."""
        weights = [1.0] * len(self.soft_layers)
        if self.settings["weigh_by_size"]:
            weights = [float(math.prod(self.shapes[name])) for name in self.soft_layers]
        if self.settings["weigh_by_saving"]:
            prices = {name: self.costs.prices[name] for name in self.soft_layers}
            ranks = self.ranks
            weights = [(price(ranks[name]) - price(1)) / max(1, ranks[name] - 1) for name, price in prices.items()]
        return torch.tensor(weights) / max(sum(weights) / len(weights), SMALLEST_MEAN)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As in Trainer; under FSDP also average the gradients that it leaves alone."""
        loss = super().training_step(*args, **kwargs)
        if self.whole is not None and self.accelerator.sync_gradients:
            average_gradients(self.accelerator, self.whole)
        return loss

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train as in Trainer; if the thresholds are already frozen, only recover."""
        present = set(self.model.modules())
        if not all(layer in present for layer in self.soft_layers.values()):
            raise ValueError(
                "The model was deployed and has no thresholds to learn: recover with transformers' Trainer."
            )
        self._check_resumed(resume_from_checkpoint)
        self.optimizer = self.lr_scheduler = None
        if self.schedule.frozen_at is not None:
            self.schedule.frozen_at = 0
        return super().train(resume_from_checkpoint, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW (or the optimizer in `args`), with alpha in its own group: own rate, no weight decay."""
        if self.optimizer is None:
            self.schedule.restore(self.state)
            optimizer = super().create_optimizer(model)
            alphas = {id(alpha) for alpha in self.alphas}
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if id(p) not in alphas]
            if self.whole is not None:
                split_groups(optimizer, self.whole)
            if self.schedule.frozen_at is None:
                # a derived rate is set with the schedule, when the number of steps is known
                group = {"params": self.alphas, "lr": self.alpha_learning_rate or 0.0, "weight_decay": 0.0}
                optimizer.add_param_group(group)
            elif not self.learns():
                raise ValueError(
                    "The ranks are fixed and no weight of the model learns: nothing is left to train. Deploy it, or "
                    "let weights learn with requires_grad_(True)."
                )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        """During compression, constant rates after a warm-up of the weights; then the schedule in `args`."""
        frozen_at = self.schedule.frozen_at
        if frozen_at is not None:
            return super().create_scheduler(num_training_steps - frozen_at, optimizer)
        if self.lr_scheduler is None:
            optimizer = optimizer or self.optimizer
            if self.alpha_learning_rate is None:
                optimizer.param_groups[-1]["lr"] = self._even_rate(num_training_steps)
            warmup = self.args.get_warmup_steps(num_training_steps)
            weights: Callable[[int], float] = lambda step: min(1.0, (step + 1) / (warmup + 1))  # noqa: E731
            groups = len(optimizer.param_groups)
            self.lr_scheduler = LambdaLR(optimizer, [weights] * (groups - 1) + [lambda step: 1.0])
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def set_alpha_rate(self, steps: int) -> None:
        """Use the rate of this run's settings in place of the one loaded from a checkpoint."""
        rate = self.alpha_learning_rate or self._even_rate(steps)
        self.optimizer.param_groups[-1] |= {"lr": rate, "initial_lr": rate}
        self.lr_scheduler.base_lrs[-1] = rate

    def learns(self) -> bool:
        """Whether any parameter is trainable."""
        return any(parameter.requires_grad for parameter in self.model.parameters())

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        # a model from before the cut is never the best
        return self.schedule.frozen_at is not None and super()._determine_best_metric(metrics, trial)

    def cost(self, alphas: Iterable[Tensor | float] | None = None) -> float:
        """Cost of the soft layers in the budget's count, if deployed now or with the given thresholds."""
        layers = self.soft_layers.values()
        with torch.no_grad():
            pairs = zip(layers, alphas or self.alphas, strict=True)
            live = [(layer.sigma / layer.threshold.unit > alpha).sum() for layer, alpha in pairs]
            ranks = torch.stack(live).clamp(min=1).tolist()
        return self.costs.of(self.dense_ranks | dict(zip(self.soft_layers, ranks, strict=True)))

    def _even_rate(self, steps: int) -> float:
        """The rate at which thresholds rising together meet the budget in 1 / PACE of the deadline."""
        with torch.no_grad():
            alphas = torch.stack(self.alphas)
            margins = torch.cat([layer.margins() for layer in self.soft_layers.values()])
        rises = margins.sort().values.tolist()
        met = bisect_left(range(len(rises)), True, key=lambda i: self.cost([*(alphas + rises[i])]) <= self.limit)
        return PACE * rises[min(met, len(rises) - 1)] / (self.deadline * steps)

    def layer_forms(self) -> dict[str, dict[str, Any]]:
        """Properties of each layer that no tensor stores; a resumed run must match them."""
        forms = {name: layer.description() for name, layer in self.soft_layers.items()}
        changing = ("learns", "hard")  # once the ranks are fixed
        return {name: {n: v for n, v in form.items() if n not in changing} for name, form in forms.items()}

    def _check_resumed(self, checkpoint: str | bool | None) -> None:
        """Report settings that changed since a checkpoint; refuse changes that cannot be applied.

        These are a budget for which the fixed ranks are too small, and layers that were decomposed differently.
        """
        folder = get_last_checkpoint(self.args.output_dir) if checkpoint is True else checkpoint
        file = Path(folder or "", TRAINER_STATE_NAME)
        if not folder or not file.is_file():
            return
        if self.whole is not None and not Path(folder, f"{FSDP_MODEL_NAME}.bin").is_file():
            raise ValueError(
                f"{folder} was not saved under FSDP: resume it without fsdp, or train the model that it holds, from "
                "from_pretrained, as a new run."
            )
        state = TrainerState.load_from_json(str(file))
        stored = state.stateful_callbacks.get(SoftSchedule.KEY, {})
        before, fixed = stored.get("settings", {}), stored.get("frozen_at")
        forms, own = stored.get("layers", {}), self.layer_forms()
        for name in sorted(forms.keys() | own.keys()) if forms else ():
            if forms.get(name) != own.get(name):
                raise ValueError(
                    f"{folder} has {forms.get(name)} for {name}, this model has {own.get(name)}: decompose it with the "
                    "same targets and settings, or train from the start."
                )
        changed = self.schedule.changed(state)
        was, now = (", ".join(f"{n}={of.get(n)!r}" for n in changed) for of in (before, self.settings))
        if fixed is not None and BUDGET & set(changed):
            if self.costs.of(stored["ranks"]) <= self.limit:
                raise ValueError(
                    f"The ranks in {folder} were fixed at step {fixed} with {was}, and this run has {now}: cut "
                    "components do not come back. Resume with the same or a smaller budget, or train from the start."
                )
            now += ", and the ranks are cut further"
        elif fixed is not None and "costs" in changed:
            now += ", and the ranks do not change"
        if changed:
            logger.warning(f"{folder} was made with {was}; from now on it is {now}.")

    def freeze(self) -> None:
        """Fix the ranks, and restart optimizer and learning rate."""
        # empty the same object: accelerate would keep a replaced optimizer and its moments in memory
        rate = self.optimizer.param_groups.pop()["lr"]
        self.optimizer.state.clear()
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"]
        self.lr_scheduler = None
        self.fix_ranks(alpha_learning_rate=rate)
        self.callback_handler.lr_scheduler = self.create_scheduler(self.state.max_steps)

    def fix_ranks(self, **note: Any) -> None:
        """Cut or fill the ranks to the budget permanently; `note` has further entries for the model card."""
        met, multiple = self.cost() <= self.limit, self.budget.multiple
        start = self.budget.start(self.shapes) | self.dense_ranks
        if met:
            rounded = {name: layer.rank // multiple * multiple for name, layer in self.soft_layers.items()}
            larger = {name: max(rounded.get(name, least), least) for name, least in start.items()}
            start = larger if self.costs.of(larger) <= self.limit else start
        margins = {name: layer.margins(dead=True).tolist() for name, layer in self.soft_layers.items()}
        for name, scores in margins.items():  # sigma that were cut permanently do not come back
            if multiple < len(scores) < min(self.shapes[name]):
                del scores[len(scores) // multiple * multiple :]
            start[name] = min(start[name], len(scores))
        final = refill(self.costs, start, self.limit, margins | {name: [] for name in self.dense_ranks}, multiple)
        for name, layer in self.soft_layers.items():
            layer.set_rank_(final[name])
            layer.freeze_()
        self.schedule.note |= note | {
            "keep": self.budget.keep,
            "count": self.budget.count,
            "gamma": self.schedule.gamma,
            "ranks_fixed_at_step": self.state.global_step,
            "budget": "met" if met else "forced",
        }
        self.write_note()

    def write_note(self) -> None:
        """Write the note for the model card into the configuration."""
        self.model.config.softlms = notes(self.model.config) | self.schedule.note

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as in Trainer, with the kept share of parameters, the thresholds and gamma besides the loss."""
        if "loss" in logs:
            self.schedule.check_finite(self.state)
            parameters = self.count_parameters(self.model)
            alpha = torch.stack(self.alphas).detach()
            logs |= {
                "kept_linear": parameters.kept("linear"),
                "kept_total": parameters.kept("total"),
                "alpha_mean": alpha.mean().item(),
                "alpha_max": alpha.max().item(),
            }
            if self.schedule.frozen_at is None:
                logs["gamma"] = self.schedule.gamma
        super().log(logs, start_time)
