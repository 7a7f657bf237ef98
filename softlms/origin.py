"""What a compressed model carries along: a mark on its configuration, and what its dense model held.

The mark is what ``from_pretrained`` looks for in ``config.json``. It stands on the live configuration from surgery on,
so that it is written whoever writes the file. A dense model made from such a configuration is dense, and loads as such.
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

__all__ = ["DenseModel", "SoftLMsConfig", "is_marked", "mark", "note_dense", "remember"]

FORMAT = 2
METHOD = "softlms"
REGISTRIES = {"AttentionInterface": ALL_ATTENTION_FUNCTIONS, "AttentionMaskInterface": ALL_MASK_ATTENTION_FUNCTIONS}
DENSE = "dense_model"  # attribute of a model
WRAPPED = re.compile(r"\.(base_layer|original_module)(?=\.)")  # by PEFT, which renames what it wraps


class SoftLMsConfig(QuantizationConfigMixin):
    """What ``config.json`` says of a compressed model: which library reads it, and the attention it computed with.

    Parameters
    ----------
    format : int
        Version of the layout; a newer one than this library knows is refused.
    attention : str, optional
        Taken up at loading unless ``attn_implementation`` asks for another.
    registered : list of str, optional
        transformers' registries that held a function of that name; older versions did not note them.
    then : object, optional
        Another library's quantization config, asked for at loading; never saved.
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
        """What is saved."""
        return {name: value for name, value in super().to_dict().items() if name != "then"}


def is_marked(config: PreTrainedConfig) -> bool:
    """Whether a configuration says that softlms reads its model's weights."""
    present = getattr(config, "quantization_config", None)
    method = present.get("quant_method") if isinstance(present, dict) else getattr(present, "quant_method", None)
    return method == METHOD


def mark(model: nn.Module) -> None:
    """Put the mark on a model's live configuration, as it stands now; another library's is left alone."""
    config = model.config if isinstance(model, PreTrainedModel) else None
    if config is not None and (is_marked(config) or getattr(config, "quantization_config", None) is None):
        attention = config._attn_implementation
        registered = [name for name, functions in REGISTRIES.items() if attention in functions]
        # a dict, as a configuration that was read from a file has it
        config.quantization_config = SoftLMsConfig(attention=attention, registered=registered).to_dict()


def remember(model: nn.Module, layers: Iterable[str] = ()) -> None:
    """Mark a model that is about to be changed, and note what it holds while it is dense.

    Parameters
    ----------
    model : nn.Module
        Noted once, at the first change: parameters by name and size, all but those of a task's head, and which of them
        are weights of target linears.
    layers : iterable of str
        Target linears that the family's table does not name.
    """
    mark(model)
    note_dense(model)
    linears = vars(model)[DENSE]["linears"]
    linears += sorted(set(layers) - set(linears))


def note_dense(model: nn.Module) -> None:
    """Note what a model holds, unless it was noted before."""
    if DENSE not in vars(model):
        vars(model)[DENSE] = {"parameters": _parameters(model), "linears": named_targets(model)}


class DenseModel:
    """What a model held before it was changed, as far as it is known, beside what it holds now.

    Parameters
    ----------
    model : nn.Module
    targets : collection of str
        Names of the target linears that the model has now, in whatever form.

    Attributes
    ----------
    gone : int
        Weights of target linears that have no module of their own any more.
    rest : int
        All other parameters, biases of the targets among them. A head or an adapter that came later counts as it is.
    moved : set of int
        Ids of the parameters that stand for the linears that are gone: matrices of what took their place.
    """

    def __init__(self, model: nn.Module, targets: Collection[str]) -> None:
        known = vars(model).get(DENSE, {"parameters": {}, "linears": []})
        sizes, modules = known["parameters"], dict(model.named_modules())
        # a fused projection that was taken apart is there in its parts
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
        # a task's head is another one for another task; a language model's is a table like the embeddings
        parts = [model.base_model, *filter(None, [model.get_output_embeddings()])]
        own = {id(parameter) for part in parts for parameter in part.parameters()}
    else:
        own = {id(parameter) for parameter in model.parameters()}
    changed = [name for name, module in model.named_modules() if isinstance(module, Replacement)]
    named = {name: values for name, values in model.named_parameters() if id(values) in own}
    return {name: values.numel() for name, values in named.items() if not _is_inside(name, changed)}


def _is_inside(name: str, modules: Collection[str]) -> bool:
    """Whether a parameter is a module's or a part's of it."""
    parts = name.split(".")
    return any(".".join(parts[:i]) in modules for i in range(1, len(parts)))
