"""Putting a module into another one's place, and the two ways in which a model may hold a linear layer."""

from __future__ import annotations

from typing import TypeVar

import torch
from accelerate.hooks import add_hook_to_module
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

__all__ = ["CHOICES", "HOOKS", "N", "as_conv1d", "as_linear", "make_linear", "replace", "stand_in"]


def make_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """An nn.Linear with copies of a weight, shape (m, n), and a bias, shape (m,)."""
    m, n = weight.shape
    linear = nn.utils.skip_init(nn.Linear, n, m, bias=bias is not None, device=weight.device, dtype=weight.dtype)
    linear.weight.data.copy_(weight)
    if bias is not None:
        linear.bias.data.copy_(bias)
    return linear


N = TypeVar("N", bound=nn.Module)


CHOICES = ("threshold.alpha", "score")  # they choose a rank, and are no part of what the layer computes


HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def stand_in(layer: N, old: nn.Module) -> N:
    """`layer` itself, in the mode of the old one, and as frozen: its weight, or the factors of it, and its bias."""
    learns = {False: False, True: False}
    for name, parameter in old.named_parameters():
        if not name.endswith(CHOICES):
            learns[name.endswith("bias")] |= parameter.requires_grad
    for name, parameter in layer.named_parameters():
        if not name.endswith(CHOICES):
            parameter.requires_grad_(learns[name.endswith("bias")])
    return layer.train(old.training)


def replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a layer into another one's place: in its mode, as frozen, and with its hooks, whose handles stay valid."""
    old = model.get_submodule(name)
    stand_in(layer, old)
    for hooks in HOOKS:
        setattr(layer, hooks, getattr(old, hooks))
    if hasattr(old, "_hf_hook"):  # of accelerate's: brings the input to the layer's device
        add_hook_to_module(layer, old._hf_hook)
    model.set_submodule(name, layer)


def as_linear(layer: nn.Linear | Conv1D) -> nn.Linear:
    """GPT-2's Conv1D, whose weight is stored (n, m), as an nn.Linear on the same memory; an nn.Linear as it is."""
    if isinstance(layer, nn.Linear):
        return layer
    with torch.device("meta"):
        linear = nn.Linear(layer.nx, layer.nf)
    linear.weight = nn.Parameter(layer.weight.detach().T, requires_grad=layer.weight.requires_grad)
    linear.bias = layer.bias
    return linear.train(layer.training)


def as_conv1d(linear: nn.Linear) -> Conv1D:
    """The Conv1D that GPT-2 has where another model has this nn.Linear."""
    with torch.device("meta"):
        conv = Conv1D(linear.out_features, linear.in_features)
    conv.weight = nn.Parameter(linear.weight.detach().T.contiguous(), requires_grad=linear.weight.requires_grad)
    conv.bias = linear.bias
    return conv.train(linear.training)
