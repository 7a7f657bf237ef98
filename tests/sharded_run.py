"""Three steps of a Llama under FSDP2, by torchrun; saved and loaded: prints its distance to training in one piece."""

import copy
import sys

import torch
from torch import distributed
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import softlms
from softlms.architectures import find_targets


def main(form: str, folder: str = "") -> None:
    distributed.init_process_group("gloo")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=200, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    if form == "soft":
        softlms.decompose(model)
    else:
        softlms.truncate(model, {target.name: 8 for target in find_targets(model)})
    whole = copy.deepcopy(model)
    mesh = distributed.init_device_mesh("cpu", (2,))
    for layer in (*model.model.layers, model):
        fully_shard(layer, mesh=mesh)
    rows = torch.randint(0, 200, (4, 16))
    for network, own in ((model, rows[2 * distributed.get_rank() :][:2]), (whole, rows)):
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
        for _ in range(3):
            network(input_ids=own, labels=own).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    sharded = {name: values.full_tensor() for name, values in model.named_parameters()}
    distance = max((sharded[name] - values).abs().max().item() for name, values in whole.named_parameters())
    if folder:
        model.save_pretrained(folder, is_main_process=distributed.get_rank() == 0, state_dict=sharded)
        distributed.barrier()
        again = LlamaForCausalLM.from_pretrained(folder)
        assert all(torch.equal(values, sharded[name]) for name, values in again.named_parameters())
    if distributed.get_rank() == 0:
        print(f"distance {distance:.1e}")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
