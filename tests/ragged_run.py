"""The first gradient of a training on rows of differing length, started by torchrun in test_distributed.py."""

import sys

import datasets
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments

import softlms


class Save(TrainerCallback):
    def __init__(self, file):
        self.file = file

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if args.process_index == 0:
            gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            torch.save({name.removeprefix("module."): gradient for name, gradient in gradients.items()}, self.file)


def collate(rows):
    width = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in rows])
    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def main(file: str, batch: int, accumulate: int) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, vocab_size=200,
        initializer_range=0.2,
    )  # fmt: skip
    model = softlms.decompose(LlamaForCausalLM(config))
    lengths = (4, 30, 6, 28, 5, 25, 7, 31)
    rows = datasets.Dataset.from_dict({"input_ids": [torch.randint(5, 200, (n,)).tolist() for n in lengths]})
    args = TrainingArguments(
        f"{file}.out", max_steps=1, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate,
        max_grad_norm=0, use_cpu=True, save_strategy="no", report_to=[], disable_tqdm=True, ddp_backend="gloo",
        train_sampling_strategy="sequential",
    )  # fmt: skip
    softlms.SoftTrainer(
        model, keep=0.5, gamma=0.1, args=args, train_dataset=rows, data_collator=collate, callbacks=[Save(file)]
    ).train()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
