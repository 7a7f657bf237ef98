"""softlms: compress language models by learning each layer's rank (SoftLMs, arXiv 2411.10543).

Three verbs: `decompose` a model, train it with `SoftTrainer` until it meets its budget, `deploy` it.
"""

import softlms.adapters  # noqa: F401 (teaches PEFT to put LoRA around thin layers)
from softlms.architectures import ARCHITECTURES, find_targets
from softlms.budget import (
    Budget,
    BudgetNotMet,
    Costs,
    ParameterCount,
    count_parameters,
    parameter_costs,
    refill,
    uniform_ranks,
)
from softlms.data.tasks import TASKS, encode, load_task
from softlms.data.text import load_text
from softlms.distillation import DistillingTrainer
from softlms.evaluation import add_teacher_logits, evaluate
from softlms.export import export_onnx
from softlms.fused import split_fused
from softlms.kernels.allocator import keep_memory
from softlms.kernels.selective_scan import fast_scan
from softlms.layers import LowRankLinear, SoftLinear
from softlms.likelihood import perplexity
from softlms.losses import adaptive_compression_loss, distillation_loss, linear_compression_loss
from softlms.lowrank.allocation import ALLOCATIONS, allocate, sensitivity_curves
from softlms.lowrank.calibration import LayerStatistics, calibrate
from softlms.lowrank.factorization import FACTORIZATIONS, Factors, factorize
from softlms.lowrank.masks import MaskTrainer
from softlms.measure import count_flops, measure_latency
from softlms.origin import SoftLMsConfig  # teaches transformers to save and load factored layers
from softlms.surgery import decompose, deploy, ranks, truncate
from softlms.thresholds import SoftThreshold, hard_threshold, shifted_tanh, soft_threshold
from softlms.training import SoftTrainer

__version__ = "0.1.0"

__all__ = [
    "ALLOCATIONS",
    "ARCHITECTURES",
    "FACTORIZATIONS",
    "TASKS",
    "Budget",
    "BudgetNotMet",
    "Costs",
    "DistillingTrainer",
    "Factors",
    "LayerStatistics",
    "LowRankLinear",
    "MaskTrainer",
    "ParameterCount",
    "SoftLMsConfig",
    "SoftLinear",
    "SoftThreshold",
    "SoftTrainer",
    "adaptive_compression_loss",
    "add_teacher_logits",
    "allocate",
    "calibrate",
    "count_flops",
    "count_parameters",
    "decompose",
    "deploy",
    "distillation_loss",
    "encode",
    "evaluate",
    "export_onnx",
    "factorize",
    "fast_scan",
    "find_targets",
    "hard_threshold",
    "keep_memory",
    "linear_compression_loss",
    "load_task",
    "load_text",
    "measure_latency",
    "parameter_costs",
    "perplexity",
    "ranks",
    "refill",
    "sensitivity_curves",
    "shifted_tanh",
    "soft_threshold",
    "split_fused",
    "truncate",
    "uniform_ranks",
]
