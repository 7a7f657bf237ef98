import copy
import logging

import datasets
import numpy as np
import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from softlms.architectures import find_targets
from softlms.budget import BudgetNotMet, count_parameters
from softlms.distillation import DistillingTrainer
from softlms.layers import kept_parameters
from softlms.surgery import decompose, deploy, ranks, soft_layers
from softlms.training import SoftTrainer


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
        per_device_train_batch_size=options.pop("batch", 8),
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


def one_step(folder, batch, accumulate):
    """Arguments of a single step whose gradients are not clipped."""
    return TrainingArguments(
        str(folder), max_steps=1, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate,
        max_grad_norm=0, save_strategy="no", use_cpu=True, report_to=[], disable_tqdm=True,
    )  # fmt: skip


def test_training_meets_the_budget_exactly_then_recovers(tiny_bert, rows, tmp_path):
    model = decompose(tiny_bert())
    run = trainer(model, rows, tmp_path, steps=40)
    run.train()
    frozen_at = run.schedule.frozen_at
    assert 0 < frozen_at < 40
    assert run.cost() <= run.limit
    for name, shape in run.shapes.items():
        rank = ranks(model)[name]
        more = kept_parameters(*shape, rank + 1) - kept_parameters(*shape, rank) if rank < min(shape) else run.limit
        assert run.cost() + more > run.limit
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
    run = trainer(model, rows, tmp_path, steps=30, deadline=0.5, arguments={"warmup_steps": 0.0})
    run.train()
    rates = [entry["learning_rate"] for entry in run.state.log_history if "learning_rate" in entry]
    frozen_at = run.schedule.frozen_at
    assert rates[: frozen_at - 1] == [1e-3] * (frozen_at - 1)
    recovery = rates[frozen_at:]
    assert recovery[0] > 0.9e-3 and recovery == sorted(recovery, reverse=True) and recovery[-1] < 1e-3 / 10


def test_however_hard_the_push_the_weights_learn_the_same(tiny_bert, rows, tmp_path):
    """The push can grow to hundreds of times the task's gradients, which clipped together with it would vanish."""
    dense, learned, risen, losses = tiny_bert(), {}, {}, {}
    for gamma in (1e-6, 1e6):
        run = trainer(decompose(copy.deepcopy(dense)), rows, tmp_path, steps=1, deadline=1.0, gamma=gamma)
        with pytest.raises(BudgetNotMet):
            run.train()
        alphas = {id(alpha) for alpha in run.alphas}
        learned[gamma] = [parameter for parameter in run.model.parameters() if id(parameter) not in alphas]
        risen[gamma] = run.alphas
        losses[gamma] = run.state.log_history[0]["loss"]
    assert losses[1e-6] == losses[1e6]
    torch.testing.assert_close(learned[1e-6], learned[1e6], rtol=0, atol=0)
    assert risen[1e-6] != risen[1e6] and all(alpha > 0 for alpha in risen[1e6])


def test_gradients_that_overflow_at_first_set_no_push(tiny_bert, rows, tmp_path):
    """As a step in half precision that the scaler then skips; a gamma of NaN would never adapt again."""
    run = trainer(decompose(tiny_bert()), rows, tmp_path)
    for alpha, size in zip(run.alphas, (float("nan"), *[2.0] * len(run.alphas)), strict=False):
        alpha.grad = torch.full_like(alpha, size)
    run.schedule.on_pre_optimizer_step()
    assert run.schedule.gamma == 0 and run.alphas[1].grad == 2
    run.alphas[0].grad.fill_(2)
    run.schedule.on_pre_optimizer_step()
    assert run.schedule.gamma == 2 and run.alphas[1].grad < 2


