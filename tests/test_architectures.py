"""The three verbs on every family: tiny random models of the real transformers classes."""

import copy

import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

import softlms
from softlms.architectures import ARCHITECTURES, find_targets
from softlms.budget import count_parameters
from softlms.layers import LowRankLinear, Ranked, SoftLinear
from softlms.lowrank.calibration import LayerStatistics
from softlms.lowrank.factorization import FACTORIZATIONS
from softlms.surgery import shrink, soft_layers

COMMON = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "intermediate_size": 64, "initializer_range": 0.2}

FAMILIES = {
    "bert": ("BertForSequenceClassification", "BertConfig", COMMON | HEADS),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", COMMON | HEADS | {"num_key_value_heads": 2}),
    "mamba": ("MambaForCausalLM", "MambaConfig", COMMON | {"state_size": 4, "time_step_rank": 4}),
}
# families that the table does not hold, by a predicate
OTHERS = {
    "distilbert": (
        "DistilBertForSequenceClassification", "DistilBertConfig",
        {"vocab_size": 99, "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4}, "transformer.layer.",
    ),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", COMMON | HEADS, "encoder.layer."),
    "opt": (
        "OPTForCausalLM", "OPTConfig",
        {**COMMON, "num_attention_heads": 4, "ffn_dim": 64, "word_embed_proj_dim": 32}, "decoder.layers.",
    ),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", COMMON | HEADS | {"num_key_value_heads": 2}, "model.layers."),
    "mamba2": (
        "Mamba2ForCausalLM", "Mamba2Config",
        {**COMMON, "state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8}, "mixer.",
    ),
}  # fmt: skip


def build(model_class, config_class, options):
    config = getattr(transformers, config_class)(**options)
    model = getattr(transformers, model_class)(config).eval()
    for parameter in model.parameters():  # biases and norms are not at their trivial start
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture(params=FAMILIES)
def model(request):
    return build(*FAMILIES[request.param])


@pytest.fixture
def tokens():
    return torch.randint(3, 99, (3, 17))


def assert_same(got, expected, tolerance=1e-5):
    """To a share of the largest logit: float32 carries no more."""
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance * max(1.0, expected.abs().max().item()))


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


def cut(model, seed=0):
    """Other ranks in each layer, some at full."""
    generator = torch.Generator().manual_seed(seed)
    for layer in soft_layers(model).values():
        layer.set_rank_(int(torch.randint(1, len(layer.sigma) + 1, (1,), generator=generator)))
    return model


def some_ranks(model):
    return {t.name: (3, 7, min(t.shape))[i % 3] for i, t in enumerate(find_targets(model))}


def test_every_linear_is_a_target_or_has_its_reason(model):
    architecture = ARCHITECTURES[model.config.model_type]
    found = find_targets(model)
    assert {t.block for t in found} == {0, 1} and all(t.symbol in architecture.targets.values() for t in found)
    chosen = {t.name for t in found}
    others = [
        n for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D, nn.Embedding)) and n not in chosen
    ]
    reasons = [*architecture.left_alone, "embed", "wte", "wpe"]
    assert all(any(reason in name for reason in reasons) for name in others), others


def test_decomposed_is_dense_and_deployed_is_soft(model, tokens):
    dense = logits(model, tokens)
    kinds = {target.name: type(target.module) for target in find_targets(model)}
    parameters = count_parameters(model)
    softlms.decompose(model)
    assert_same(logits(model, tokens), dense)
    cut(model)
    soft, counted = logits(model, tokens), count_parameters(model)
    assert (counted.linear_dense, counted.rest) == (parameters.linear_dense, parameters.rest)
    softlms.deploy(model)
    assert_same(logits(model, tokens), soft)
    assert count_parameters(model) == counted
    assert sum(p.numel() for p in model.parameters()) == counted.total  # tied tensors once
    assert not any(isinstance(m, SoftLinear) for m in model.modules())
    for target in find_targets(model):  # what stays dense is what it was
        if not isinstance(target.module, Ranked):
            assert type(target.module) is kinds[target.name]


def test_training_reaches_every_factor(model, tokens):
    softlms.decompose(model).train()
    out = model(tokens)
    out.logits.float().log_softmax(-1).pow(2).mean().backward()
    for name, layer in soft_layers(model).items():
        for factor in ("U", "sigma", "V"):
            gradient = getattr(layer, factor).grad
            assert gradient is not None and gradient.abs().sum() > 0, f"{name}.{factor}"
        cut(model)
    model.zero_grad()
    model(tokens).logits.float().log_softmax(-1).pow(2).mean().backward()
    for name, layer in soft_layers(model).items():
        if layer.rank < len(layer.sigma):
            assert layer.threshold.alpha.grad is not None and layer.threshold.alpha.grad != 0, name


