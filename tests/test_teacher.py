"""Distillation from a teacher that computes its logits for each batch."""

import copy
import dataclasses

import datasets
import pytest
import torch
from test_training import collate, one_step
from transformers import TrainerCallback, default_data_collator

from softlms.data.inputs import prepared
from softlms.data.text import blocks
from softlms.distillation import DistillingTrainer
from softlms.evaluation.metrics import add_teacher_logits
from softlms.surgery import decompose
from softlms.training import SoftTrainer


class Gradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.seen = [p.grad.clone() for p in model.parameters() if p.grad is not None]


def gradients(trainer_class, model, rows, args, collator=default_data_collator, **options):
    """Gradients of the first step, before it is taken."""
    seen = Gradients()
    if trainer_class is SoftTrainer:
        model, options = decompose(model), {"keep": 0.5, "gamma": 0.1} | options
    trainer_class(model, args=args, train_dataset=rows, data_collator=collator, callbacks=[seen], **options).train()
    return seen.seen


@pytest.fixture
def pair(tiny_llama):
    """A model and another one to teach it, by number: each call makes them anew."""

    def build(**changes):
        torch.manual_seed(0)
        return tiny_llama(**changes), tiny_llama(**changes)

    return build


@pytest.fixture
def ragged():
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(5, 120, (n,), generator=generator).tolist() for n in (4, 30, 6, 28, 5, 25, 7, 31)]
    return datasets.Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]})


def collate_text(features):
    batch = collate(features)
    return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def test_logits_of_each_batch_teach_like_stored_ones(pair, tmp_path):
    rows = blocks(torch.randint(200, (8 * 9,)).numpy(), 9)
    found = []
    for stored in (True, False):
        model, teacher = pair()
        taught = add_teacher_logits(rows, teacher, default_data_collator) if stored else rows
        options = {"distillation": 0.7} | ({} if stored else {"teacher": teacher})
        found.append(gradients(DistillingTrainer, model, taught, one_step(tmp_path, 8, 1), **options))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_mean_is_over_the_predicted_tokens(pair, ragged, tmp_path, side):
    """No output on padding counts, nor the last of a row; each row is as it is alone."""
    model, teacher = pair()

    def collate_side(features):
        batch = collate_text(features)
        if side == "right":
            return batch
        padding = (batch["attention_mask"] == 0).sum(1).tolist()
        roll = lambda values: torch.stack([row.roll(n) for row, n in zip(values, padding, strict=True)])  # noqa: E731
        return {name: roll(values) for name, values in batch.items()}

    args = one_step(tmp_path, 8, 1)
    run = DistillingTrainer(
        model, args=args, train_dataset=ragged, data_collator=collate_side, distillation=1.0, teacher=teacher
    )
    model.train()
    found = run.compute_loss(model, prepared(model, collate_side(list(ragged))))
    total = 0.0
    for row in ragged["input_ids"]:
        q, p = (of(torch.tensor([row])).logits[0, :-1].log_softmax(-1) for of in (model.eval(), teacher))
        total += (p.exp() * (p - q)).sum()
    assert found.item() == pytest.approx(total.item() / sum(len(row) - 1 for row in ragged["input_ids"]), rel=1e-4)


@pytest.mark.parametrize("trainer_class", [SoftTrainer, DistillingTrainer])
def test_accumulated_batches_are_taught_like_one(pair, ragged, tmp_path, trainer_class):
    found = []
    for batch, accumulate in ((8, 1), (2, 4), (1, 8)):
        model, teacher = pair()
        args = one_step(tmp_path, batch, accumulate)
        options = {"distillation": 0.7, "teacher": teacher}
        found.append(gradients(trainer_class, model, ragged, args, collate_text, **options))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("bf16", [False, True])
def test_a_teacher_is_used_and_left_alone(pair, ragged, tmp_path, bf16):
    """Without dropout, in the precision of the training; afterwards it is as it was."""
    model, teacher = pair(attention_dropout=0.5)
    teacher.train().lm_head.weight.requires_grad_(False)
    before, dtypes = copy.deepcopy(teacher), []
    teacher.register_forward_hook(lambda module, _, outputs: dtypes.append((outputs.logits.dtype, module.training)))
    args = dataclasses.replace(one_step(tmp_path, 8, 1), bf16=bf16)
    gradients(DistillingTrainer, model, ragged, args, collate_text, distillation=0.7, teacher=teacher)
    assert dtypes == [(torch.bfloat16 if bf16 else torch.float32, False)]
    assert all(module.training for module in teacher.modules())
    for a, b in zip(teacher.parameters(), before.parameters(), strict=True):
        assert torch.equal(a, b) and a.requires_grad == b.requires_grad and a.grad is None


def test_a_classifier_may_have_one_too(tiny_bert, rows, tmp_path):
    options = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    teacher, found = tiny_bert(**options), []
    for stored in (True, False):
        taught = add_teacher_logits(rows, teacher, collate) if stored else rows
        given = {} if stored else {"teacher": teacher}
        args = one_step(tmp_path, 8, 1)
        torch.manual_seed(1)
        model = tiny_bert(**options)
        found.append(gradients(DistillingTrainer, model, taught, args, collate, distillation=0.5, **given))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_one_teacher_that_is_another_model(pair, ragged, tmp_path):
    model, teacher = pair()
    stored = ragged.add_column("teacher_logits", [[0.0]] * 8)
    for rows, options, message in (
        (ragged, {"distillation": 0.5}, "needs a column 'teacher_logits' .*, or a teacher"),
        (ragged, {"teacher": teacher}, "A teacher is given, and distillation=0: leave one"),
        (stored, {"distillation": 0.5, "teacher": teacher}, "and a column 'teacher_logits': leave one"),
        (ragged, {"distillation": 0.5, "teacher": model}, r"shares weights .*: give copy.deepcopy\(model\)"),
    ):
        with pytest.raises(ValueError, match=message):
            DistillingTrainer(model, args=one_step(tmp_path, 8, 1), train_dataset=rows, **options)
