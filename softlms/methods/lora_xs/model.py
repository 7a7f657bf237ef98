"""LoRA-XS as a method of PEFT. ``import softlms`` is enough: this module is imported together with peft."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, register_peft_method
from peft.utils.peft_types import PeftType
from torch import nn
from transformers.pytorch_utils import Conv1D

from softlms.architectures import ARCHITECTURES, FLOATS, named_targets
from softlms.fused import SplitLinear
from softlms.layers import LowRankLinear
from softlms.methods.lora_xs.basis import Basis, basis_of
from softlms.methods.lora_xs.config import NAME, LoraXSConfig
from softlms.methods.lora_xs.layer import LoraXSLinear

__all__ = ["LoraXSModel"]

ADAPTABLE = (nn.Linear, Conv1D, LowRankLinear)


class LoraXSModel(BaseTuner):  # type: ignore[misc, unused-ignore]
    """A model with LoRA-XS beside its layers; made by ``peft.get_peft_model``.

    Raises
    ------
    ValueError
        A chosen layer is none that can be adapted, its rank is below r, its weight is not finite or quantized, or an
        adapter is merged. In that case nothing is changed.
    """

    prefix = "lora_xs_"
    tuner_layer_cls = LoraXSLinear
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        model = self.model
        if peft_config.target_modules is None:
            named = {name: model.get_submodule(name) for name in named_targets(model)}
            # of a split projection its parts; what cannot be adapted is refused below, not left out
            names = [name for name, module in named.items() if not isinstance(module, SplitLinear)]
            kinds = ARCHITECTURES[model_config["model_type"]].targets if names else {}
            ends = {kind for kind in kinds if any(name.endswith(f".{kind}") for name in names)}
            peft_config.target_modules = ends or None
        elif peft_config.target_modules == "all-linear":
            # PEFT finds a thin layer's factors: take the layer itself instead
            thin = {name for name, module in model.named_modules() if isinstance(module, LowRankLinear)}
            found = _maybe_include_all_linear_layers(peft_config, model).target_modules
            peft_config.target_modules = {
                outer if (outer := name.rpartition(".")[0]) in thin else name for name in found
            }
        return super()._prepare_adapter_config(peft_config, model_config)

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        """Compute every basis, before any layer is replaced."""
        chosen = [(n, m) for n, m in model.named_modules() if self._check_target_module_exists(peft_config, n)]
        self._bases: dict[str, Basis] = {name: _basis(name, module, peft_config) for name, module in chosen}

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, adapter_names: Any = None, **options: Any) -> Iterator[None]:
        if adapter_names is not None:
            raise ValueError("LoRA-XS has one adapter for a whole batch: use set_adapter, without adapter_names.")
        yield

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's own hands the weight of the old module to the new one; a thin layer's is computed
        setattr(parent, child_name, new_module)

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **options: Any,
    ) -> None:
        basis = self._bases.pop(current_key)
        if isinstance(target, LoraXSLinear):
            target.update_layer(adapter_name, peft_config, basis)
            return
        layer = LoraXSLinear(target, adapter_name, peft_config, basis)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)


def _base(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, LoraXSLinear) else module


def _basis(name: str, module: nn.Module, config: LoraXSConfig) -> Basis:
    layer: Any = _base(module)
    if isinstance(layer, BaseTunerLayer):
        raise ValueError(f"{name} has an adapter of another method: merge_and_unload() or delete it first.")
    if not isinstance(layer, ADAPTABLE):
        raise ValueError(
            f"{name} is a {type(layer).__name__}: LoRA-XS adapts nn.Linear, GPT-2's Conv1D and thin layers. Deploy a "
            "layer that learns its rank (softlms.deploy); leave others out with exclude_modules."
        )
    if layer.weight.is_meta or not layer.weight.numel():
        raise ValueError(f"{name} is offloaded or sharded: load the model whole, without device_map.")
    if layer.weight.dtype not in FLOATS:
        raise ValueError(f"{name} is quantized ({layer.weight.dtype}): load the model unquantized.")
    if isinstance(module, LoraXSLinear) and module.merged:
        raise ValueError(f"{name} has the adapter {module.merged_adapters[0]} merged: call unmerge_adapter() first.")
    try:
        return basis_of(layer, config.rank_of(name), config.components, config.seed)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


if PeftType[NAME] not in PEFT_TYPE_TO_CONFIG_MAPPING:  # this module may be reloaded, as in a notebook
    register_peft_method(name=NAME.lower(), config_cls=LoraXSConfig, model_cls=LoraXSModel)
