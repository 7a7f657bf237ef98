import pytest

from softlms.data import corpus
from softlms.data.text import find_splits, load_text, source_of
from softlms.experiments.tokenized import tokenize_text


def write(folder, **texts):
    for split, text in texts.items():
        (folder / f"{split}.txt").write_text(text, encoding="utf-8")


def test_text_folder_in_wikitexts_layout(tmp_path):
    write(tmp_path, train=" = Title = \n a <unk> b\n", valid="v\n", test="t\n")
    assert load_text(tmp_path) == {"train": " = Title = \n a <unk> b\n", "validation": "v\n", "test": "t\n"}
    assert load_text(tmp_path, splits=("test",)) == {"test": "t\n"}


def test_splits_of_a_source(tmp_path):
    assert find_splits("hub") == find_splits("embedded") == ("train", "validation", "test")
    assert find_splits(tmp_path) == ()
    (tmp_path / "input.txt").write_text("one file", "utf-8")
    assert find_splits(tmp_path) == ("train", "validation", "test")
    write(tmp_path, test="t", valid="v")
    assert find_splits(tmp_path) == ("validation", "test")
    with pytest.raises(FileNotFoundError, match="nowhere' does not exist"):
        find_splits(tmp_path / "nowhere")


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


def test_a_text_in_one_file_is_split_as_its_source_says(tmp_path):
    lines = [f"{i:03d} {'x' * (i % 7)}\n" for i in range(200)]
    write(tmp_path, input="".join(lines), SOURCE="where it is from")
    text = load_text(tmp_path)
    assert "".join(text[split] for split in ("train", "validation", "test")) == "".join(lines)
    assert all(part.endswith("\n") for part in text.values())
    sizes = [len(part) / len("".join(lines)) for part in text.values()]
    assert sizes == pytest.approx([0.8, 0.1, 0.1], abs=0.01)
    assert load_text(tmp_path, splits=("test",)) == {"test": text["test"]}
    assert source_of(tmp_path, text) == f"folder: {tmp_path.name}, input.txt split 80/10/10 %"
    write(tmp_path, input="one line without an end")
    with pytest.raises(ValueError, match=r"input\.txt is too short to be split: its validation part"):
        load_text(tmp_path)
    write(tmp_path, train="a split file counts")
    with pytest.raises(FileNotFoundError, match="no file of the validation split"):
        load_text(tmp_path)


def test_source_says_what_the_words_are(tmp_path):
    """Perplexity on WikiText-2 with <unk> is another number than on the raw text."""
    for text, marked in (("raw words", ""), ("the <unk> words", ", tokenised with <unk>")):
        write(tmp_path, train=text, valid="v", test="t")
        assert tokenize_text(tmp_path, 257, tmp_path / "runs").source == f"folder: {tmp_path.name}{marked}"
    assert source_of("embedded", {}) == "docstrings of installed libraries"


def test_hub(monkeypatch, tmp_path):
    from datasets import Dataset, DatasetDict

    def hub(*names, revision="main"):
        assert names == ("Salesforce/wikitext", "wikitext-2-raw-v1")
        asked.append(revision)
        return DatasetDict({s: Dataset.from_dict({"text": [s, "\n"]}) for s in ("train", "validation", "test")})

    asked = []
    monkeypatch.setattr("datasets.load_dataset", hub)
    assert load_text("hub")["validation"] == "validation\n"
    assert tokenize_text("hub@v1", 257, tmp_path).source == "hub: WikiText-2 raw@v1"
    assert asked == ["main", "v1"]


@pytest.mark.slow
def test_embedded_text_says_nothing_twice():
    text = load_text("embedded", libraries=corpus.SMALL_LIBRARIES)
    paragraphs = {split: [" ".join(p.split()) for p in part.split("\n\n")] for split, part in text.items()}
    every = [p for part in paragraphs.values() for p in part]
    assert len(every) == len(set(every))
    assert len(text["train"]) > 3_000_000 and len(text["test"]) > 200_000
    assert len(paragraphs["train"]) > 3 * max(len(paragraphs["validation"]), len(paragraphs["test"]))
