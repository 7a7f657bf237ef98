"""The path that users take, on the real pretrained encoder."""

import pytest
import torch

import softlms
from softlms.data.encoders import find_encoder
from softlms.data.tasks import TASKS


@pytest.fixture
def minilm():
    return find_encoder("minilm").for_task(TASKS["mrpc"]).eval()


@pytest.fixture
def sentences():
    tokenizer = find_encoder("minilm").tokenizer()
    texts = ["Soft thresholds learn ranks.", "A much longer sentence, so that there is some padding to get right here."]
    return tokenizer(texts, padding=True, return_tensors="pt")


@torch.no_grad()
def test_decompose_keeps_the_outputs_and_deploy_those_of_the_soft_form(minilm, sentences):
    dense = minilm(**sentences).logits
    softlms.decompose(minilm)
    torch.testing.assert_close(minilm(**sentences).logits, dense, rtol=0, atol=1e-5)
    for layer in minilm.bert.encoder.layer:
        layer.attention.self.query.set_rank_(40)
        layer.output.dense.set_rank_(350)
    soft, counted = minilm(**sentences).logits, softlms.count_parameters(minilm)
    assert (soft - dense).abs().max() > 1e-3  # the cut did something
    softlms.deploy(minilm)
    torch.testing.assert_close(minilm(**sentences).logits, soft, rtol=0, atol=1e-5)
    assert sum(p.numel() for p in minilm.parameters()) == counted.total


def test_counts_are_those_published(minilm):
    counted = softlms.count_parameters(minilm)
    assert counted.linear_dense == 10_616_832 and round(counted.total / 1e6, 1) == 22.7


def test_half_of_the_total_is_impossible_and_said_so(minilm):
    from transformers import TrainingArguments

    softlms.decompose(minilm)
    with pytest.raises(ValueError, match=r"keep=0.5 of total .* cannot be met: emb.*smallest keep of total is 0\.5"):
        softlms.SoftTrainer(minilm, keep=0.5, count="total", args=TrainingArguments("out", report_to=[]))


def test_static_ranks_halve_the_linears(minilm):
    costs = softlms.parameter_costs({target.name: target.shape for target in softlms.find_targets(minilm)})
    softlms.truncate(minilm, softlms.uniform_ranks(costs, softlms.Budget(0.5, "linear").limit(costs)))
    assert 0.4999 < softlms.count_parameters(minilm).kept("linear") <= 0.5
