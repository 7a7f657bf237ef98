"""Tiny models of the real transformers classes, and the settings that every test shares."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported
os.environ.setdefault("TQDM_DISABLE", "1")

import datasets
import hypothesis
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from softlms.data.encoders import find_encoder

# timings on a shared machine say nothing about the code
hypothesis.settings.register_profile("softlms", deadline=None, max_examples=50)
hypothesis.settings.load_profile("softlms")
datasets.disable_progress_bars()
if "PYTEST_XDIST_WORKER" in os.environ:  # several processes share the cores
    torch.set_num_threads(1)


LONG = [
    "accumulation",
    "adapters",
    "calibration",
    "checkpoint",
    "claims",
    "comparison",
    "compress",
    "compress_text",
    "costs",
    "defaults",
    "distributed",
    "doctor",
    "experiments",
    "explorer",
    "export",
    "factorization",
    "figures",
    "full_size",
    "gallery",
    "hub",
    "language",
    "language_models",
    "locale",
    "masks",
    "methods",
    "minilm",
    "nbval_lanes",
    "readme",
    "report",
    "resuming",
    "scan",
    "speed",
    "surgery",
    "tasks",
    "teacher",
    "training",
    "training_cost",
    "workbook",
]  # files that train, export or run notebooks: minutes together


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.stem.removeprefix("test_") in LONG:
            item.add_marker("long")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def tiny_bert():
    """Factory of random BERTs: 2 blocks, hidden 32, in eval mode."""

    def build(**changes):
        config = {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 64,
            "vocab_size": 200,
            "max_position_embeddings": 64,
            "num_labels": 2,
            "initializer_range": 0.2,  # singular values of the size that real models have
        }
        return BertForSequenceClassification(BertConfig(**(config | changes))).eval()

    return build


@pytest.fixture
def tiny_llama():
    """Factory of random Llamas with a language model's head: 2 blocks, hidden 32, in eval mode."""

    def build(**changes):
        config = {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 64,
            "vocab_size": 200,
            "initializer_range": 0.2,
        }
        return LlamaForCausalLM(LlamaConfig(**(config | changes))).eval()

    return build


@pytest.fixture
def tokens():
    return torch.randint(0, 200, (3, 17))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A tiny BERT with MiniLM's tokenizer, saved as a user would have it."""
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("tiny")
    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, initializer_range=0.2
    )
    BertForSequenceClassification(config).save_pretrained(place)
    find_encoder("minilm").tokenizer().save_pretrained(place)
    return place


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
