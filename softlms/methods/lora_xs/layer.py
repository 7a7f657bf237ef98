"""`LoraXSLinear`: LoRA-XS beside one layer, dense or thin."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from softlms.adapters import set_factors
from softlms.layers import LowRankLinear
from softlms.methods.lora_xs.basis import Basis, same_basis
from softlms.methods.lora_xs.config import LoraXSConfig

__all__ = ["LoraXSLinear"]


class LoraXSLinear(nn.Module, BaseTunerLayer):  # type: ignore[misc, unused-ignore]
    """y = base(x) + (alpha / r) B R A x for each active adapter.

    Parameters
    ----------
    base_layer : nn.Linear, Conv1D or LowRankLinear
    adapter_name, config, basis
        Of the first adapter; see `update_layer`.
    """

    adapter_layer_names = ("lora_xs_R",)
    get_base_layer: Any  # these are BaseTunerLayer's
    set_adapter: Any
    active_adapters: Any
    _cast_input_dtype: Any
    _move_adapter_to_device_of_base_layer: Any
    other_param_names = ("lora_xs_A", "lora_xs_B", "lora_xs_fingerprint", "scaling", "grow", "computed")

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraXSConfig, basis: Basis) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_xs_R = nn.ParameterDict()
        self.lora_xs_A, self.lora_xs_B = BufferDict(), BufferDict()  # not stored: the base determines them
        self.lora_xs_fingerprint = BufferDict(persistent=True)
        self.scaling: dict[str, float] = {}
        self.grow: dict[str, bool] = {}
        self.computed: dict[str, Tensor] = {}  # fingerprints of this base
        self.trusted: dict[str, Tensor] = {}  # those that were compared
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, basis)

    def update_layer(self, adapter_name: str, config: LoraXSConfig, basis: Basis) -> None:
        """Add an adapter, or start it anew."""
        r = len(basis.A)
        self.scaling[adapter_name], self.grow[adapter_name] = config.alpha / r, config.grow
        self.lora_xs_R[adapter_name] = nn.Parameter(torch.randn(r, r) * config.init_std)
        self.lora_xs_A[adapter_name] = basis.A.contiguous()
        self.lora_xs_B[adapter_name] = basis.B.contiguous()
        self.computed[adapter_name] = basis.fingerprint()
        self.lora_xs_fingerprint[adapter_name] = self.computed[adapter_name].clone()
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """(alpha / r) B R A, shape (m, n)."""
        return self._left(adapter_name) @ self.lora_xs_A[adapter_name]

    def _check(self, name: str, stored: Tensor) -> None:
        """Refuse an adapter that was trained on another base: between other vectors its R means something else."""
        if not same_basis(self.computed[name], stored):
            m, n = len(self.lora_xs_B[name]), self.lora_xs_A[name].shape[1]
            raise ValueError(
                f"The LoRA-XS adapter {name!r} belongs to another base: a layer of {m} x {n} has other singular "
                "vectors than when it was trained. Load the base it was trained on, in the same precision; "
                "`.to(dtype)` the whole afterwards."
            )

    def _left(self, name: str) -> Tensor:
        """(alpha / r) B R, shape (m, r)."""
        return self.scaling[name] * self.lora_xs_B[name] @ self.lora_xs_R[name]

    def _at_work(self) -> Iterator[str]:
        """Active adapters of this layer that are not merged."""
        for name in () if self.disable_adapters else self.active_adapters:
            if name in self.lora_xs_R and name not in self.merged_adapters:
                self._trust(name)
                yield name

    def _trust(self, name: str) -> None:
        """Check a fingerprint once: transformers' own loading sets tensors without asking the module."""
        stored = self.lora_xs_fingerprint[name]
        if self.trusted.get(name) is not stored:
            self._check(name, stored)
            self.trusted[name] = stored

    @property
    def weight(self) -> Tensor:
        """The base's weight, in its own layout, with what the adapters add: Mamba's fused kernels read it."""
        weight = self.get_base_layer().weight
        for name in self._at_work():
            delta = self.get_delta_weight(name).to(weight.dtype)
            weight = weight + (delta.T if isinstance(self.get_base_layer(), Conv1D) else delta)
        return weight

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., n) to (..., m)."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = self.base_layer(x, *args, **kwargs)
        dtype = result.dtype
        for name in self._at_work():
            R = self.lora_xs_R[name]
            reduced = F.linear(self._cast_input_dtype(x, R.dtype), self.lora_xs_A[name])
            result = result + self.scaling[name] * F.linear(F.linear(reduced, R), self.lora_xs_B[name])
        return result.to(dtype)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the base layer's weight or factors."""
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.lora_xs_R:
                continue
            self._trust(name)
            if safe_merge and not self.lora_xs_R[name].isfinite().all():
                raise ValueError(f"The adapter {name} contains NaN or infinite values: train it again.")
            self._add(name, 1)
            self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take them out again."""
        while self.merged_adapters:
            self._add(self.merged_adapters.pop(), -1)

    def _add(self, name: str, sign: int) -> None:
        base = self.get_base_layer()
        if not isinstance(base, LowRankLinear):
            delta = self.get_delta_weight(name)
            base.weight += sign * (delta.T if isinstance(base, Conv1D) else delta).to(base.weight)
            return
        up, down, left, A = base.up.weight, base.down.weight, self._left(name), self.lora_xs_A[name]
        if not self.grow[name]:
            G = A.double() @ torch.linalg.pinv(down.double())  # A is within the rows of down: A = G down
            up += sign * (left.double() @ G).to(up)
        elif sign > 0:
            set_factors(base, torch.cat([down, A.to(down)]), torch.cat([up, left.to(up)], dim=1))
        else:
            set_factors(base, down[: -len(A)], up[:, : -len(A)])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Refuse an adapter of another base: there its R would mean something else."""
        for name in self.lora_xs_R:
            stored = state_dict.get(f"{prefix}lora_xs_fingerprint.{name}")
            if stored is not None:
                self._check(name, stored)
            elif f"{prefix}lora_xs_R.{name}" in state_dict:
                raise ValueError(f"The LoRA-XS adapter {name!r} has no fingerprint of its base: it is damaged.")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __repr__(self) -> str:
        return f"lora_xs.{super().__repr__()}"