@pytest.mark.parametrize("gamma", [None, 0.5])
def test_the_push_is_added_once_a_step_until_the_cut(tiny_bert, rows, tmp_path, gamma):
    """Also to a threshold in which the task has no gradient."""

    class Between(TrainerCallback):
        """Sees what the schedule's callback, which comes later, adds."""

        def on_pre_optimizer_step(self, *args, **kwargs):
            run.alphas[0].grad = None
            self.before = [alpha.grad for alpha in run.alphas]

    class After(TrainerCallback):
        def on_pre_optimizer_step(self, *args, **kwargs):
            pairs = zip(between.before, (alpha.grad for alpha in run.alphas), strict=True)
            added = [None if new is None else new - (0 if old is None else old) for old, new in pairs]
            seen.append((run.schedule.gamma, run.schedule.frozen_at, added, torch.stack(run.alphas).detach()))

    between, seen = Between(), []
    run = trainer(decompose(tiny_bert()), rows, tmp_path, gamma=gamma, callbacks=[between])
    run.add_callback(After())
    run.train()
    for now, frozen_at, added, alphas in seen:
        if frozen_at is None:
            assert now > 0
            torch.testing.assert_close(torch.stack(added), -now * torch.exp(-alphas))
        else:
            assert added[0] is None
    assert {frozen_at for _, frozen_at, _, _ in seen} == {None, run.schedule.frozen_at}


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["linear", "adaptive"])
@pytest.mark.parametrize("unit", ["raw", "max", "mean"])
@pytest.mark.parametrize("weigh_by_size", [False, True])
def test_every_option_reaches_the_budget(tiny_bert, rows, tmp_path, loss, unit, weigh_by_size):
    model = decompose(tiny_bert(), unit=unit)
    rate = {"raw": 0.3, "max": 0.1, "mean": 0.3}[unit]
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


def test_of_a_frozen_model_the_ranks_alone_are_learned(tiny_bert, rows, tmp_path):
    model = tiny_bert().requires_grad_(False)
    before = {name: parameter.clone() for name, parameter in model.named_parameters() if "classifier" in name}
    run = trainer(decompose(model), rows, tmp_path)
    run.train()
    assert run.state.global_step == run.schedule.frozen_at < 24 and run.cost() <= run.limit
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters() if name in before)
    with pytest.raises(ValueError, match="nothing is left to train. Deploy it, or let weights learn"):
        run.train()


def test_numpy_settings_can_be_saved(tiny_bert, rows, tmp_path):
    options = {"keep": np.float32(0.5), "multiple": np.int64(4), "weigh_by_size": np.True_, "gamma": np.float32(0.1)}
    arguments = {"save_strategy": "steps", "save_steps": 1}
    run = trainer(decompose(tiny_bert()), rows, tmp_path, steps=2, arguments=arguments, **options)
    run.train()
    again = trainer(decompose(tiny_bert()), rows, tmp_path, steps=4, arguments=arguments, **options)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4


def test_a_deployed_model_is_sent_to_transformers_trainer(tiny_bert, rows, tmp_path):
    run = trainer(decompose(tiny_bert()), rows, tmp_path, deadline=0.5)
    run.train()
    deploy(run.model)
    with pytest.raises(ValueError, match="was deployed.*recover with transformers' Trainer"):
        run.train()


def test_unmet_budget_is_an_error_that_says_what_to_do(tiny_bert, rows, tmp_path):
    run = trainer(decompose(tiny_bert()), rows, tmp_path, steps=3, alpha_learning_rate=1e-6, deadline=1.0)
    with pytest.raises(BudgetNotMet, match=r"After 3 steps 1.000 .* allows 0.500. .* a deadline below 1.0"):
        run.train()


@pytest.mark.parametrize(("gamma", "alike"), [(10, True), (1e-6, False)])
def test_a_heavy_push_drowns_the_task(tiny_bert, rows, tmp_path, gamma, alike):
    """Adam's steps do not know a gradient's size: pushed hard all thresholds rise alike, and no rank is learned."""
    run = trainer(decompose(tiny_bert()), rows, tmp_path, steps=9, gamma=gamma, deadline=0.9, alpha_learning_rate=1e-3)
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            seen.append(torch.stack(run.alphas).detach().clone())

    run.add_callback(Watch())
    run.train()
    spread = (seen[6].std() / seen[6].mean()).item()  # before the cut
    assert spread < 0.01 if alike else spread > 0.3


