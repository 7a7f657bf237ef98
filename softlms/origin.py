"""What a compressed model carries: a mark on its configuration, and a record of its dense model's parameters.

``from_pretrained`` looks for the mark in ``config.json``. Surgery sets it on the live configuration, so that it is
saved whoever writes the file. A dense model created from such a configuration is dense, and loads as such.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.quantization_config import QuantizationConfigMixin

from softlms.architectures import named_targets
from softlms.modules import Replacement

__all__ = ["DenseModel", "SoftLMsConfig", "is_marked", "left_whole", "mark", "note_dense", "remember"]

FORMAT = 2
METHOD = "softlms"
REGISTRIES = {"AttentionInterface": ALL_ATTENTION_FUNCTIONS, "AttentionMaskInterface": ALL_MASK_ATTENTION_FUNCTIONS}
DENSE = "dense_model"  # attribute of a model
WRAPPED = re.compile(r"\.(base_layer|original_module)(?=\.)")  # PEFT renames what it wraps


class SoftLMsConfig(QuantizationConfigMixin):
    """Entry of a compressed model in ``config.json``: the library that reads it, and its attention implementation.

    Parameters
    ----------
    format : int
        Version of the layout; versions newer than this library knows are refused.
    attention : str, optional
        Used at loading unless ``attn_implementation`` is given.
    registered : list of str, optional
        transformers' registries with a function of that name; older versions did not record them.
    then : object, optional
        Another library's quantization config, requested at loading; never saved.
    """

    def __init__(
        self,
        format: int = FORMAT,
        attention: str | None = None,
        registered: Collection[str] | None = None,
        then: Any = None,
        **others: Any,
    ) -> None:
        self.quant_method = METHOD
        self.format = format
        self.attention = attention
        if registered is None:
            registered = () if attention in (None, "eager") else ("AttentionInterface",)
        self.registered = list(registered)
        self.then = then

    def to_dict(self) -> dict[str, Any]:
        """The entry to save."""
        return {name: value for name, value in super().to_dict().items() if name != "then"}


def is_marked(config: PreTrainedConfig) -> bool:
    """Whether a configuration marks its model's weights as readable by softlms."""
    present = getattr(config, "quantization_config", None)
    method = present.get("quant_method") if isinstance(present, dict) else getattr(present, "quant_method", None)
    return method == METHOD


def mark(model: nn.Module) -> None:
    """Put the mark on a model's live configuration; another library's mark is not touched."""
    config = model.config if isinstance(model, PreTrainedModel) else None
    if config is not None and (is_marked(config) or getattr(config, "quantization_config", None) is None):
        attention = config._attn_implementation
        registered = [name for name, functions in REGISTRIES.items() if attention in functions]
        # a dict, as in a configuration read from a file
        config.quantization_config = SoftLMsConfig(attention=attention, registered=registered).to_dict()


def remember(model: nn.Module, layers: Iterable[str] = (), whole: Iterable[str] | None = None) -> None:
    """Mark a model before its first change, and record the parameters of the dense model.

    Parameters
    ----------
    model : nn.Module
        Recorded once, at the first change: names and sizes of all parameters but those of a task head, and which of
        them are weights of target linears.
    layers : iterable of str
        Target linears that are not in the family's table.
    whole : iterable of str, optional
        Those that stay as they are, and count in a budget all the same; by default the ones recorded before.
    """
    mark(model)
    note_dense(model)
    linears = vars(model)[DENSE]["linears"]
    linears += sorted(set(layers) - set(linears))
    if whole is not None:
        vars(model)[DENSE]["whole"] = [*whole]


def note_dense(model: nn.Module) -> None:
    """Record a model's parameters, unless recorded before."""
    if DENSE not in vars(model):
        vars(model)[DENSE] = {"parameters": _parameters(model), "linears": named_targets(model), "whole": []}


def left_whole(model: nn.Module) -> list[str]:
    """Names of the target linears that were left as they are, and count in a budget all the same."""
    known: list[str] = vars(model).get(DENSE, {}).get("whole", [])
    return known


class DenseModel:
    """Parameters that a model had before it was changed, as far as known, compared with those it has now.

    Parameters
    ----------
    model : nn.Module
    targets : collection of str
        Names of the target linears that the model has now, in any form.

    Attributes
    ----------
    gone : int
        Number of weights of target linears that no longer have a module of their own.
    rest : int
        Number of all other parameters, with the targets' biases. A head or adapter added later counts as it is.
    moved : set of int
        Ids of the matrices that replaced target linears which are gone.
    """

    def __init__(self, model: nn.Module, targets: Collection[str]) -> None:
        known = vars(model).get(DENSE, {"parameters": {}, "linears": []})
        sizes, modules = known["parameters"], dict(model.named_modules())
        # a split fused projection is present in its parts
        whole = {name.rpartition(".")[0] for name in targets} | set(targets)
        lost = [name for name in known["linears"] if name not in modules and f"{name}.weight" in sizes]
        weights = {f"{name}.weight" for name in (*whole, *lost)}
        self.gone = sum(sizes[f"{name}.weight"] for name in lost)
        self.rest = sum(size for name, size in sizes.items() if name not in weights)
        others = [name for name, module in modules.items() if isinstance(module, Replacement)]
        self.moved: set[int] = set()
        for name in others:
            if any(linear.startswith(f"{name}.") for linear in lost):
                self.moved |= {id(values) for values in modules[name].parameters() if values.ndim > 1}
        inside = (*targets, *others)
        for name, values in model.named_parameters():
            plain = WRAPPED.sub("", name)
            if plain not in sizes and not _is_inside(plain, inside):
                self.rest += values.numel()
        for name in targets:
            bias = modules[name].bias
            if bias is not None and not {f"{name}.bias", f"{name.rpartition('.')[0]}.bias"} & sizes.keys():
                self.rest += bias.numel()


def _parameters(model: nn.Module) -> dict[str, int]:
    if isinstance(model, PreTrainedModel):
        # a task head changes with the task; a language model's head is a table like the embeddings
        parts = [model.base_model, *filter(None, [model.get_output_embeddings()])]
        own = {id(parameter) for part in parts for parameter in part.parameters()}
    else:
        own = {id(parameter) for parameter in model.parameters()}
    changed = [name for name, module in model.named_modules() if isinstance(module, Replacement)]
    named = {name: values for name, values in model.named_parameters() if id(values) in own}
    return {name: values.numel() for name, values in named.items() if not _is_inside(name, changed)}


def _is_inside(name: str, modules: Collection[str]) -> bool:
    """Whether a parameter belongs to one of these modules or their submodules."""
    parts = name.split(".")
    return any(".".join(parts[:i]) in modules for i in range(1, len(parts)))