def random_statistics(model):
    statistics = {}
    for target in find_targets(model):
        m, n = target.shape
        x = torch.randn(64, n, dtype=torch.float64) * torch.linspace(0.1, 2, n, dtype=torch.float64)
        g = torch.randn(64, m)
        statistics[target.name] = LayerStatistics(
            x.T @ x / 64, x.abs().mean(0), torch.rand(n, dtype=torch.float64), g.T @ g / 64
        )
    return statistics


@pytest.mark.parametrize("method", FACTORIZATIONS)
def test_truncated_has_the_tensors_of_a_shrunk_model(model, tokens, method):
    hollow = copy.deepcopy(model)
    ranks = some_ranks(model)
    softlms.truncate(model, ranks, method, random_statistics(model))
    shrink(hollow, ranks).load_state_dict(model.state_dict())
    assert torch.equal(logits(hollow, tokens), logits(model, tokens))
    assert {t.name: getattr(t.module, "rank", min(t.shape)) for t in find_targets(model)} == ranks


def test_calibration_sees_what_the_layers_see(model, tokens):
    import datasets

    labels = {"labels": [0, 1, 1] if model.config.model_type == "bert" else tokens.tolist()}
    rows = datasets.Dataset.from_dict({"input_ids": tokens.tolist(), "attention_mask": [[1] * 17] * 3} | labels)

    def collator(examples):
        return {key: torch.tensor([example[key] for example in examples]) for key in examples[0]}

    statistics = softlms.calibrate(model, rows, collator, rows=3, fisher=True)
    brute = {}
    for i in range(3):
        model.zero_grad()
        model(**collator([rows[i]])).loss.backward()
        for target in find_targets(model):
            gradient = target.as_weight(target.module.weight.grad).double()
            assert gradient.shape == target.shape
            brute[target.name] = brute.get(target.name, 0) + gradient.square().sum(0) / 3
    for name, entry in statistics.items():
        torch.testing.assert_close(entry.fisher, brute[name], rtol=1e-4, atol=1e-10)
        assert entry.gram.shape == (len(entry.fisher),) * 2
    dense = logits(model, tokens)
    softlms.decompose(model, "whitened", statistics, unit="mean")
    assert_same(logits(model, tokens), dense)


@pytest.mark.parametrize("family", ["gpt2", "llama", "mamba"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_deployed_generates_what_the_soft_model_does(family, tokens, use_cache):
    model = cut(softlms.decompose(build(*FAMILIES[family])))
    options = {"max_new_tokens": 12, "do_sample": False, "use_cache": use_cache, "pad_token_id": 0}
    soft = model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
    deployed = softlms.deploy(model).generate(tokens, attention_mask=torch.ones_like(tokens), **options)
    assert soft.shape[1] > tokens.shape[1] and torch.equal(soft, deployed)


def test_split_gpt2_is_the_same_model(tokens):
    model = build(*FAMILIES["gpt2"])
    dense, parameters = logits(model, tokens), count_parameters(model)
    assert softlms.split_fused(model) is model
    assert_same(logits(model, tokens), dense, 1e-6)
    assert count_parameters(model) == parameters
    symbols = [t.symbol for t in find_targets(model) if t.block == 0]
    assert symbols == ["W_Q", "W_K", "W_V", "W_proj", "W_fc1", "W_fc2"]
    softlms.decompose(model)
    assert_same(logits(model, tokens), dense)
    soft = logits(cut(model), tokens)
    assert_same(logits(softlms.deploy(model), tokens), soft)
    with pytest.raises(ValueError, match="nothing to split"):
        softlms.split_fused(model)


@pytest.mark.parametrize("family", OTHERS)
def test_other_families_by_a_predicate(family, tokens):
    *options, inside = OTHERS[family]
    model = build(*options)
    with pytest.raises(ValueError, match=f"Unknown model family '{family}'"):
        softlms.decompose(model)

    def targets(name, module):
        return inside in name

    dense = logits(model, tokens)
    softlms.decompose(model, targets=targets)
    assert len(soft_layers(model)) >= 4
    assert_same(logits(model, tokens), dense)
    soft = logits(cut(model), tokens)
    counted = count_parameters(model, targets)
    softlms.deploy(model)
    assert_same(logits(model, tokens), soft)
    assert sum(p.numel() for p in model.parameters()) == counted.total
    assert any(isinstance(m, LowRankLinear) for m in model.modules())
    assert not any(isinstance(m, SoftLinear) for m in model.modules())
