"""What a compressed model carries along: a mark on its configuration, and how large the rest of its dense model was.

The mark is what ``from_pretrained`` looks for in ``config.json``. It stands on the live configuration from surgery on,
so that it is written whoever writes the file. A dense model made from such a configuration is dense, and loads as such.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.quantization_config import QuantizationConfigMixin

__all__ = ["SoftLMsConfig", "check_rest", "is_marked", "mark", "remember"]

FORMAT = 1
METHOD = "softlms"
REGISTRIES = {"AttentionInterface": ALL_ATTENTION_FUNCTIONS, "AttentionMaskInterface": ALL_MASK_ATTENTION_FUNCTIONS}
REST = "rest_of_the_dense_model"  # attribute of a model: a parameter's name to its size
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


def remember(model: nn.Module, layers: Collection[str]) -> None:
    """Mark a model whose `layers` are being factored, and note the size of everything else but a task's head."""
    mark(model)
    known = vars(model).get(REST) or _rest(model)
    vars(model)[REST] = {name: size for name, size in known.items() if not _is_inside(name, layers)}


def check_rest(model: nn.Module, layers: Collection[str]) -> None:
    """Refuse to count what is kept of a dense model whose rest, all but `layers`, is not what it was.

    Raises
    ------
    ValueError
        Something, such as the embeddings, has been resized or replaced since surgery.
    """
    now = {WRAPPED.sub("", name): parameter.numel() for name, parameter in model.named_parameters()}
    for name, size in vars(model).get(REST, {}).items():
        if now.get(name) != size and not _is_inside(name, layers):
            present = f"{now[name]:,}" if name in now else "is gone"
            raise ValueError(
                f"{name} had {size:,} parameters when the model was compressed, now: {present}. What is kept of the "
                "dense model cannot be said: resize or replace it in the dense model, and compress that."
            )


def _rest(model: nn.Module) -> dict[str, int]:
    if not isinstance(model, PreTrainedModel):
        return {name: parameter.numel() for name, parameter in model.named_parameters()}
    # a task's head is another one for another task; a language model's is a table like the embeddings
    parts = [model.base_model, *filter(None, [model.get_output_embeddings()])]
    own = {id(parameter) for part in parts for parameter in part.parameters()}
    return {name: parameter.numel() for name, parameter in model.named_parameters() if id(parameter) in own}


def _is_inside(name: str, layers: Collection[str]) -> bool:
    """Whether a parameter is a layer's or a layer's part's."""
    parts = name.split(".")
    return any(".".join(parts[:i]) in layers for i in range(1, len(parts)))
