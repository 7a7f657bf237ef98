"""Models and tokenizers as users have them: without what they need, or with another task's head."""

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, GPT2Config, LlamaConfig

from softlms.data.encoders import Encoder, find_encoder, load_classifier, load_tokenizer
from softlms.data.tasks import TASKS
from softlms.experiments.tokenized import tokenize_text

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


@pytest.mark.parametrize("config", [BertConfig(), GPT2Config(), LlamaConfig()], ids=lambda config: config.model_type)
def test_a_model_without_its_tokenizer_is_refused(config, tmp_path):
    """transformers makes one that knows no word, or fails in many lines."""
    config.save_pretrained(tmp_path / "model")
    encoder = find_encoder(str(tmp_path / "model"))
    with pytest.raises(ValueError, match="model' has no tokenizer.*: save the model's own there") as error:
        encoder.tokenizer()
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="has no tokenizer"):
        tokenize_text("embedded", encoder.location, tmp_path / "texts")
    assert not (tmp_path / "texts").exists()
    find_encoder("minilm").tokenizer().save_pretrained(tmp_path / "model")
    assert load_tokenizer(tmp_path / "model").tokenize("the red house") == ["the", "red", "house"]


def test_a_head_of_another_task_is_replaced(tmp_path):
    encoder = Encoder(str(tmp_path), "mine")
    for name, num_labels, problem in (("rte", 2, "single_label_classification"), ("stsb", 1, "regression")):
        for saved, kind in ((2, "multi_label_classification"), (3, "single_label_classification"), (1, "regression")):
            BertForSequenceClassification(BertConfig(**TINY, num_labels=saved, problem_type=kind)).save_pretrained(
                tmp_path
            )
            model, has_head = encoder.with_head(TASKS[name])
            assert has_head == (saved == num_labels) and model.config.num_labels == num_labels
            assert model.config.problem_type == problem and model.dtype == torch.float32


def test_weights_that_are_missing_or_broken_are_told(tmp_path):
    encoder = Encoder(str(tmp_path), "mine")
    BertForMaskedLM(BertConfig(**TINY)).save_pretrained(tmp_path)
    assert not encoder.with_head(TASKS["rte"])[1]  # a language model has no pooler and no head: both are new
    model = BertForSequenceClassification(BertConfig(**TINY))
    kept = {name: values for name, values in model.state_dict().items() if "layer.1.output.dense" not in name}
    model.save_pretrained(tmp_path, state_dict=kept)
    with pytest.raises(ValueError, match=r"mine lacks 2 weights of the model, bert.encoder.layer.1.output.dense.bias"):
        encoder.for_task(TASKS["rte"])
    (tmp_path / "model.safetensors").write_bytes(b"broken off")
    with pytest.raises(ValueError, match="cannot be read, fetch them again"):
        load_classifier(tmp_path)
