"""A learned mask over components, an alternative to the soft threshold (in the style of ACIP, arXiv 2502.01717).

Each component has a score and is on if the score is positive. The gate is a hard step in the forward pass and the
identity in the backward pass (straight-through). An L1 term pulls open scores down, and its weight grows with each step
until the model meets its budget. The weights themselves do not change: only the allocation is learned.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from softlms.budget import Budget, BudgetNotMet, Costs, count_parameters, refill
from softlms.distillation import DistillingTrainer
from softlms.kernels.lazy import lazy_product
from softlms.layers import Ranked
from softlms.lowrank.factorization import Factors, linear_targets
from softlms.modules import as_linear, replace
from softlms.origin import remember

__all__ = ["MaskTrainer", "MaskedLinear"]


class MaskedLinear(Ranked):
    """y = x (U diag(sigma * gate) V^T)^T + bias with gate = 1 where score > 0; only the scores are trained.

    Parameters
    ----------
    factors : Factors
        Shapes (m, r), (r,), (n, r).
    bias : Tensor, optional
        Shape (m,).
    """

    form = "masked"
    left: Tensor
    V: Tensor
    bias: Tensor | None

    def __init__(self, factors: Factors, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("left", factors.U * factors.sigma)
        self.register_buffer("V", factors.V)
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.score = nn.Parameter(torch.ones_like(factors.sigma))

    @classmethod
    def skeleton(cls, dense: Any, description: Mapping[str, Any]) -> Self:
        linear = as_linear(dense)
        (m, n), new = linear.weight.shape, linear.weight.new_empty
        r = min(m, n)
        return cls(Factors(new(m, r), new(r), new(n, r)), linear.bias)

    @property
    def out_features(self) -> int:
        return self.left.shape[0]

    @property
    def in_features(self) -> int:
        return self.V.shape[0]

    @property
    def rank(self) -> int:
        """Number of open gates."""
        return int((self.score > 0).sum())

    @property
    def gate(self) -> Tensor:
        """1 or 0 for each component, shape (r,); its gradient is passed to the score."""
        hard = (self.score > 0).to(self.score.dtype)
        return hard + self.score - self.score.detach()

    @property
    def weight(self) -> Tensor:
        return lazy_product(self.left * self.gate, self.V.T)

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) to (..., m)."""
        return F.linear(F.linear(x, self.V.T) * self.gate, self.left, self.bias)


class MaskTrainer(DistillingTrainer):
    """Learns which components a budget should keep; `train`, then read `ranks`.

    Parameters
    ----------
    model : PreTrainedModel
        Dense. Its target layers are replaced by `MaskedLinear` and everything else is frozen; reload the dense model
        for `softlms.truncate`.
    factors : mapping
        From `softlms.factorize`.
    keep, count, multiple, costs
        See `softlms.Budget` and `softlms.allocate`.
    l1 : tuple of float
        Weight of the L1 term at the first step and half-way through the steps of `args`, positive and rising. It grows
        geometrically. Each component's score is weighted by the number of weights that it stores (mean 1).
    distillation, **kwargs
        See `DistillingTrainer`. The learning rate in `args` applies to the scores, which start at 1.

    Raises
    ------
    ValueError
        The budget cannot be met, the factors do not fit, or a setting is out of range. Raised before any work.
    BudgetNotMet
        From `train`, if its steps end before the budget is met.

    Notes
    -----
    ACIP trains low-rank adapters along with the masks and selects components by their scores. Here the weights do not
    change (recovery comes afterwards, as for every other allocation), and the scores decide only how many components a
    layer keeps. So masks and the other allocations can be compared with nothing else different.
    """

    def __init__(
        self,
        model: nn.Module,
        factors: Mapping[str, Factors],
        *,
        keep: float,
        count: str = "linear",
        multiple: int = 1,
        costs: Costs | None = None,
        l1: tuple[float, float] = (1e-6, 1.0),
        **kwargs: Any,
    ) -> None:
        if not 0 < l1[0] < l1[1] < math.inf:
            raise ValueError(f"l1 must be two positive finite weights, the second larger; got {l1!r}.")
        linears = linear_targets(model, lambda name, module: name in factors)
        if linears.keys() != factors.keys():
            raise ValueError(f"factors contain layers that the model lacks: {sorted(factors.keys() - linears.keys())}.")
        self.shapes = {name: (layer.out_features, layer.in_features) for name, layer in linears.items()}
        for name, shape in self.shapes.items():
            if (len(factors[name].U), len(factors[name].V)) != shape:
                raise ValueError(f"The factors of {name} do not fit its shape {shape}: factorize the same model.")
        parameters = count_parameters(model, lambda name, module: name in factors)
        self.budget = Budget(keep, count, multiple)
        self.costs = self.budget.costs(self.shapes, parameters, costs)
        self.limit = self.budget.limit(self.costs)
        super().__init__(model, **kwargs)
        model.requires_grad_(False)
        remember(model, linears)
        self.masks: dict[str, MaskedLinear] = {}
        for name, linear in linears.items():
            # match the layer: the Trainer has moved the model
            self.masks[name] = MaskedLinear(factors[name], linear.bias).to(next(model.get_submodule(name).parameters()))
            replace(model, name, self.masks[name])
        self.l1 = l1
        prices = {name: float(m + n) for name, (m, n) in self.shapes.items()}
        self.prices = {name: price * len(prices) / sum(prices.values()) for name, price in prices.items()}
        self.add_callback(_StopAtBudget(self))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The task loss, plus the L1 term in training."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if not model.training:
            return (loss, outputs) if return_outputs else loss
        start, end = self.l1
        weight = start * (end / start) ** (2 * self.state.global_step / self.state.max_steps)
        # open components only: |score| would pull closed ones back up to 0
        size = sum(self.prices[name] * mask.score.clamp(min=0).sum() for name, mask in self.masks.items())
        loss = loss + weight * size
        return (loss, outputs) if return_outputs else loss

    def cost(self) -> float:
        """Cost of the layers in the budget's count, if cut to their open gates now."""
        return self.costs.of({name: mask.rank for name, mask in self.masks.items()})

    @property
    def ranks(self) -> dict[str, int]:
        """Ranks by name; components are taken by descending score until the budget is full."""
        scores = {name: mask.score.detach().sort(descending=True).values for name, mask in self.masks.items()}
        return refill(self.costs, self.budget.start(self.shapes), self.limit, scores, self.budget.multiple)


class _StopAtBudget(TrainerCallback):
    def __init__(self, trainer: MaskTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.trainer.cost() <= self.trainer.limit:
            control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        kept, limit = self.trainer.cost(), self.trainer.limit
        if kept > limit:
            raise BudgetNotMet(
                f"After {state.global_step} steps the masks keep {kept:,} of {self.trainer.budget.count}, the budget "
                f"allows {limit:,}. "
                f"Train longer, or raise l1 ({self.trainer.l1}) or the learning rate."
            )
