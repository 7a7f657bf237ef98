import logging

import datasets
import pytest
import torch
from transformers import TrainingArguments, default_data_collator

from softlms.budget import Budget, count_parameters
from softlms.layers import kept_parameters
from softlms.surgery import decompose, deploy, ranks, soft_layers
from softlms.training import BudgetNotMet, DistillingTrainer, SoftTrainer


@pytest.fixture
def rows():
    """48 sentences of differing length whose first token tells the label."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(5, 200, (4 + i % 9,), generator=generator).tolist() for i in range(48)]
    labels = [int(row[0] > 100) for row in ids]
    return datasets.Dataset.from_dict(
        {
            "input_ids": ids,
            "attention_mask": [[1] * len(row) for row in ids],
            "labels": labels,
            "length": [len(row) for row in ids],
        }
    )


def collate(features):
    width = max(len(row["input_ids"]) for row in features)
    for row in features:
        for key in ("input_ids", "attention_mask"):
            row[key] = row[key] + [0] * (width - len(row[key]))
    return default_data_collator(features)


def trainer(model, rows, folder, *, steps=24, keep=0.5, count="linear", **options):
    arguments = {"save_strategy": "no", **options.pop("arguments", {})}
    args = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        logging_steps=1,
        train_sampling_strategy="group_by_length",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **arguments,
    )
    options = {"alpha_learning_rate": 0.3} | options
    return SoftTrainer(
        model,
        keep=keep,
        count=count,
        args=args,
        train_dataset=rows,
        data_collator=collate,
        **options,
    )


def test_training_meets_the_budget_exactly_then_recovers(tiny_bert, rows, tmp_path):
    model = decompose(tiny_bert())
    run = trainer(model, rows, tmp_path, steps=40)
    run.train()
    frozen_at = run.schedule.frozen_at
    assert 0 < frozen_at < 40
    assert run.kept_weights() <= run.limit
    for name, shape in run.shapes.items():
        rank = ranks(model)[name]
        more = kept_parameters(*shape, rank + 1) - kept_parameters(*shape, rank) if rank < min(shape) else run.limit
        assert run.kept_weights() + more > run.limit
    kept = [entry["kept_linear"] for entry in run.state.log_history if "kept_linear" in entry]
    assert kept[0] > kept[frozen_at] and len(set(kept[frozen_at:])) == 1  # falls, then stands still


def test_alpha_has_its_own_group_and_is_frozen_for_good(tiny_bert, rows, tmp_path):
    model = decompose(tiny_bert())
    run = trainer(model, rows, tmp_path, arguments={"weight_decay": 0.1})
    run.create_optimizer()
    *weights, alphas = run.optimizer.param_groups
    assert alphas["params"] == run.alphas and alphas["lr"] == 0.3 and alphas["weight_decay"] == 0
    assert {group["lr"] for group in weights} == {1e-3}
    held = [id(p) for group in weights for p in group["params"]]
    assert len(held) == len(set(held)) == len(list(model.parameters())) - len(run.alphas)
    run.optimizer = None

    run.train()
    assert all(not alpha.requires_grad for alpha in run.alphas)
    held = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert not held & {id(alpha) for alpha in run.alphas}
    means = [entry["alpha_mean"] for entry in run.state.log_history if "alpha_mean" in entry]
    assert len(set(means[run.schedule.frozen_at :])) == 1


def test_rates_while_compressing_are_constant_then_follow_the_arguments(tiny_bert, rows, tmp_path):
    model = decompose(tiny_bert())
    run = trainer(model, rows, tmp_path, steps=30, arguments={"warmup_steps": 0.0})
    run.train()
    rates = [entry["learning_rate"] for entry in run.state.log_history if "learning_rate" in entry]
    frozen_at = run.schedule.frozen_at
    assert rates[: frozen_at - 1] == [1e-3] * (frozen_at - 1)
    recovery = rates[frozen_at:]
    assert recovery[0] > 0.9e-3 and recovery == sorted(recovery, reverse=True) and recovery[-1] < 1e-3 / 10


@pytest.mark.parametrize("loss", ["linear", "adaptive"])
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("weigh_by_size", [False, True])
def test_every_option_reaches_the_budget(tiny_bert, rows, tmp_path, loss, relative, weigh_by_size):
    model = decompose(tiny_bert(), relative=relative)
    rate = 0.1 if relative else 0.3
    options = {"compression_loss": loss, "weigh_by_size": weigh_by_size, "alpha_learning_rate": rate}
    run = trainer(model, rows, tmp_path, steps=60, **options)
    run.train()
    assert run.schedule.frozen_at is not None


def test_total_budget_counts_the_whole_model(tiny_bert, rows, tmp_path):
    model = decompose(tiny_bert())
    run = trainer(model, rows, tmp_path, keep=0.8, count="total", steps=40)
    run.train()
    counted = count_parameters(deploy(model))
    assert 0.78 < counted.kept("total") <= 0.8


@pytest.mark.parametrize("stop_at", [3, 9, 13, 20])
def test_resumed_run_equals_uninterrupted(tiny_bert, rows, tmp_path, stop_at):
    """Before the budget is met, and after: same phase, alphas, optimizer state, and the same numbers at the end."""
    arguments = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": None}
    whole = trainer(decompose(tiny_bert()), rows, tmp_path / "whole", arguments=arguments)
    whole.train()

    torch.manual_seed(1)  # another process has other random numbers
    model = decompose(tiny_bert())
    resumed = trainer(model, rows, tmp_path / "resumed", arguments=arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{stop_at}"))

    assert resumed.schedule.frozen_at == whole.schedule.frozen_at
    expected = whole.model.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    losses = [{e["step"]: e["loss"] for e in run.state.log_history if "loss" in e} for run in (whole, resumed)]
    assert losses[0] == losses[1]


def test_unmet_budget_is_an_error_that_says_what_to_do(tiny_bert, rows, tmp_path):
    run = trainer(decompose(tiny_bert()), rows, tmp_path, steps=3, alpha_learning_rate=1e-6)
    with pytest.raises(BudgetNotMet, match=r"After 3 steps .* raise gamma"):
        run.train()


def test_stall_is_warned_about(tiny_bert, rows, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("softlms.training.STALL_STEPS", 5)
    run = trainer(decompose(tiny_bert()), rows, tmp_path, steps=8, alpha_learning_rate=1e-6)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with pytest.raises(BudgetNotMet):
        run.train()
    assert "stayed at 1.000 for 5 steps" in caplog.text


def test_gradient_accumulation_scales_the_push_once(tiny_bert, rows, tmp_path):
    """One batch of 8 and two accumulated batches of 4 give alpha the same gradient."""
    gradients = []
    for batch, accumulate in ((8, 1), (4, 2)):
        torch.manual_seed(0)
        model = decompose(tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
        run = trainer(model, rows, tmp_path, arguments={"gradient_accumulation_steps": accumulate})
        run.current_gradient_accumulation_steps = accumulate
        batches = [collate(list(rows.select(range(i, i + batch)))) for i in range(0, 8, batch)]
        for inputs in batches:
            inputs.pop("length")
            run.create_optimizer()
            run.training_step(model, inputs, num_items_in_batch=None)
        gradients.append(torch.stack([alpha.grad for alpha in run.alphas]))
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)


def test_distillation_pulls_towards_the_teacher(tiny_bert, rows, tmp_path):
    taught = rows.add_column("teacher_logits", [[3.0, -3.0]] * len(rows))
    args = TrainingArguments(
        str(tmp_path), max_steps=30, learning_rate=1e-3, per_device_train_batch_size=8, use_cpu=True, report_to=[],
        disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    model = tiny_bert()
    DistillingTrainer(model, distillation=1.0, args=args, train_dataset=taught, data_collator=collate).train()
    with torch.no_grad():
        predicted = model.eval()(torch.randint(5, 200, (20, 8))).logits.argmax(-1)
    assert (predicted == 0).float().mean() > 0.9


def test_wrong_settings_fail_before_any_work(tiny_bert, rows, tmp_path):
    with pytest.raises(ValueError, match="call softlms.decompose"):
        trainer(tiny_bert(), rows, tmp_path)
    model = decompose(tiny_bert())
    for options, message in (
        ({"keep": 0}, "keep is the share"),
        ({"keep": 1.5}, "keep is the share"),
        ({"count": "most"}, "count must be one of"),
        ({"keep": 0.01}, "cannot be met"),
        ({"gamma": 0}, "gamma must be positive"),
        ({"alpha_learning_rate": -1}, "alpha_learning_rate must be positive"),
        ({"compression_loss": "quadratic"}, "compression_loss must be one of"),
        ({"distillation": 2}, "distillation is a share"),
        ({"distillation": 0.5}, "teacher_logits"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer(model, rows, tmp_path, **options)
    assert all(layer.rank > 1 for layer in soft_layers(model).values())


def test_budget_errors_name_what_is_possible(tiny_bert, rows, tmp_path):
    model = decompose(tiny_bert(vocab_size=20_000))
    with pytest.raises(ValueError, match="choose count='linear'"):
        trainer(model, rows, tmp_path, keep=0.5, count="total")


def test_limit_agrees_with_the_budget(tiny_bert, rows, tmp_path):
    model = tiny_bert()
    counted = count_parameters(model)
    run = trainer(decompose(model), rows, tmp_path, keep=0.8, count="total")
    assert run.limit + counted.rest == int(0.8 * counted.total) or run.limit == int(0.8 * counted.total) - counted.rest
    assert Budget(0.8, "total").limit(run.shapes, counted.rest) == run.limit


def test_bfloat16_autocast_trains(tiny_bert, rows, tmp_path):
    run = trainer(decompose(tiny_bert()), rows, tmp_path, steps=40, arguments={"bf16": True})
    run.train()
    assert all(parameter.isfinite().all() for parameter in run.model.parameters())
