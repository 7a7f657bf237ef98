"""Batches in parts weigh their rows as one batch does."""

import inspect

import datasets
import pytest
import torch
from test_training import collate, one_step, trainer
from transformers import (
    Trainer,
    TrainerCallback,
)

from softlms.distillation import DistillingTrainer
from softlms.surgery import decompose
from softlms.training import SoftTrainer


def test_gradient_accumulation_is_one_batch_in_parts(tiny_bert, rows, tmp_path):
    """A batch of 8, and 2 x 4 and 4 x 2 accumulated: the same gradients of task, distillation and alpha."""

    class Gradients(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            self.seen = [p.grad.clone() for p in (model.classifier.weight, run.alphas[0], run.alphas[7])]

    seen = []
    same_length = rows.select([i for i in range(48) if len(rows[i]["input_ids"]) == 8][:4] * 2)
    taught = same_length.add_column("teacher_logits", [[1.0, -1.0]] * 8)
    for batch, accumulate in ((8, 1), (4, 2), (2, 4)):
        torch.manual_seed(0)
        model = decompose(tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
        arguments = {"gradient_accumulation_steps": accumulate, "max_grad_norm": 0.0}
        recorder = Gradients()
        options = {"distillation": 0.5, "arguments": arguments, "batch": batch, "gamma": 0.1}
        run = trainer(model, taught, tmp_path, steps=1, **options)
        run.add_callback(recorder)  # after the schedule's own, which adds the push
        run.train()
        seen.append(recorder.seen)
    for other in seen[1:]:
        for a, b in zip(seen[0], other, strict=True):
            assert a.abs().max() > 0
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("trainer_class", [SoftTrainer, DistillingTrainer])
def test_accumulated_rows_count_by_their_labels(tiny_llama, tmp_path, trainer_class):
    """Rows of a language model differ in length: 4 x 2 accumulated are 8 x 1, as with transformers' own Trainer."""
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(5, 120, (n,), generator=generator).tolist() for n in (4, 30, 6, 28, 5, 25, 7, 31)]
    rows = datasets.Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]})

    def collate_text(features):
        batch = collate(features)
        return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}

    class Gradient(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            self.seen = model.model.embed_tokens.weight.grad.clone()

    def gradient(build, batch, accumulate, **options):
        seen = Gradient()
        args = one_step(tmp_path, batch, accumulate)
        torch.manual_seed(0)
        model = tiny_llama()
        model = decompose(model) if build is SoftTrainer else model
        build(model, args=args, train_dataset=rows, data_collator=collate_text, callbacks=[seen], **options).train()
        return seen.seen

    options = {"keep": 0.5, "gamma": 0.1} if trainer_class is SoftTrainer else {}
    own = gradient(Trainer, 8, 1)
    for batch, accumulate in ((8, 1), (2, 4), (1, 8)):
        torch.testing.assert_close(gradient(trainer_class, batch, accumulate, **options), own, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("trainer_class", [SoftTrainer, DistillingTrainer])
def test_a_loss_of_the_users_accumulates_like_one_batch(tiny_bert, rows, tmp_path, trainer_class):
    """The form that transformers documents, a sum over the number of items."""

    class Gradient(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            self.seen = model.classifier.weight.grad.clone()

    def loss(outputs, labels, num_items_in_batch=None):
        return torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    def gradient(build, batch, accumulate, **options):
        seen = Gradient()
        args = one_step(tmp_path, batch, accumulate)
        torch.manual_seed(0)
        model = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        model = decompose(model) if build is SoftTrainer else model
        options |= {"train_dataset": rows, "data_collator": collate, "callbacks": [seen], "compute_loss_func": loss}
        build(model, args=args, **options).train()
        return seen.seen

    options = {"keep": 0.5} if trainer_class is SoftTrainer else {}
    own = gradient(Trainer, 8, 1)
    for batch, accumulate in ((8, 1), (2, 4)):
        torch.testing.assert_close(gradient(trainer_class, batch, accumulate, **options), own, rtol=1e-3, atol=1e-6)


def test_a_forward_of_the_users_is_there_after_training(tiny_bert, rows, tmp_path):
    model = decompose(tiny_bert())
    calls, plain = [], model.forward

    def forward(*args, **kwargs):
        calls.append(1)
        return plain(*args, **kwargs)

    model.forward = forward
    model.forward.__signature__ = inspect.signature(plain)
    trainer(model, rows, tmp_path, steps=2, arguments={"bf16": True}).train()
    trained = len(calls)
    model(input_ids=torch.ones(1, 4, dtype=torch.long))
    assert vars(model)["forward"] is forward and trained >= 2 and len(calls) == trained + 1
