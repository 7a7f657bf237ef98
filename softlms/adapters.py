"""PEFT's LoRA around a whole thin layer, under the name of the dense layer, such as ``q_proj``.

``import softlms`` is enough: this module is imported together with peft (`softlms.utils.imports`). An adapter of rank k
is k more components: merging adds them to the layer, which stays thin. An adapter trained on the dense model also fits
the thin one.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor

from softlms.layers import LowRankLinear
from softlms.modules import make_linear, replace

__all__ = ["set_factors"]

PLAIN = (True, False, "gaussian")  # LoRA's other initializations change the weight; a thin layer has none


class ThinLora(Linear):  # type: ignore[misc, unused-ignore]
    """LoRA beside a `LowRankLinear`."""

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **options: Any) -> None:
        if config.init_lora_weights not in PLAIN:
            raise ValueError(
                f"init_lora_weights={config.init_lora_weights!r} changes a dense weight, and this layer is thin: "
                "leave it at True."
            )
        if config.lora_bias:
            raise ValueError("lora_bias=True cannot be merged into a thin layer: leave it at False.")
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **options)

    def _get_in_out_features(self, module: LowRankLinear) -> tuple[int, int]:
        return module.in_features, module.out_features

    @property
    def lora_variants(self) -> dict[tuple[str, ...], None]:
        return {(): None}

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters to the layer as components."""
        thin = self.get_base_layer()
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.lora_A:
                continue
            A, B = self.lora_A[name].weight, self.scaling[name] * self.lora_B[name].weight
            if safe_merge and not (A.isfinite().all() and B.isfinite().all()):
                raise ValueError(f"The adapter {name} contains NaN or infinite values: train it again.")
            down, up = thin.down.weight, thin.up.weight
            set_factors(thin, torch.cat([down, A.to(down)]), torch.cat([up, B.to(up)], dim=1))
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Remove these components again."""
        thin = self.get_base_layer()
        while self.merged_adapters:
            rank = thin.rank - self.r[self.merged_adapters.pop()]
            set_factors(thin, thin.down.weight[:rank], thin.up.weight[:, :rank])


_original = getattr(LoraConfig.__post_init__, "before_softlms", LoraConfig.__post_init__)


@functools.wraps(_original)
def _post_init(self: LoraConfig) -> None:
    _original(self)
    self._register_custom_module({LowRankLinear: ThinLora})


_post_init.before_softlms = _original  # type: ignore[attr-defined]  # this module may be reloaded, as in a notebook
LoraConfig.__post_init__ = _post_init


def set_factors(thin: LowRankLinear, down: Tensor, up: Tensor) -> None:
    """Give a thin layer other factors, down (r, n) and up (m, r): of more components, or of fewer."""
    replace(thin, "down", make_linear(down, None))
    replace(thin, "up", make_linear(up, thin.bias))