@pytest.mark.parametrize("unit", ["raw", "max", "mean"])
def test_a_deadline_forces_the_budget_and_leaves_steps_to_recover(tiny_bert, rows, tmp_path, unit):
    model = decompose(tiny_bert(), unit=unit)
    before = {}

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 9:
                before.update({name: layer.margins() for name, layer in run.soft_layers.items()})

    run = trainer(model, rows, tmp_path, steps=20, deadline=0.5, alpha_learning_rate=1e-4, callbacks=[Watch()])
    run.train()
    assert run.schedule.frozen_at == 10 and run.state.global_step == 20
    kept = count_parameters(deploy(model))
    assert 0.49 < kept.kept("linear") <= 0.5
    learned = {name: layer.rank for name, layer in run.soft_layers.items()}
    assert len(set(learned.values())) > 2
    # one threshold for all: what stays has larger margins than what goes (a step earlier, hence the tolerance)
    stays = min(before[name][rank - 1].item() for name, rank in learned.items() if rank > 1)
    goes = max(before[name][rank].item() for name, rank in learned.items() if rank < len(before[name]))
    assert goes - stays < 0.1 * max(margins[0].item() for margins in before.values())


def test_stall_is_warned_about(tiny_bert, rows, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("softlms.schedule.STALL_STEPS", 5)
    options = {"gamma": 0.1, "alpha_learning_rate": 1e-6, "deadline": 1.0}
    run = trainer(decompose(tiny_bert()), rows, tmp_path, steps=8, **options)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with pytest.raises(BudgetNotMet):
        run.train()
    assert "The ranks have not changed for 5 steps, with 1.000 of the linears" in caplog.text


@pytest.mark.parametrize("batch", [8, 1])
def test_rows_padded_on_the_left_train_like_rows_padded_on_the_right(tmp_path, batch):
    """transformers numbers positions from the padding on; here a row's loss is what it is alone."""
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(5, 99, (n,), generator=generator).tolist() for n in (4, 12, 6, 9, 5, 11, 7, 10)]
    rows = datasets.Dataset.from_dict({"input_ids": ids})

    def loss(side):
        def collate_text(features):
            width = max(len(row["input_ids"]) for row in features)
            pads = [[0] * (width - len(row["input_ids"])) for row in features]
            pairs = [(pad, row["input_ids"]) for pad, row in zip(pads, features, strict=True)]
            made = [(pad + own, [0] * len(pad) + [1] * len(own)) for pad, own in pairs]
            made = made if side == "left" else [(own + pad, [1] * len(own) + [0] * len(pad)) for pad, own in pairs]
            tokens, mask = (torch.tensor(part) for part in zip(*made, strict=True))
            return {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)}

        torch.manual_seed(0)
        sizes = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        model = GPT2LMHeadModel(GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, **sizes))
        args = TrainingArguments(
            str(tmp_path), max_steps=1, per_device_train_batch_size=batch, gradient_accumulation_steps=8 // batch,
            logging_steps=1, save_strategy="no", use_cpu=True, report_to=[], disable_tqdm=True,
        )  # fmt: skip
        run = DistillingTrainer(model, args=args, train_dataset=rows, data_collator=collate_text)
        run.train()
        return next(entry["loss"] for entry in run.state.log_history if "loss" in entry)

    assert loss("left") == pytest.approx(loss("right"), rel=1e-5)


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


@pytest.mark.parametrize("deadline", [0, 1.5, float("nan")])
def test_a_wrong_deadline_is_named(tiny_bert, rows, tmp_path, deadline):
    with pytest.raises(ValueError, match=f"deadline is a share of the steps.* got {deadline}"):
        trainer(decompose(tiny_bert()), rows, tmp_path, deadline=deadline)


def test_budget_errors_name_what_is_possible(tiny_bert, rows, tmp_path):
    model = decompose(tiny_bert(vocab_size=20_000))
    with pytest.raises(ValueError, match="choose count='linear'"):
        trainer(model, rows, tmp_path, keep=0.5, count="total")


def test_limit_of_a_total_budget_leaves_the_rest_out(tiny_bert, rows, tmp_path):
    model = tiny_bert()
    total = sum(parameter.numel() for parameter in model.parameters())
    linears = sum(m * n for m, n in (target.shape for target in find_targets(model)))
    run = trainer(decompose(model), rows, tmp_path, keep=0.8, count="total")
    assert run.limit == int(0.8 * total) - (total - linears)


def test_bfloat16_autocast_trains_to_the_budget(tiny_bert, rows, tmp_path):
    run = trainer(decompose(tiny_bert()), rows, tmp_path, steps=40, arguments={"bf16": True})
    run.train()
    assert run.schedule.frozen_at is not None and run.cost() <= run.limit
    assert all(parameter.isfinite().all() and parameter.dtype == torch.float32 for parameter in run.model.parameters())


