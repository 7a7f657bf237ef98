"""Register our folders with transformers; imported together with transformers' models, see `softlms.utils.imports`.

The registered functions import the rest when they are called, so that ``import softlms`` stays fast.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

from transformers.modeling_utils import PreTrainedModel
from transformers.quantizers import auto

__all__: list[str] = []

METHOD = "softlms"


def _quantizer(config: Any, **options: Any) -> Any:
    from softlms.saving.loading import make_quantizer

    return make_quantizer(config, **options)


class _Config:
    """Placeholder for `softlms.origin.SoftLMsConfig` in transformers' table."""

    @staticmethod
    def from_dict(values: dict[str, Any], *args: Any, **options: Any) -> Any:
        from softlms.origin import SoftLMsConfig

        return SoftLMsConfig.from_dict(values, *args, **options)


def _register() -> None:
    """Register; repeated after a reload of this module, as in a notebook."""
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = _Config
    auto.AUTO_QUANTIZER_MAPPING[METHOD] = _quantizer
    present: Any = PreTrainedModel.save_pretrained
    original = getattr(present, "before_softlms", present)
    signature = inspect.signature(original)

    # transformers' own hook, a quantizer on the model, writes in place: a kill would leave half a folder. It also makes
    # the model count as quantized for Trainer, PEFT and `to`. So we wrap the functions instead
    @functools.wraps(original)
    def save_pretrained(self: PreTrainedModel, *args: Any, **options: Any) -> None:
        from softlms.modules import Replacement
        from softlms.saving.checkpoint import save, unmarked

        adapters = getattr(self, "_hf_peft_config_loaded", False)  # then only the adapters are written
        if adapters or not any(isinstance(module, Replacement) for module in self.modules()):
            with unmarked(self.config):
                original(self, *args, **options)
            return
        given = signature.bind(self, *args, **options).arguments
        given |= given.pop("kwargs", {})
        del given["self"]
        if given.pop("is_main_process", True):
            save(original, self, given)

    @functools.wraps(PreTrainedModel._upload_modified_files)
    def upload(self: PreTrainedModel, *args: Any, **options: Any) -> Any:
        from softlms.saving.checkpoint import upload

        return upload(self, *args, **options)

    save_pretrained.before_softlms = original  # type: ignore[attr-defined]
    PreTrainedModel.save_pretrained = save_pretrained
    PreTrainedModel._upload_modified_files = upload
    merge: Any = auto.AutoHfQuantizer.merge_quantization_configs
    merge = getattr(merge, "before_softlms", merge)

    @functools.wraps(merge)
    def merge_quantization_configs(quantization_config: Any, quantization_config_from_args: Any) -> Any:
        asked = quantization_config_from_args
        if asked is not None and dict(quantization_config).get("quant_method") == METHOD:
            from softlms.origin import SoftLMsConfig

            if not isinstance(asked, SoftLMsConfig):
                return SoftLMsConfig(**dict(quantization_config), then=asked)
        return merge(quantization_config, asked)

    merge_quantization_configs.before_softlms = merge  # type: ignore[attr-defined]
    auto.AutoHfQuantizer.merge_quantization_configs = staticmethod(merge_quantization_configs)


_register()
