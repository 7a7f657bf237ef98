"""`SoftTrainer` under FSDP2: factors in shards, and what chooses ranks whole on every process.

A threshold is a scalar, which ``fully_shard`` does not take, and singular values in half precision, as FSDP computes,
would let rounding decide which components live. So both stay out of it (`keep_whole`), and processes agree on the ranks
without a word: they start from the same tensors (`start_alike`) and step by the same gradients (`average_gradients`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, is_torch_version
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

__all__ = [
    "average_gradients",
    "check_gathered",
    "check_parallel",
    "is_sharded",
    "keep_whole",
    "split_groups",
    "start_alike",
]


def check_parallel(state: Any, *, fsdp: bool) -> None:
    """Refuse ways of running in parallel that `SoftTrainer` cannot.

    Parameters
    ----------
    state : accelerate.state.AcceleratorState
        With the plugins in use.
    fsdp : bool
        Whether the training arguments ask for FSDP.

    Raises
    ------
    ValueError
        Names the setting, and what to use instead.
    """
    if getattr(state, "deepspeed_plugin", None) is not None:
        raise ValueError("SoftTrainer does not run under DeepSpeed: use one device, DDP, or FSDP2 (fsdp=True).")
    plugin = getattr(state, "fsdp_plugin", None)
    if plugin is None:
        if fsdp:
            raise ValueError("accelerate shards on GPUs alone, and would run DDP here: leave fsdp out.")
        return
    from torch.distributed.fsdp import CPUOffloadPolicy, StateDictType

    kind = plugin.state_dict_type
    refused = {
        "version 1": (plugin.fsdp_version != 2, "set 'version': 2"),
        "torch before 2.7": (is_torch_version("<", "2.7.0"), "install a newer one, which can leave parameters whole"),
        # the next two: accelerate and torch load checkpoints only if every parameter is in shards, on one device
        "cpu_ram_efficient_loading": (plugin.cpu_ram_efficient_loading, "load the model in each process"),
        "cpu_offload": (
            isinstance(plugin.cpu_offload, CPUOffloadPolicy),
            "save memory by gradient_checkpointing=True, or by more GPUs",
        ),
        "ignored_modules": (isinstance(plugin.ignored_modules, str), "nothing would average their gradients"),
        # it puts modules around others, which no saved folder has
        "activation_checkpointing": (plugin.activation_checkpointing, "use gradient_checkpointing=True, an argument"),
        # trainer.save_model would write nothing
        f"state_dict_type {kind.name}": (kind != StateDictType.FULL_STATE_DICT, "use FULL_STATE_DICT"),
    }
    for name, (wrong, instead) in refused.items():
        if wrong:
            raise ValueError(f"SoftTrainer does not run under FSDP with {name}: {instead}.")


def keep_whole(accelerator: Accelerator, parts: Iterable[nn.Module]) -> nn.ModuleList:
    """Keep modules on every process as they are when the model is sharded; they move to its device.

    Parameters
    ----------
    accelerator : Accelerator
        With an FSDP plugin, which has not prepared the model yet.
    parts : iterable of nn.Module
        Their parameters have to be averaged by `average_gradients`.
    """
    whole = nn.ModuleList(parts).to(accelerator.device)
    accelerator.state.fsdp_plugin.ignored_modules = [whole]
    return whole


@torch.no_grad()
def start_alike(accelerator: Accelerator, model: nn.Module) -> None:
    """Copy every tensor of process 0 to the others, as DDP does.

    FSDP takes a shard from what each process has, and the factors of two processes can differ in their signs.
    """
    for values in (*model.parameters(), *model.buffers()):
        if not is_sharded(values):
            values.copy_(broadcast(values.detach().to(accelerator.device).contiguous()))


def average_gradients(accelerator: Accelerator, whole: nn.Module) -> None:
    """Average the gradients over the processes, in place, as FSDP does with those of shards."""
    gradients = [parameter.grad for parameter in whole.parameters() if parameter.grad is not None]
    if gradients:  # one message for all
        mean = accelerator.reduce(parameters_to_vector(gradients), "mean")
        vector_to_parameters(mean, gradients)


def split_groups(optimizer: torch.optim.Optimizer, whole: nn.Module) -> None:
    """Move whole parameters into groups of their own: an optimizer's kernels take either shards or whole tensors."""
    kept = {id(parameter) for parameter in whole.parameters()}
    for group in list(optimizer.param_groups):
        apart = [parameter for parameter in group["params"] if id(parameter) in kept]
        if 0 < len(apart) < len(group["params"]):
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in kept]
            optimizer.add_param_group({**group, "params": apart})


def is_sharded(values: Tensor) -> bool:
    """Whether a tensor is a shard of FSDP2 or the like, with the shape of the whole."""
    return hasattr(values, "full_tensor")


def check_gathered(model: nn.Module, remedy: str) -> None:
    """Raise ValueError with the remedy if FSDP holds the model, also where it has all shards at hand just now."""
    if any(getattr(module, "_is_fsdp_managed_module", False) for module in model.modules()):
        raise ValueError(f"The model is in shards, as FSDP left it: {remedy}.")
