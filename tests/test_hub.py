"""Names on the hub at a revision. The hub's own cache, offline, answers as the hub would."""

import pytest
import torch
from transformers import AutoConfig, BertConfig, BertForSequenceClassification

from softlms.data.encoders import Encoder, find_encoder
from softlms.data.hub import _found_commit, commit_of, is_hub, pretrained, split_revision, weights_hash
from softlms.data.named import NAMED
from softlms.data.tasks import TASKS, TaskData
from softlms.experiments.bench import Bench
from softlms.experiments.full_size import find_full_size
from softlms.experiments.recipe import Recipe
from softlms.workbook.run import _resolve

NAME, OLD, NEW = "someone/tiny", "a" * 40, "b" * 40


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Two commits of one model: "main" is the newer, "v1" a tag of the older."""
    config = BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    place = tmp_path / "models--someone--tiny"
    for commit, ref in ((OLD, "v1"), (NEW, "main")):
        BertForSequenceClassification(config).save_pretrained(place / "snapshots" / commit)
        (place / "refs").mkdir(exist_ok=True)
        (place / "refs" / ref).write_text(commit, "utf-8")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path))
    _found_commit.cache_clear()
    yield {commit: BertForSequenceClassification.from_pretrained(place / "snapshots" / commit) for commit in (OLD, NEW)}
    _found_commit.cache_clear()


@pytest.mark.parametrize(
    "name, commit", [(NAME, NEW), (f"{NAME}@v1", OLD), (f"{NAME}@{OLD}", OLD), (f"{NAME}@main", NEW)]
)
def test_the_weights_are_those_of_the_revision(hub, name, commit):
    encoder = find_encoder(name)
    assert encoder.source == f"hub: {name}" and commit_of(encoder.location) == commit
    create, _ = find_full_size(name, None)
    for model in (encoder.for_task(TASKS["mrpc"]), create(name)):
        assert torch.equal(model.bert.pooler.dense.weight, hub[commit].bert.pooler.dense.weight)


def test_a_runs_key_knows_the_commit(hub, tmp_path):
    def place(name):
        bench = Bench(find_encoder(name), TaskData(TASKS["mrpc"], {}, "nowhere"), tmp_path)
        return bench._place("dense", Recipe(), 0)[1]

    assert place(NAME) != place(f"{NAME}@v1")
    before = place(NAME)
    (tmp_path / "models--someone--tiny/refs/main").write_text(OLD, "utf-8")  # the name now stands for other weights
    _found_commit.cache_clear()
    assert place(NAME) != before
    assert weights_hash(f"{NAME}@v1") == f"{NAME}@v1, commit {OLD}"


def test_what_is_not_there_is_said_by_what_loads(hub):
    assert commit_of("someone/else") == "unknown"
    for name in ("someone/else@v1", f"{NAME}@v2"):
        with pytest.raises(OSError, match="couldn't find them in the cached files"):
            pretrained(AutoConfig, name)


def test_an_unknown_commit_is_asked_for_again(hub, tmp_path):
    ref = tmp_path / "models--someone--tiny/refs/later"
    assert commit_of(f"{NAME}@later") == "unknown"
    ref.write_text(OLD, "utf-8")
    assert commit_of(f"{NAME}@later") == OLD


def test_a_folder_may_have_the_sign_in_its_name(tiny_folder, tmp_path):
    place = tmp_path / "tiny@home"
    pretrained(AutoConfig, tiny_folder).save_pretrained(place)
    encoder = find_encoder(str(place))
    assert encoder == Encoder(str(place), "folder: tiny@home")
    assert pretrained(AutoConfig, encoder.location).hidden_size == 32


def test_names():
    assert split_revision("a/b") == ("a/b", "") and split_revision("a/b@refs/pr/1") == ("a/b", "refs/pr/1")
    for wrong in ("a/b@", "@v1", "hub@"):
        with pytest.raises(ValueError, match=f"'{wrong}' is not name@revision: add a commit"):
            find_encoder(wrong)
    assert is_hub("hub") and is_hub("hub@v1") and not is_hub("hubs") and not is_hub("embedded")
    assert _resolve("--data", "hub@v1") == "hub@v1"
    for name, known in NAMED.items():  # the package is of one revision, which it does not name
        assert find_encoder(f"{name}@v1") == Encoder(f"{known.hub}@v1", f"hub: {known.hub}@v1")
