"""Modules that replace others: how each describes itself, and how it is put in place."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

import torch
from accelerate.hooks import add_hook_to_module
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Attached", "Replacement", "as_conv1d", "as_linear", "make_linear", "replace", "retie", "stand_in"]


class Replacement(nn.Module):
    """A module in a place where a model's own class creates another one, or none.

    ``save_pretrained`` stores its `form` and `description`. ``from_pretrained`` calls `skeleton`, loads the tensors,
    and calls `restore`. A method lists the classes that it puts into models (`softlms.methods.base.Method`). A tensor
    that several of them share is stored once.

    Attributes
    ----------
    form : str
        Name of the form in a saved model.
    precise : tuple of str
        Tensors loaded in float32 or wider, for any dtype of the model.
    """

    form: ClassVar[str]
    precise: ClassVar[tuple[str, ...]] = ()

    def description(self) -> dict[str, Any]:
        """What `skeleton` needs besides the dense module, in JSON types."""
        return {}

    @classmethod
    @abstractmethod
    def skeleton(cls, dense: nn.Module | None, description: Mapping[str, Any]) -> Self:
        """Build the same modules and shapes on the dense module's device; the values are arbitrary.

        Parameters
        ----------
        dense : nn.Module, optional
            What the model's class creates in this place; parts may be reused. None if it creates nothing.
        description : mapping
            As returned by `description`.
        """

    def restore(self, name: str, description: Mapping[str, Any]) -> None:
        """Restore after loading what no tensor stores, such as what learns; nothing by default.

        Parameters
        ----------
        name : str
            The module's name, for errors.
        description : mapping
            As in `skeleton`.
        """

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # a saved model has an empty tensor in place of the dense weight, see softlms.saving.checkpoint
        own = {f"{prefix}{name}" for name in self.state_dict()}
        for name in [name for name in state_dict if name.startswith(prefix) and name not in own]:
            if not state_dict[name].numel():
                del state_dict[name]
        super()._load_from_state_dict(state_dict, prefix, *args)


class Attached(Replacement):
    """A replacement that another part of the model must know of."""

    @abstractmethod
    def attach(self, model: PreTrainedModel) -> None:
        """Connect the parts: after surgery, and after loading."""


def make_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Create an nn.Linear with copies of a weight, shape (m, n), and a bias, shape (m,)."""
    m, n = weight.shape
    linear = nn.utils.skip_init(nn.Linear, n, m, bias=bias is not None, device=weight.device, dtype=weight.dtype)
    linear.weight.data.copy_(weight)
    if bias is not None:
        linear.bias.data.copy_(bias)
    return linear


N = TypeVar("N", bound=nn.Module)


CHOICES = ("threshold.alpha", "score")  # these choose a rank, and are not part of what the layer computes


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
    """Return `layer` in the mode of the old one, with its weight or factors, and its bias, frozen alike."""
    learns = {False: False, True: False}
    for name, parameter in old.named_parameters():
        if not name.endswith(CHOICES):
            learns[name.endswith("bias")] |= parameter.requires_grad
    for name, parameter in layer.named_parameters():
        if not name.endswith(CHOICES):
            parameter.requires_grad_(learns[name.endswith("bias")])
    return layer.train(old.training)


def replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Replace a layer; mode, frozen parameters and hooks are taken over, and hook handles stay valid."""
    old = model.get_submodule(name)
    stand_in(layer, old)
    for hooks in HOOKS:
        setattr(layer, hooks, getattr(old, hooks))
    if hasattr(old, "_hf_hook"):  # accelerate's hook: moves the input to the layer's device
        add_hook_to_module(layer, old._hf_hook)
    model.set_submodule(name, layer)


def retie(model: PreTrainedModel, shared: Mapping[str, str]) -> None:
    """Tell transformers which tensors are shared now: it ties them by name, at loading and after resizing.

    Parameters
    ----------
    model : PreTrainedModel
    shared : mapping
        Further names of tensors, each with the first name. Ties of tensors that are gone are dropped.
    """
    present = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    known = model.all_tied_weights_keys.items()
    ties = {name: first for name, first in known if {name, first} <= present} | {**shared}
    model._tied_weights_keys, model.all_tied_weights_keys = ties, {**ties}


def as_linear(layer: nn.Linear | Conv1D) -> nn.Linear:
    """GPT-2's Conv1D, which stores its weight as (n, m), as an nn.Linear on the same memory; nn.Linear unchanged."""
    if isinstance(layer, nn.Linear):
        return layer
    with torch.device("meta"):
        linear = nn.Linear(layer.nx, layer.nf)
    linear.weight = nn.Parameter(layer.weight.detach().T, requires_grad=layer.weight.requires_grad)
    linear.bias = layer.bias
    return linear.train(layer.training)


def as_conv1d(linear: nn.Linear) -> Conv1D:
    """The nn.Linear as the equivalent Conv1D of GPT-2."""
    with torch.device("meta"):
        conv = Conv1D(linear.out_features, linear.in_features)
    conv.weight = nn.Parameter(linear.weight.detach().T.contiguous(), requires_grad=linear.weight.requires_grad)
    conv.bias = linear.bias
    return conv.train(linear.training)
