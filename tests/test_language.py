import pytest

from softlms.data import corpus
from softlms.data.text import load_text
from softlms.experiments.tokenized import tokenize_text


def write(folder, **texts):
    for split, text in texts.items():
        (folder / f"{split}.txt").write_text(text, encoding="utf-8")


def test_text_folder_in_wikitexts_layout(tmp_path):
    write(tmp_path, train=" = Title = \n a <unk> b\n", valid="v\n", test="t\n")
    assert load_text(tmp_path) == {"train": " = Title = \n a <unk> b\n", "validation": "v\n", "test": "t\n"}
    assert load_text(tmp_path, splits=("test",)) == {"test": "t\n"}


def test_other_file_names(tmp_path):
    for name in ("wiki.train.tokens", "ptb.valid.txt", "wiki.test.raw"):
        (tmp_path / name).write_text(name, "utf-8")
    assert load_text(tmp_path)["validation"] == "ptb.valid.txt"


def test_missing_split_is_named(tmp_path):
    write(tmp_path, valid="v", test="t")
    with pytest.raises(FileNotFoundError, match=r"no file of the train split"):
        load_text(tmp_path)
    assert set(load_text(tmp_path, splits=("validation", "test"))) == {"validation", "test"}
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_text(tmp_path / "nowhere")


def test_broken_files(tmp_path):
    write(tmp_path, train="x", valid=" \n", test="t")
    with pytest.raises(ValueError, match=r"valid\.txt contains no text"):
        load_text(tmp_path)
    (tmp_path / "valid.txt").write_bytes(b"\xff\xff")
    with pytest.raises(ValueError, match=r"valid\.txt is not UTF-8"):
        load_text(tmp_path)
    with pytest.raises(ValueError, match="Unknown split 'dev'"):
        load_text(tmp_path, splits=("dev",))


def test_two_files_of_one_split(tmp_path):
    write(tmp_path, train="x", valid="v", test="t")
    (tmp_path / "wiki.train.tokens").write_text("y", "utf-8")
    with pytest.raises(ValueError, match="2 files of the train split"):
        load_text(tmp_path)


def test_hub(monkeypatch, tmp_path):
    from datasets import Dataset, DatasetDict

    def hub(*names, revision="main"):
        assert names == ("Salesforce/wikitext", "wikitext-2-raw-v1")
        asked.append(revision)
        return DatasetDict({s: Dataset.from_dict({"text": [s, "\n"]}) for s in ("train", "validation", "test")})

    asked = []
    monkeypatch.setattr("datasets.load_dataset", hub)
    assert load_text("hub")["validation"] == "validation\n"
    assert tokenize_text("hub@v1", 257, tmp_path).source == "hub: WikiText-2@v1"
    assert asked == ["main", "v1"]


@pytest.mark.slow
def test_embedded_text_says_nothing_twice():
    text = load_text("embedded", libraries=corpus.SMALL_LIBRARIES)
    paragraphs = {split: [" ".join(p.split()) for p in part.split("\n\n")] for split, part in text.items()}
    every = [p for part in paragraphs.values() for p in part]
    assert len(every) == len(set(every))
    assert len(text["train"]) > 3_000_000 and len(text["test"]) > 200_000
    assert len(paragraphs["train"]) > 3 * max(len(paragraphs["validation"]), len(paragraphs["test"]))
