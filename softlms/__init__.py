"""softlms: compress language models by learning the rank of each layer (SoftLMs, arXiv 2411.10543).

Three steps: `decompose` a model, train it with `SoftTrainer` until it meets its budget, `deploy` it. Names are imported
on first use (``__init__.pyi`` lists where they are defined).
"""

import lazy_loader

from softlms.utils.imports import when_imported

__version__ = "0.1.0"

__getattr__, __dir__, _ = lazy_loader.attach_stub(__name__, __file__)

__all__ = [
    "Budget",
    "BudgetNotMet",
    "DistillingTrainer",
    "MaskTrainer",
    "SoftTrainer",
    "allocate",
    "calibrate",
    "compress_embeddings",
    "count_flops",
    "count_parameters",
    "decompose",
    "deploy",
    "encode",
    "evaluate",
    "export_onnx",
    "factorize",
    "fast_scan",
    "find_targets",
    "load_task",
    "measure_latency",
    "perplexity",
    "ranks",
    "truncate",
]

when_imported("transformers.modeling_utils", "softlms.saving.registration")  # from_pretrained loads our folders
# LoRA wraps thin layers, and PEFT knows LoRA-XS
when_imported("peft", "softlms.adapters", "softlms.methods.lora_xs.model")
