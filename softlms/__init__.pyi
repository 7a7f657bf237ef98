# Every name that softlms resolves, for `__init__.py` and for type checkers; those in its __all__ are the public ones.
from .architectures import ARCHITECTURES as ARCHITECTURES
from .architectures import find_targets as find_targets
from .budget import (
    Budget as Budget,
)
from .budget import (
    BudgetNotMet as BudgetNotMet,
)
from .budget import (
    Costs as Costs,
)
from .budget import (
    ParameterCount as ParameterCount,
)
from .budget import (
    count_parameters as count_parameters,
)
from .budget import (
    parameter_costs as parameter_costs,
)
from .budget import (
    refill as refill,
)
from .budget import (
    uniform_ranks as uniform_ranks,
)
from .data.tasks import TASKS as TASKS
from .data.tasks import encode as encode
from .data.tasks import load_task as load_task
from .data.text import load_text as load_text
from .distillation import DistillingTrainer as DistillingTrainer
from .evaluation.likelihood import perplexity as perplexity
from .evaluation.metrics import add_teacher_logits as add_teacher_logits
from .evaluation.metrics import evaluate as evaluate
from .export import export_onnx as export_onnx
from .fused import split_fused as split_fused
from .kernels.allocator import keep_memory as keep_memory
from .kernels.selective_scan import fast_scan as fast_scan
from .layers import LowRankLinear as LowRankLinear
from .layers import SoftLinear as SoftLinear
from .losses import (
    adaptive_compression_loss as adaptive_compression_loss,
)
from .losses import (
    distillation_loss as distillation_loss,
)
from .losses import (
    linear_compression_loss as linear_compression_loss,
)
from .lowrank.allocation import (
    ALLOCATIONS as ALLOCATIONS,
)
from .lowrank.allocation import (
    allocate as allocate,
)
from .lowrank.allocation import (
    sensitivity_curves as sensitivity_curves,
)
from .lowrank.calibration import LayerStatistics as LayerStatistics
from .lowrank.calibration import calibrate as calibrate
from .lowrank.factorization import FACTORIZATIONS as FACTORIZATIONS
from .lowrank.factorization import Factors as Factors
from .lowrank.factorization import factorize as factorize
from .lowrank.masks import MaskTrainer as MaskTrainer
from .measure import count_flops as count_flops
from .measure import measure_latency as measure_latency
from .methods.embeddings.surgery import compress_embeddings as compress_embeddings
from .methods.lora_xs.config import LoraXSConfig as LoraXSConfig
from .origin import SoftLMsConfig as SoftLMsConfig
from .surgery import decompose as decompose
from .surgery import deploy as deploy
from .surgery import ranks as ranks
from .surgery import truncate as truncate
from .thresholds import (
    SoftThreshold as SoftThreshold,
)
from .thresholds import (
    hard_threshold as hard_threshold,
)
from .thresholds import (
    shifted_tanh as shifted_tanh,
)
from .thresholds import (
    soft_threshold as soft_threshold,
)
from .training import SoftTrainer as SoftTrainer

__version__: str
