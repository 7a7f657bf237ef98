"""Saved and loaded by transformers itself: the same model, to the last bit."""

import copy
import json

import pytest
import torch
import transformers
from folders import FAMILIES, IDS, assert_equal, dense, load, outputs, soft, thin
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    pipeline,
)

import softlms
from softlms.architectures import find_targets
from softlms.budget import count_parameters
from softlms.origin import DENSE
from softlms.saving.loading import verify


@pytest.mark.parametrize("form", ["soft", "deployed", "truncated"])
@pytest.mark.parametrize("family, split", FAMILIES)
def test_round_trip_is_bit_equal_at_the_compressed_size(tiny_bert, tmp_path, family, split, form):
    model = dense(tiny_bert, family, split)
    if form == "truncated":
        softlms.truncate(model, {t.name: min(1 + 3 * i, *t.shape) for i, t in enumerate(find_targets(model))})
    else:
        soft(model)
        if form == "deployed":
            softlms.deploy(model)
    model.save_pretrained(tmp_path / "out")
    again, report = load(tmp_path / "out", family, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not again.training
    assert_equal(again, model)
    assert_equal(load(tmp_path / "out", family, low_cpu_mem_usage=True, device_map="cpu"), model)
    size = sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers())
    assert (tmp_path / "out/model.safetensors").stat().st_size < size + 40_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    # loaded, it is a model like any other: saved again, the same
    again.save_pretrained(tmp_path / "again")
    for name in ("config.json", "README.md"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    assert verify([tmp_path / "again/model.safetensors"]) == verify([tmp_path / "out/model.safetensors"])
    assert not again.is_quantized and not hasattr(again, "hf_quantizer")
    assert again.config.quantization_config == model.config.quantization_config


@pytest.mark.slow
def test_bert_base_at_its_real_size(tmp_path):
    model = transformers.BertForSequenceClassification(transformers.BertConfig()).eval()
    softlms.surgery.shrink(model, {t.name: (128, 400)[i % 2] for i, t in enumerate(find_targets(model))})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    model.save_pretrained(tmp_path)
    assert_equal(load(tmp_path), model)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_are_written_once(tiny_bert, tmp_path, tied):
    model = softlms.deploy(soft(dense(tiny_bert, "llama", tied=tied)))
    model.save_pretrained(tmp_path)
    again = load(tmp_path, "llama")
    assert (again.get_output_embeddings().weight is again.get_input_embeddings().weight) == tied
    assert_equal(again, model)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert ("lm_head.weight" in file.keys()) != tied  # noqa: SIM118


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_precisions(tiny_bert, tmp_path, dtype):
    model = soft(tiny_bert())
    model.save_pretrained(tmp_path / "soft")
    loaded = load(tmp_path / "soft", dtype=dtype)
    assert softlms.ranks(loaded) == softlms.ranks(model)  # sigma and alpha are not rounded
    for layer in softlms.surgery.soft_layers(loaded).values():
        assert layer.U.dtype == dtype and layer.sigma.dtype == layer.threshold.alpha.dtype == torch.float32
    assert (outputs(loaded) - outputs(model)).abs().max() < 0.1
    small = softlms.deploy(loaded)
    small.save_pretrained(tmp_path / "small")
    again = load(tmp_path / "small")
    assert again.dtype == dtype
    assert_equal(again, small)


def test_training_goes_on_after_loading(tiny_bert, tmp_path):
    model = soft(tiny_bert())
    for i, layer in enumerate(softlms.surgery.soft_layers(model).values()):
        if i % 2:
            layer.freeze_()
    model.save_pretrained(tmp_path / "soft")
    again = load(tmp_path / "soft")
    alphas = [[layer.threshold.alpha for layer in softlms.surgery.soft_layers(m).values()] for m in (again, model)]
    learns = [[alpha.requires_grad for alpha in of_model] for of_model in alphas]
    assert learns[0] == learns[1]
    rows = [{"input_ids": IDS[0], "labels": 1}] * 4
    before = outputs(again)
    args = TrainingArguments(str(tmp_path / "t"), max_steps=1, learning_rate=1e-2, use_cpu=True, report_to=[])
    Trainer(again, args, train_dataset=rows).train()  # refuses what transformers takes for quantized
    assert not torch.equal(outputs(again), before)


def test_a_trainers_checkpoint_is_a_saved_model(tiny_bert, tmp_path, caplog):
    model = soft(tiny_bert())
    args = TrainingArguments(
        str(tmp_path), max_steps=2, save_steps=1, learning_rate=1e-3, use_cpu=True, report_to=[], disable_tqdm=True
    )
    rows = [{"input_ids": IDS[0], "labels": 1}] * 8
    Trainer(model, args, train_dataset=rows).train()
    assert_equal(load(tmp_path / "checkpoint-2"), model.eval())
    resumed = soft(tiny_bert())
    Trainer(resumed, args, train_dataset=rows).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert_equal(resumed.eval(), model)
    assert "unexpected keys" not in caplog.text


def test_base_model_and_pipeline(tiny_folder, tmp_path):
    model = softlms.deploy(soft(load(tiny_folder)))
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(outputs(base), outputs(model.bert))
    with torch.no_grad():
        expected = model(**tokenizer("a red house", return_tensors="pt")).logits.softmax(-1).max().item()
    answer = pipeline("text-classification", model=str(tmp_path), device="cpu")("a red house")[0]
    assert answer["score"] == pytest.approx(expected, abs=1e-7)
    base.save_pretrained(tmp_path / "base")  # and a base model's layers come back under a head
    headed = load(tmp_path / "base")
    assert torch.equal(outputs(headed.bert), outputs(base))


def test_a_factored_head_does_not_stand_in_the_way(tiny_bert, tmp_path):
    model = tiny_bert()
    softlms.truncate(
        model, {"bert.pooler.dense": 5, "classifier": 1}, targets=lambda n, m: n in ("bert.pooler.dense", "classifier")
    )
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(base(IDS).pooler_output, model.bert(IDS).pooler_output)


def test_a_compressed_model_is_copied_pickled_and_trained_like_any_other(deployed, tmp_path):
    assert copy.deepcopy(deployed.config) == deployed.config and json.loads(deployed.config.to_json_string())
    torch.save(deployed, tmp_path / "model.pt")
    for again in (copy.deepcopy(deployed), torch.load(tmp_path / "model.pt", weights_only=False)):
        again.save_pretrained(tmp_path / "out")
        assert_equal(load(tmp_path / "out"), deployed)
    rows = [{"input_ids": IDS[0], "labels": 1}] * 4
    args = TrainingArguments(str(tmp_path / "t"), max_steps=1, use_cpu=True, report_to=[])
    Trainer(deployed, args, train_dataset=rows).train()


@pytest.mark.parametrize("way", ["kept", "saved", "copied"])
def test_the_dense_model_is_remembered(deployed, tmp_path, way):
    """What is kept is a share of the model that was: nine tenths of the words are gone, and it shows."""
    before = count_parameters(deployed)
    deployed.resize_token_embeddings(20)
    if way == "saved":
        deployed.save_pretrained(tmp_path)
        deployed = load(tmp_path)
    elif way == "copied":
        deployed = copy.deepcopy(deployed)
    fewer = count_parameters(deployed)
    assert fewer.total == before.total - 5_760 and fewer.total_dense == before.total_dense
    if way == "saved":
        card = (tmp_path / "README.md").read_text("utf-8")
        assert f"{fewer.total:,} of {before.total_dense:,} parameters" in card
    pooler = softlms.decompose(copy.deepcopy(deployed), targets=lambda name, module: name == "bert.pooler.dense")
    softlms.deploy(pooler, keep=0.62, count="total")
    assert count_parameters(pooler).total <= 0.62 * before.total_dense
    deployed.resize_token_embeddings(200)
    assert count_parameters(deployed) == before


def test_other_heads_and_bases_are_no_change_of_the_dense_rest(deployed, tmp_path):
    linear = count_parameters(deployed).linear
    deployed.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    base.save_pretrained(tmp_path / "base")
    for other in (
        deployed.bert,
        base,
        load(tmp_path / "base", num_labels=5),
        load(tmp_path, num_labels=5, ignore_mismatched_sizes=True),
        transformers.BertForMaskedLM.from_pretrained(tmp_path),
    ):
        counted = count_parameters(other)
        assert counted.linear == linear and counted.total == sum(p.numel() for p in other.parameters())
    deployed.classifier = nn.Linear(32, 7)
    assert count_parameters(deployed).linear == linear
    # and what was saved before the rest was noted counts as ever
    del vars(deployed)[DENSE]
    deployed.resize_token_embeddings(20)
    assert count_parameters(deployed).linear == linear


def test_building_a_model_once_more_leaves_the_random_numbers_alone(deployed, tmp_path):
    before = torch.get_rng_state()
    deployed.save_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_without_its_pooler_is_saved_as_it_is(tiny_bert, tmp_path):
    model = thin(BertModel(tiny_bert().config, add_pooling_layer=False).eval())
    model.save_pretrained(tmp_path)
    assert_equal(BertModel.from_pretrained(tmp_path, add_pooling_layer=False), model)


class Tagger(PreTrainedModel):
    """A user's class that is not built from its configuration alone."""

    config_class, base_model_prefix = BertConfig, "bert"

    def __init__(self, config, tags):
        super().__init__(config)
        self.bert, self.out = BertModel(config), nn.Linear(config.hidden_size, tags)
        self.post_init()

    def forward(self, input_ids):
        return self.out(self.bert(input_ids).last_hidden_state)


@pytest.mark.parametrize("form", [soft, thin])
def test_a_class_with_arguments_of_its_own_comes_back_or_is_refused(tmp_path, form):
    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=99)
    model = form(Tagger(config, 3).eval())
    model.save_pretrained(tmp_path / "good")
    for again in (Tagger.from_pretrained(tmp_path / "good", 3), Tagger.from_pretrained(tmp_path / "good", tags=3)):
        assert_equal(again, model)
    if form is thin:
        peft = pytest.importorskip("peft")
        peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["query.down"]), model)
        with pytest.raises(ValueError, match=r"query differs from a LowRankLinear in its tensors, down\..*: the fo"):
            model.save_pretrained(tmp_path / "adapted")
