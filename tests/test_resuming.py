"""Training that is interrupted and goes on: the same run, or a word of what has changed."""

import logging

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from test_training import trainer
from torch.utils.data import BatchSampler
from transformers import (
    EarlyStoppingCallback,
    TrainerCallback,
)

from softlms.architectures import find_targets
from softlms.budget import Costs, count_parameters
from softlms.surgery import decompose, ranks


@pytest.mark.parametrize(
    "stop_at", [pytest.param(3, marks=pytest.mark.slow), 9, pytest.param(13, marks=pytest.mark.slow), 20]
)
def test_resumed_run_equals_uninterrupted(tiny_bert, rows, tmp_path, stop_at):
    """Before the budget is met, and after: same phase, alphas, optimizer state, and the same numbers at the end."""
    arguments = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": None}
    # the deadline: when the budget is met depends on the processor's rounding
    whole = trainer(decompose(tiny_bert()), rows, tmp_path / "whole", deadline=0.5, arguments=arguments)
    whole.train()

    torch.manual_seed(1)  # another process has other random numbers
    model = decompose(tiny_bert())
    resumed = trainer(model, rows, tmp_path / "resumed", deadline=0.5, arguments=arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{stop_at}"))

    assert resumed.schedule.frozen_at == whole.schedule.frozen_at
    assert 3 < whole.schedule.frozen_at < 20  # the four stops lie on both sides of it
    expected = whole.model.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    losses = [{e["step"]: e["loss"] for e in run.state.log_history if "loss" in e} for run in (whole, resumed)]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_a_run_resumed_after_the_cut_says_the_same_in_the_model_card(tiny_bert, rows, tmp_path):
    arguments = {"save_strategy": "steps", "save_steps": 1}
    whole = trainer(decompose(tiny_bert()), rows, tmp_path, deadline=0.5, arguments=arguments)
    whole.train()
    resumed = trainer(decompose(tiny_bert()), rows, tmp_path, deadline=0.5, arguments=arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-20"))
    assert whole.schedule.frozen_at < 20
    assert resumed.model.config.softlms == whole.model.config.softlms
    assert resumed.model.config.softlms["ranks_fixed_at_step"] == whole.schedule.frozen_at


@pytest.mark.slow
def test_resuming_with_a_larger_budget_is_refused_once_the_ranks_are_fixed(
    tiny_bert, rows, tmp_path, caplog, monkeypatch
):
    arguments = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": None}
    run = trainer(decompose(tiny_bert()), rows, tmp_path, deadline=0.5, arguments=arguments)
    run.train()
    cut = run.schedule.frozen_at
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    for changes, named in (
        ({"keep": 0.6}, "were fixed at step .* with keep=0.5, and this run has keep=0.6: cut components do not come"),
        ({"count": "total", "keep": 0.9}, "with count='linear', keep=0.5, and this run has count='total', keep=0.9"),
        ({"multiple": 4}, "with multiple=1, and this run has multiple=4"),
    ):
        model = decompose(tiny_bert())
        before = {name: values.clone() for name, values in model.state_dict().items()}
        changed = trainer(model, rows, tmp_path, deadline=0.5, arguments=arguments, **changes)
        with pytest.raises(ValueError, match=named):
            changed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{cut}"))
        assert all(torch.equal(values, before[name]) for name, values in model.state_dict().items())
    # a smaller one is met, before the cut and after it, and what changed is said
    for step in (cut + 8, cut + 2, cut - 1):  # the later first: each writes over the checkpoints after it
        caplog.clear()
        smaller = trainer(decompose(tiny_bert()), rows, tmp_path, deadline=0.5, arguments=arguments, keep=0.4)
        smaller.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert 0.39 < count_parameters(smaller.model).kept("linear") <= 0.4
        assert "was made with keep=0.5; from now on it is keep=0.4" in caplog.text
        assert ("the ranks are cut further" in caplog.text) == (step > cut)
        assert smaller.model.config.softlms["keep"] == 0.4


def test_costs_measured_anew_leave_fixed_ranks_alone(tiny_bert, rows, tmp_path, caplog, monkeypatch):
    arguments = {"save_strategy": "steps", "save_steps": 1}

    def run(dearer=()):
        model = decompose(tiny_bert())
        shapes = {target.name: target.shape for target in find_targets(model)}
        price = {n: lambda rank, n=n, a=a, b=b: rank * (a + b + 20 * (n in dearer)) for n, (a, b) in shapes.items()}
        costs = Costs("latency", shapes, price, 100.0)
        return trainer(model, rows, tmp_path, count="latency", costs=costs, deadline=0.5, arguments=arguments)

    whole = run()
    whole.train()
    fixed, note = ranks(whole.model), dict(whole.model.config.softlms)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    full = {target.name: min(target.shape) for target in find_targets(tiny_bert())}
    resumed = run({name for name, rank in fixed.items() if 2 * rank > full[name]})
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-22"))
    assert ranks(resumed.model) == fixed and resumed.model.config.softlms == note
    assert "was made with costs=" in caplog.text and "and the ranks do not change" in caplog.text
    assert resumed.cost() > resumed.limit  # the case: by the new prices the old ranks are too large


@pytest.mark.slow
def test_a_smaller_budget_on_resuming_forgets_the_best_model_of_the_larger(tiny_bert, rows, tmp_path):
    arguments = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    arguments |= {"load_best_model_at_end": True, "metric_for_best_model": "loss"}
    options = {"arguments": arguments, "eval_dataset": rows.select(range(8)), "deadline": 0.5}
    trainer(decompose(tiny_bert()), rows, tmp_path, **options).train()
    smaller = trainer(decompose(tiny_bert()), rows, tmp_path, keep=0.2, **options)
    smaller.train(resume_from_checkpoint=str(tmp_path / "checkpoint-24"))
    assert count_parameters(smaller.model).kept("linear") <= 0.2 and smaller.cost() <= smaller.limit


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.01, None])
def test_the_rate_of_the_thresholds_is_taken_over_on_resuming(tiny_bert, rows, tmp_path, rate):
    arguments = {"save_strategy": "steps", "save_steps": 1}
    trainer(decompose(tiny_bert()), rows, tmp_path, alpha_learning_rate=1e-4, arguments=arguments).train()
    seen = []

    class Rate(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            seen.append(optimizer.param_groups[-1]["lr"])

    resumed = trainer(decompose(tiny_bert()), rows, tmp_path, alpha_learning_rate=rate, callbacks=[Rate()])
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert len(set(seen[:3])) == 1 and (seen[0] == rate if rate else seen[0] > 1e-3)


def test_layers_decomposed_otherwise_are_refused_on_resuming(tiny_bert, rows, tmp_path):
    arguments = {"save_strategy": "steps", "save_steps": 1}
    trainer(decompose(tiny_bert()), rows, tmp_path, arguments=arguments).train()
    for options, named in (
        ({"s": 1.0}, r"has .*'s': 12.5.* this model has .*'s': 1.0.*: decompose it with the same targets"),
        ({"targets": lambda name, _: name.endswith("query")}, "has .* for bert.*, this model has None"),
    ):
        with pytest.raises(ValueError, match=named):
            trainer(decompose(tiny_bert(), **options), rows, tmp_path).train(
                resume_from_checkpoint=str(tmp_path / "checkpoint-2")
            )


@pytest.mark.slow
def test_interrupted_notebook_cell_resumes_in_the_same_trainer(tiny_bert, rows, tmp_path):
    arguments = {"save_strategy": "steps", "save_steps": 1}
    run = trainer(decompose(tiny_bert()), rows, tmp_path, arguments=arguments)
    run.train()
    frozen_at, expected = run.schedule.frozen_at, {k: v.clone() for k, v in run.model.state_dict().items()}
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))  # back to before the freeze
    assert run.schedule.frozen_at == frozen_at
    assert all(torch.equal(v, expected[k]) for k, v in run.model.state_dict().items())


