"""One training of `SoftTrainer`, started by torchrun in test_distributed.py: prints its ranks and losses as JSON."""

import json
import os
import sys
from pathlib import Path

import datasets
import torch
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments, default_data_collator

import softlms
from softlms.measure import FlopPrice


def main(folder: str, batch: int, count: str) -> None:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=200,
        initializer_range=0.2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    costs = None
    if count == "latency":  # each process has measured other times
        own = int(os.environ["RANK"])
        shapes = {target.name: target.shape for target in softlms.find_targets(model)}
        prices = {name: FlopPrice(10 + 3 * own, *shape) for name, shape in shapes.items()}
        costs = softlms.Costs("latency", shapes, prices, 1e5 * own)
    model = softlms.decompose(model)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 200, (64, 12), generator=generator).tolist()
    rows = datasets.Dataset.from_dict({"input_ids": ids, "labels": [int(row[0] > 100) for row in ids]})
    args = TrainingArguments(
        folder, max_steps=24, per_device_train_batch_size=batch, learning_rate=1e-3, logging_steps=1, use_cpu=True,
        save_strategy="no", report_to=[], disable_tqdm=True, train_sampling_strategy="sequential",
        ddp_backend="gloo",
    )  # fmt: skip
    trainer = softlms.SoftTrainer(
        model, keep=0.5, count=count, costs=costs, alpha_learning_rate=0.1, deadline=0.5, args=args,
        train_dataset=rows, data_collator=default_data_collator,
    )  # fmt: skip
    trainer.train()
    result = {
        "processes": args.world_size,
        "frozen_at": trainer.schedule.frozen_at,
        "ranks": softlms.ranks(model),
        "alphas": [alpha.item() for alpha in trainer.alphas],
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "sigma": {name: layer.sigma.tolist() for name, layer in trainer.soft_layers.items()},
    }
    (Path(folder) / f"result-{args.process_index}.json").write_text(json.dumps(result), "utf-8")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
