"""softlms: compress language models by learning each layer's rank (SoftLMs, arXiv 2411.10543).

Three verbs: `decompose` a model, train it with `SoftTrainer` until it meets its budget, `deploy` it.
"""

from softlms.architectures import ARCHITECTURES, find_targets
from softlms.budget import Budget, ParameterCount, count_parameters, refill, uniform_ranks
from softlms.evaluation import add_teacher_logits, evaluate
from softlms.layers import LowRankLinear, SoftLinear
from softlms.losses import adaptive_compression_loss, distillation_loss, linear_compression_loss
from softlms.surgery import decompose, deploy, ranks, truncate
from softlms.tasks import TASKS, encode, load_task
from softlms.thresholds import SoftThreshold, hard_threshold, shifted_tanh, soft_threshold
from softlms.training import BudgetNotMet, DistillingTrainer, SoftTrainer

__version__ = "0.1.0"

__all__ = [
    "ARCHITECTURES",
    "TASKS",
    "Budget",
    "BudgetNotMet",
    "DistillingTrainer",
    "LowRankLinear",
    "ParameterCount",
    "SoftLinear",
    "SoftThreshold",
    "SoftTrainer",
    "adaptive_compression_loss",
    "add_teacher_logits",
    "count_parameters",
    "decompose",
    "deploy",
    "distillation_loss",
    "encode",
    "evaluate",
    "find_targets",
    "hard_threshold",
    "linear_compression_loss",
    "load_task",
    "ranks",
    "refill",
    "shifted_tanh",
    "soft_threshold",
    "truncate",
    "uniform_ranks",
]
