"""One training of `SoftTrainer` on a tiny Llama, whole or under FSDP2, started by torchrun in test_distributed.py."""

import json
import os
import sys
from pathlib import Path

import datasets
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import distributed
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments, default_data_collator

import softlms
from softlms.surgery import soft_layers


def trainer(folder, batch, *, shard, **options):
    """24 steps of 12 rows each, if `batch`, processes and accumulated batches make 12."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=200,
        initializer_range=0.2,
    )  # fmt: skip
    model = softlms.decompose(LlamaForCausalLM(config))
    if int(os.environ.get("RANK", 0)):  # on another processor an SVD may have other signs
        for layer in soft_layers(model).values():
            layer.U.data.neg_()
            layer.V.data.neg_()
    ids = torch.randint(5, 200, (72, 12)).tolist()
    rows = datasets.Dataset.from_dict({"input_ids": ids, "labels": ids})
    args = TrainingArguments(
        str(folder), max_steps=24, per_device_train_batch_size=batch, per_device_eval_batch_size=batch,
        learning_rate=1e-3, logging_steps=1, use_cpu=True, report_to=[], disable_tqdm=True,
        train_sampling_strategy="sequential", ddp_backend="gloo" if shard else None,
        **{"save_strategy": "no"} | options,
    )  # fmt: skip
    if shard:
        pass_for_gpus(args)
    return softlms.SoftTrainer(
        model, keep=0.5, alpha_learning_rate=0.3, deadline=0.5, args=args, train_dataset=rows,
        eval_dataset=rows.select(range(12)), data_collator=default_data_collator,
    )  # fmt: skip


def pass_for_gpus(args):
    """Ask for FSDP, and tell accelerate, which shards on GPUs alone, that these processes have some."""
    if not distributed.is_initialized():  # a single process
        distributed.init_process_group("gloo")
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    args.fsdp, args.fsdp_config = True, {}
    args.fsdp_plugin_args = args._process_fsdp_args()


def result(run):
    """What two trainings are compared by."""
    return {
        "frozen_at": run.schedule.frozen_at,
        "ranks": softlms.ranks(run.model),
        "alphas": [alpha.item() for alpha in run.alphas],
        "sigma": {name: layer.sigma.tolist() for name, layer in run.soft_layers.items()},
        "losses": [entry["loss"] for entry in run.state.log_history if "loss" in entry],
        "eval_loss": run.evaluate()["eval_loss"],
    }


def refusal(act, *arguments):
    try:
        act(*arguments)
    except ValueError as error:
        return str(error)


def main(folder: str, batch: int, options: str) -> None:
    settings = json.loads(options)
    resumed = settings.pop("resumed", None)
    run = trainer(folder, batch, shard=True, **settings)
    run.train(resume_from_checkpoint=resumed)
    model = run.model
    found = {
        "processes": run.args.world_size,
        "whole": sorted(name for name, values in model.named_parameters() if not hasattr(values, "full_tensor")),
        **result(run),
        "refused": [refusal(softlms.deploy, model), refusal(model.save_pretrained, folder)],
    }
    run.save_model(str(Path(folder, "saved")))
    Path(folder, f"result-{os.environ['RANK']}.json").write_text(json.dumps(found), "utf-8")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
