"""The defaults, and nothing but a keep ratio: every family meets its budget before the deadline."""

import dataclasses
import inspect

import datasets
import pytest
import torch
import transformers
from transformers import TrainingArguments, default_data_collator

import softlms
from softlms.compress import Compression
from softlms.experiments.recipe import Recipe
from softlms.kernels.selective_scan import fast_scan
from softlms.methods.registry import methods
from softlms.methods.soft import SoftConfig
from softlms.training import DEADLINE

STEPS = 40
SIZES = {"vocab_size": 120, "initializer_range": 0.1}
BLOCKS = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
FAMILIES = {
    "bert": ("BertForSequenceClassification", "BertConfig", BLOCKS),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 64, "n_layer": 2, "n_head": 4}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", BLOCKS | {"num_key_value_heads": 2}),
    "mamba": ("MambaForCausalLM", "MambaConfig", {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 4}),
}


def test_there_is_one_set_of_defaults():
    """Library, command and recipes: a setting of the same name has the same default everywhere."""
    configs = [method.config for method in methods().values()]
    known = [
        {f.name: f.default for f in dataclasses.fields(of) if f.default is not dataclasses.MISSING}
        for of in (Recipe, Compression, *dict.fromkeys(configs))
    ]
    assert all({"keep", "epochs", "times", "exit_epochs", "router_epochs"} & settings.keys() for settings in known)
    for settings in known:
        for others in known:
            assert all(settings[name] == others[name] for name in settings.keys() & others.keys())
    trainer = inspect.signature(softlms.SoftTrainer).parameters
    surgery = inspect.signature(softlms.decompose).parameters
    for name in ("count", "gamma", "alpha_learning_rate", "compression_loss", "weigh_by_size", "deadline"):
        assert trainer[name].default == getattr(SoftConfig, name)
    assert (surgery["s"].default, surgery["unit"].default) == (SoftConfig.s, SoftConfig.unit)


@pytest.fixture(params=FAMILIES)
def model(request):
    kind, config, sizes = FAMILIES[request.param]
    return getattr(transformers, kind)(getattr(transformers, config)(**SIZES, **sizes))


@pytest.fixture
def rows(model):
    """Rows that can be learned: a label that the first token tells, or a text that counts."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randint(5, 90, (64, 1), generator=generator)
    ids = start + torch.arange(12) if model.can_generate() else torch.randint(5, 120, (64, 12), generator=generator)
    labels = ids if model.can_generate() else (ids[:, 0] > 60).long()
    return datasets.Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})


@pytest.mark.parametrize("factors", [pytest.param("svd", marks=pytest.mark.slow), "whitened"])
@pytest.mark.parametrize("keep", [0.5, pytest.param(0.35, marks=pytest.mark.slow)])
def test_the_budget_is_met_before_the_deadline(model, rows, tmp_path, keep, factors):
    with fast_scan():
        statistics = None
        if factors != "svd":
            statistics = softlms.calibrate(model, rows, default_data_collator, rows=32)
        softlms.decompose(model, factors, statistics)
        args = TrainingArguments(
            str(tmp_path), max_steps=STEPS, learning_rate=1e-3, logging_steps=1, save_strategy="no", report_to=[],
            use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        trainer = softlms.SoftTrainer(model, keep=keep, args=args, train_dataset=rows)
        trainer.train()
    assert trainer.schedule.note["budget"] == "met"
    assert trainer.schedule.frozen_at < DEADLINE * STEPS
    softlms.deploy(model)
    kept = softlms.count_parameters(model).kept("linear")
    assert keep - 0.01 < kept <= keep
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[trainer.schedule.frozen_at]  # it recovers
