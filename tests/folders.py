"""Models of every family to save, and what has to be the same when they are loaded."""

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import softlms
from softlms.experiments.language_models import SmallModel

IDS = torch.arange(20)[None]
FAMILIES = [("bert", False), ("gpt2", False), ("gpt2", True), ("llama", False), ("mamba", False)]  # fused layers split?


def dense(tiny_bert, family, split=False, tied=True):
    if family == "bert":
        return tiny_bert()
    config = SmallModel(family, hidden=64, layers=2, vocabulary=300).config
    config.tie_word_embeddings = tied
    model = AutoModelForCausalLM.from_config(config).eval()
    return softlms.split_fused(model) if split else model


def soft(model):
    """Other ranks in each layer; the last at full rank, which is stored dense."""
    softlms.decompose(model)
    layers = list(softlms.surgery.soft_layers(model).values())
    for i, layer in enumerate(layers[:-1]):
        layer.set_rank_(1 + 3 * i)
    return model


def thin(model, rank=4):
    return softlms.truncate(model, {target.name: rank for target in softlms.find_targets(model)})


def load(folder, family="bert", **options):
    auto = AutoModelForSequenceClassification if family == "bert" else AutoModelForCausalLM
    return auto.from_pretrained(folder, **options)


def outputs(model):
    """Logits, or a base model's last hidden states."""
    with torch.no_grad():
        return model(IDS.to(model.device))[0]


def assert_equal(again, model):
    assert torch.equal(outputs(again), outputs(model))
    assert {n: (v.dtype, v.shape) for n, v in again.state_dict().items()} == {
        n: (v.dtype, v.shape) for n, v in model.state_dict().items()
    }
