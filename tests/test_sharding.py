"""What is settled before processes start; two processes at work are in test_distributed.py."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, StateDictType

from softlms.sharding import check_parallel, split_groups


def plugin(**changes):
    made = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="FULL_STATE_DICT")
    for name, value in changes.items():
        setattr(made, name, value)
    return SimpleNamespace(fsdp_plugin=made, deepspeed_plugin=None)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"fsdp_version": 1}, "version 1: set 'version': 2"),
        ({"cpu_ram_efficient_loading": True}, "cpu_ram_efficient_loading: load the model in each process"),
        ({"cpu_offload": CPUOffloadPolicy()}, "cpu_offload: save memory by gradient_checkpointing=True"),
        ({"ignored_modules": "lm_head"}, "ignored_modules: nothing would average"),
        ({"activation_checkpointing": True}, "activation_checkpointing: use gradient_checkpointing=True"),
        (
            {"state_dict_type": StateDictType.SHARDED_STATE_DICT},
            "state_dict_type SHARDED_STATE_DICT: use FULL_STATE_DICT",
        ),
    ],
)
def test_settings_of_fsdp_that_cannot_work_are_refused_by_name(changes, named):
    check_parallel(plugin(), fsdp=True)
    with pytest.raises(ValueError, match=f"SoftTrainer does not run under FSDP with {named}"):
        check_parallel(plugin(**changes), fsdp=True)


def test_deepspeed_and_fsdp_that_would_silently_be_ddp_are_refused():
    with pytest.raises(ValueError, match=r"does not run under DeepSpeed: use one device, DDP, or FSDP2"):
        check_parallel(SimpleNamespace(deepspeed_plugin=object()), fsdp=False)
    with pytest.raises(ValueError, match="accelerate shards on GPUs alone, and would run DDP here: leave fsdp out"):
        check_parallel(SimpleNamespace(deepspeed_plugin=None), fsdp=True)
    check_parallel(SimpleNamespace(deepspeed_plugin=None), fsdp=False)


def test_whole_parameters_get_groups_of_their_own_with_the_same_settings():
    whole, sharded = nn.ParameterList(torch.ones(3) for _ in range(2)), nn.Linear(2, 2)
    groups = [
        {"params": [whole[0], sharded.weight], "weight_decay": 0.1},
        {"params": [sharded.bias], "weight_decay": 0.0},
        {"params": [whole[1]], "weight_decay": 0.2},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.5)
    for _ in range(2):  # the second time there is nothing to split
        split_groups(optimizer, whole)
        held = [
            ([id(p) for p in group["params"]], group["weight_decay"], group["lr"]) for group in optimizer.param_groups
        ]
        assert held == [
            ([id(sharded.weight)], 0.1, 0.5),
            ([id(sharded.bias)], 0.0, 0.5),
            ([id(whole[1])], 0.2, 0.5),
            ([id(whole[0])], 0.1, 0.5),
        ]