def test_a_model_trained_in_bfloat16_computes_in_float32_afterwards(tiny_bert, rows, tmp_path, tokens):
    model = decompose(tiny_bert())
    run = trainer(model, rows, tmp_path, arguments={"bf16": True})
    under_autocast = []
    step = SoftTrainer.training_step

    def watched(model, inputs, *args):
        under_autocast.append("_original_forward" in vars(model))
        return step(run, model, inputs, *args)

    run.training_step = watched
    for _ in range(2):  # training again is in bfloat16 again
        run.train()
        with torch.no_grad():
            fresh = decompose(tiny_bert())
            for name, layer in run.soft_layers.items():
                fresh.set_submodule(name, layer)
            fresh.load_state_dict(model.state_dict())
            assert torch.equal(model.eval()(tokens).logits, fresh.eval()(tokens).logits)
        model.train()
    assert len(under_autocast) == 48 and all(under_autocast)


def test_stopping_early_does_not_hide_an_unmet_budget(tiny_bert, rows, tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

    run = trainer(decompose(tiny_bert()), rows, tmp_path, callbacks=[Stop()])
    with pytest.raises(BudgetNotMet, match="After 2 steps"):
        run.train()


def test_the_best_model_is_one_within_the_budget(tiny_bert, rows, tmp_path):
    arguments = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    arguments |= {"load_best_model_at_end": True, "metric_for_best_model": "loss"}
    run = trainer(decompose(tiny_bert()), rows, tmp_path, arguments=arguments, eval_dataset=rows.select(range(8)))
    run.train()
    assert int(run.state.best_model_checkpoint.split("-")[-1]) > run.schedule.frozen_at
    assert run.cost() <= run.limit


def test_training_again_recovers_only(tiny_bert, rows, tmp_path):
    run = trainer(decompose(tiny_bert()), rows, tmp_path)
    run.train()
    before = ranks(run.model)
    run.train()
    rates = [entry["learning_rate"] for entry in run.state.log_history if "learning_rate" in entry]
    assert ranks(run.model) == before and len(rates) == 24 and rates[-1] > 0 and rates == sorted(rates, reverse=True)


def test_divergence_is_called_by_its_name(tiny_bert, rows, tmp_path):
    class Break(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                run.soft_layers[name].sigma.data.fill_(float("nan"))

    run = trainer(decompose(tiny_bert()), rows, tmp_path, callbacks=[Break()])
    name = list(run.soft_layers)[3]
    with pytest.raises(RuntimeError, match=rf"diverged by step [23] in {name}: lower learning_rate"):
        run.train()


def test_what_cannot_work_is_refused(tiny_bert, rows, tmp_path):
    model = decompose(tiny_bert())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with pytest.raises(ValueError, match="optimizers cannot be given"):
        trainer(model, rows, tmp_path, optimizers=(optimizer, None))
    with pytest.raises(ValueError, match=r"bfloat16, too coarse .* dtype=torch.float32"):
        trainer(decompose(tiny_bert().to(torch.bfloat16)), rows, tmp_path)
    assert trainer(model, rows, tmp_path).args.ddp_find_unused_parameters


def test_gradient_checkpointing_gives_the_same_training(tiny_bert, rows, tmp_path):
    """Activations are made anew in the backward pass; factors, thresholds and ranks end the same."""
    ends = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = decompose(tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
        arguments = {"gradient_checkpointing": checkpointing}
        run = trainer(model, rows, tmp_path / str(checkpointing), deadline=0.5, arguments=arguments)
        run.train()
        ends.append({name: values.clone() for name, values in model.state_dict().items()})
    for name, values in ends[0].items():
        torch.testing.assert_close(ends[1][name], values, rtol=1e-4, atol=1e-5)


def test_a_layer_cut_below_the_multiple_can_be_frozen_again(tiny_bert, rows, tmp_path):
    model = decompose(tiny_bert())
    layers = list(soft_layers(model).values())
    layers[0].set_rank_(5)
    layers[0].freeze_()
    layers[1].set_rank_(21)
    layers[1].freeze_()
    run = trainer(model, rows, tmp_path, deadline=0.25, multiple=8)
    run.train()
    assert (layers[0].rank, layers[1].rank % 8) == (5, 0)
    assert all(rank % 8 == 0 for rank in list(ranks(model).values())[1:])
