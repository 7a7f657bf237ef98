import copy

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, DataCollatorWithPadding, TrainingArguments, default_data_collator

from softlms.architectures import find_targets
from softlms.budget import BudgetNotMet, count_parameters
from softlms.data.encoders import find_encoder
from softlms.data.text import blocks
from softlms.experiments.language_models import FAMILIES, SmallModel
from softlms.lowrank.factorization import factorize
from softlms.lowrank.masks import MaskedLinear, MaskTrainer
from softlms.surgery import ranks, truncate


def trainer(model, factors, folder, steps=60, data=None, collator=None, **options):
    data = data or Dataset.from_dict(
        {"input_ids": torch.randint(5, 200, (16, 9)).tolist(), "attention_mask": [[1] * 9] * 16, "labels": [0, 1] * 8}
    )
    args = TrainingArguments(
        str(folder), max_steps=steps, learning_rate=0.05, lr_scheduler_type="constant", use_cpu=True, report_to=[],
        disable_tqdm=True, save_strategy="no", per_device_train_batch_size=8, logging_strategy="no",
    )  # fmt: skip
    collator = collator or DataCollatorWithPadding(find_encoder("minilm").tokenizer())
    return MaskTrainer(
        model, factors, keep=0.5, count="linear", args=args, train_dataset=data, data_collator=collator, **options
    )


def test_open_masks_change_nothing_and_closed_ones_cut(tiny_bert, tokens):
    model = tiny_bert()
    name = "bert.encoder.layer.0.output.dense"
    factors, linear, x = factorize(model)[name], model.get_submodule(name), torch.randn(3, 5, 64)
    masked = MaskedLinear(factors, linear.bias)
    torch.testing.assert_close(masked(x), linear(x), rtol=0, atol=1e-5)
    assert [n for n, _ in masked.named_parameters()] == ["score"] and masked.rank == 32
    with torch.no_grad():
        masked.score[4:] = -0.5
        truncated = truncate(copy.deepcopy(model), {t.name: 4 for t in find_targets(model)}).get_submodule(name)
    torch.testing.assert_close(masked(x), truncated(x), rtol=0, atol=1e-5)
    masked(x).square().sum().backward()
    assert (masked.score.grad != 0).all()  # straight through: closed gates hear from the loss too


def test_masks_find_ranks_that_fill_the_budget(tiny_bert, tmp_path):
    model = tiny_bert()
    dense, factors = copy.deepcopy(model), factorize(model)
    search = trainer(model, factors, tmp_path)
    search.train()
    assert 0 < search.state.global_step < 60  # it stops when the budget is met
    open_gates = {name: layer.rank for name, layer in search.masks.items()}
    assert count_parameters(model) == count_parameters(truncate(copy.deepcopy(dense), open_gates))
    assert ranks(model) == open_gates
    kept = count_parameters(truncate(copy.deepcopy(dense), search.ranks))
    assert 0.49 < kept.kept("linear") <= 0.5
    assert len(set(search.ranks.values())) > 2  # the masks have learned something: no uniform ranks
    for name, layer in search.masks.items():
        assert torch.equal(layer.left, factors[name].U * factors[name].sigma)
    assert all(
        torch.equal(a, b) for a, b in zip(model.classifier.parameters(), dense.classifier.parameters(), strict=True)
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_masks_on_language_models(family, tmp_path):
    model = AutoModelForCausalLM.from_config(SmallModel(family, hidden=64, layers=2, vocabulary=300).config).eval()
    dense, factors = copy.deepcopy(model), factorize(model)
    data = blocks(torch.randint(300, (144,)).numpy(), 9)
    search = trainer(model, factors, tmp_path, data=data, collator=default_data_collator)
    with torch.no_grad():
        torch.testing.assert_close(model(data["input_ids"][:2]).logits, dense(data["input_ids"][:2]).logits)
    search.train()
    assert 0.48 < count_parameters(truncate(dense, search.ranks)).kept("linear") <= 0.5
    for layer in search.masks.values():
        weight = layer.left[:, layer.score > 0] @ layer.V[:, layer.score > 0].T
        torch.testing.assert_close(layer.weight, weight)


def test_masks_are_where_the_trainer_moves_the_model(tmp_path, monkeypatch):
    """No second device here: the move is to another dtype, and a Conv1D is what was left behind."""
    monkeypatch.setattr(MaskTrainer, "_move_model_to_device", lambda self, model, device: model.double())
    model = AutoModelForCausalLM.from_config(SmallModel("gpt2", hidden=64, layers=1, vocabulary=300).config)
    data = blocks(torch.randint(300, (144,)).numpy(), 9)
    search = trainer(model, factorize(model), tmp_path, data=data, collator=default_data_collator)
    for mask in search.masks.values():
        assert {values.dtype for values in mask.state_dict().values()} == {torch.float64}
    assert model(data["input_ids"][:2]).logits.dtype == torch.float64


def test_masks_that_run_out_of_steps_and_wrong_input(tiny_bert, tmp_path):
    model = tiny_bert()
    factors = factorize(model)
    with pytest.raises(BudgetNotMet, match=r"After 3 steps .* raise l1 "):
        trainer(copy.deepcopy(model), factors, tmp_path, steps=3).train()
    with pytest.raises(ValueError, match="two positive finite weights, the second larger"):
        trainer(model, factors, tmp_path, l1=(1.0, 0.1))
    with pytest.raises(ValueError, match="two positive finite weights"):
        trainer(model, factors, tmp_path, l1=(1e-6, float("inf")))
    with pytest.raises(ValueError, match="layers that the model lacks"):
        trainer(model, factors | {"nowhere": next(iter(factors.values()))}, tmp_path)
    assert find_targets(model)[0].module.weight.requires_grad
    with pytest.raises(ValueError, match=r"factors of bert\.encoder\.layer\.0\.attention\.self\.query do not fit"):
        trainer(model, dict(zip(factors, reversed(factors.values()), strict=True)), tmp_path)
    with pytest.raises(ValueError, match="teacher_logits"):
        trainer(model, factors, tmp_path, distillation=0.5)
    assert all(p.requires_grad for p in model.parameters())
    assert not any(isinstance(module, MaskedLinear) for module in model.modules())


def test_evaluation_sees_the_tasks_loss_alone(tiny_bert, tmp_path):
    search = trainer(tiny_bert(), factorize(tiny_bert()), tmp_path, l1=(10.0, 100.0))
    assert search.evaluate(search.train_dataset)["eval_loss"] < 10
