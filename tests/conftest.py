"""Tiny models of the real transformers classes, and the settings that every test shares."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported
os.environ.setdefault("TQDM_DISABLE", "1")

import datasets
import hypothesis
import pytest
import torch
from folders import soft
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import softlms
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
    "figures_refusals",
    "figures_resuming",
    "folder_files",
    "folder_refusals",
    "full_size",
    "gallery",
    "hub",
    "language",
    "language_models",
    "loading",
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


TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 200,
    "initializer_range": 0.2,  # singular values of the size that real models have
}


@pytest.fixture
def tiny_bert():
    """Factory of random BERTs: 2 blocks, hidden 32, in eval mode."""
    return lambda **changes: BertForSequenceClassification(
        BertConfig(**TINY | {"max_position_embeddings": 64} | changes)
    ).eval()


@pytest.fixture
def tiny_llama():
    """Factory of random Llamas with a language model's head: 2 blocks, hidden 32, in eval mode."""
    config = TINY | {"num_key_value_heads": 2}
    return lambda **changes: LlamaForCausalLM(LlamaConfig(**config | changes)).eval()


@pytest.fixture
def deployed(tiny_bert):
    """A deployed BERT: other ranks in each layer, the last dense."""
    return softlms.deploy(soft(tiny_bert()))


@pytest.fixture
def saved(deployed, tmp_path):
    """The same, saved in the test's folder."""
    deployed.save_pretrained(tmp_path)
    return deployed


@pytest.fixture
def tokens():
    return torch.randint(0, 200, (3, 17))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A tiny BERT with MiniLM's tokenizer, saved as a user would have it."""
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("tiny")
    config = BertConfig(**TINY | {"vocab_size": 30522})
    BertForSequenceClassification(config).save_pretrained(place)
    find_encoder("minilm").tokenizer().save_pretrained(place)
    return place


@pytest.fixture
def bench(tiny_folder, tmp_path):
    """The tiny BERT on 48 sentence pairs of each split."""
    from softlms.data.tasks import TaskData, load_task
    from softlms.experiments.bench import Bench

    data = load_task("docpairs", "embedded")
    small = TaskData(data.task, {name: rows.select(range(48)) for name, rows in data.splits.items()}, data.source)
    return Bench(find_encoder(str(tiny_folder)), small, tmp_path / "runs", max_length=32, note=lambda line: None)


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


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout with one notebook that takes no time."""
    from batches import GOOD, write_notebook  # seconds, which few modules need

    (tmp_path / "pyproject.toml").touch()
    write_notebook(tmp_path, "01_good", GOOD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SOFTLMS_DATA", raising=False)
    return tmp_path