def test_callback_states_may_be_restored(tiny_bert, rows, tmp_path):
    arguments = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    arguments |= {"restore_callback_states_from_checkpoint": True, "metric_for_best_model": "loss"}
    arguments |= {"load_best_model_at_end": True}
    for checkpoint in (None, str(tmp_path / "checkpoint-20")):
        stop = EarlyStoppingCallback(early_stopping_patience=100)
        options = {"arguments": arguments, "eval_dataset": rows.select(range(8)), "callbacks": [stop]}
        run = trainer(decompose(tiny_bert()), rows, tmp_path, **options)
        run.train(resume_from_checkpoint=checkpoint)
        assert run.schedule.frozen_at is not None


@pytest.mark.parametrize("processes", [1, 2])
def test_resumed_batches_are_the_same_in_every_process(tiny_bert, rows, tmp_path, processes):
    """The order depends on seed and epoch alone, through all of accelerate's wrappers."""
    run = trainer(decompose(tiny_bert()), rows, tmp_path)
    sampler = run._get_train_sampler(rows)
    orders = {}
    for epoch in (0.0, 0.5, 1.0, 1.5, 0.0):
        run.state.epoch = epoch
        batches = BatchSampler(sampler, 8, drop_last=False)
        order = list(BatchSamplerShard(batches, processes, processes - 1))
        assert orders.setdefault(int(epoch), order) == order
    assert orders[0] != orders[1]
