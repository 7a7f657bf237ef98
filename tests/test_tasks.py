import pytest
from transformers import AutoTokenizer

from softlms.data import corpus
from softlms.data.tasks import TASKS, encode, load_task

# each as GLUE's downloads have it: byte-order mark, quotes that do not close, no header
FILES = {
    "mrpc": (
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n",
        '1\t1\t2\tHe said "yes.\tHe agreed.\n',
        [{"sentence1": 'He said "yes.', "sentence2": "He agreed.", "label": 1}],
    ),
    "sst2": ("sentence\tlabel\n", "a charming journey \t1\n", [{"sentence": "a charming journey ", "label": 1}]),
    "rte": (
        "index\tsentence1\tsentence2\tlabel\n",
        "0\tIt rained.\tIt was wet.\tnot_entailment\n",
        [{"sentence1": "It rained.", "sentence2": "It was wet.", "label": 1}],
    ),
    "cola": ("", "gj04\t0\t*\tThem went.\n", [{"sentence": "Them went.", "label": 0}]),
    "stsb": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n",
        "0\tmain\tf\t2012\t1\tn\tn\tA plane.\tAn airplane.\t4.750\n",
        [{"sentence1": "A plane.", "sentence2": "An airplane.", "label": 4.75}],
    ),
}
FOLDERS = {"mrpc": "MRPC", "sst2": "SST-2", "rte": "RTE", "cola": "CoLA", "stsb": "STS-B"}


def write(root, name, folder=None, **changes):
    header, row, _ = FILES[name]
    place = root / (folder or FOLDERS[name])
    place.mkdir(exist_ok=True)
    for file in ("train.tsv", "dev.tsv"):
        (place / file).write_text(changes.get(file.split(".")[0], header + row * 3), encoding="utf-8")
    return place


@pytest.mark.parametrize("name", FILES)
def test_reads_glues_own_files(tmp_path, name):
    write(tmp_path, name)
    data = load_task(name, tmp_path)
    assert data.splits["train"].to_list() == FILES[name][2] * 3
    assert set(data.splits) == {"train", "dev"}


@pytest.mark.parametrize("folder", ["mrpc", "MRPC"])
def test_folder_itself_or_its_parent(tmp_path, folder):
    place = write(tmp_path, "mrpc", folder)
    assert len(load_task("mrpc", tmp_path).splits["dev"]) == len(load_task("mrpc", place).splits["dev"]) == 3


def test_labelled_test_split_of_mrpc(tmp_path):
    place = write(tmp_path, "mrpc")
    (place / "msr_paraphrase_test.txt").write_text("".join(FILES["mrpc"][:2]), encoding="utf-8")
    assert load_task("mrpc", tmp_path).splits["test"].to_list() == FILES["mrpc"][2]


def test_carriage_returns_and_odd_characters_do_not_break_rows(tmp_path):
    header, row, expected = FILES["rte"]
    write(tmp_path, "rte", train=(header + row.replace("rained", "ra\u2028ined")).replace("\n", "\r\n"))
    rows = load_task("rte", tmp_path).splits["train"].to_list()
    assert rows == [expected[0] | {"sentence1": "It ra\u2028ined."}]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("rte", "0\tonly\tthree\n", r"train\.tsv, line 3: 3 fields where 4 are expected"),
        ("rte", "0\ta\tb\tmaybe\n", r"train\.tsv, line 3: label 'maybe' is none of entailment, not_entailment"),
        ("rte", "0\t\tb\tentailment\n", r"train\.tsv, line 3: a sentence is empty"),
        ("cola", "gj04\t0\t*\n", r"train\.tsv, line 2: 3 fields where 4 are expected"),
        ("stsb", "0\tm\tf\t1\t1\tn\tn\ta\tb\tnan\n", r"train\.tsv, line 3: score 'nan' is not finite"),
        ("stsb", "0\tm\tf\t1\t1\tn\tn\ta\tb\thigh\n", r"train\.tsv, line 3: could not convert"),
    ],
)
def test_broken_row_names_file_and_line(tmp_path, name, text, message):
    header, row, _ = FILES[name]
    write(tmp_path, name, train=header + row + text)
    with pytest.raises(ValueError, match=message):
        load_task(name, tmp_path)


def test_wrong_header_empty_file_and_encoding(tmp_path):
    place = write(tmp_path, "sst2", train="text\tlabel\nx\t1\n")
    with pytest.raises(ValueError, match="no column 'sentence' in the header"):
        load_task("sst2", tmp_path)
    (place / "train.tsv").write_text("sentence\tlabel\n", "utf-8")
    with pytest.raises(ValueError, match="contains no rows"):
        load_task("sst2", tmp_path)
    (place / "train.tsv").write_bytes(b"sentence\tlabel\n\xff\xfe\t1\n")
    with pytest.raises(ValueError, match="is not UTF-8"):
        load_task("sst2", tmp_path)


def test_missing_folder_task_and_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_task("mrpc", tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="No 'mrpc' in data folder"):
        load_task("mrpc", tmp_path)
    (write(tmp_path, "mrpc") / "dev.tsv").unlink()
    with pytest.raises(FileNotFoundError, match="the dev split of mrpc"):
        load_task("mrpc", tmp_path)


def test_unknown_task_and_wrong_source(tmp_path):
    with pytest.raises(ValueError, match="Unknown task 'qqp'; known: mrpc"):
        load_task("qqp", tmp_path)
    for name, source in (("mrpc", "embedded"), ("docpairs", "hub")):
        with pytest.raises(ValueError, match="is not in source"):
            load_task(name, source)


def test_hub_splits(monkeypatch):
    """What the hub sends: hidden test labels are -1, and such a split is not offered."""
    from datasets import Dataset, DatasetDict

    def hub(test_label):
        rows = {"sentence1": ["a"], "sentence2": ["b"], "idx": [0]}
        split = {"train": 1, "validation": 0, "test": test_label}
        return DatasetDict({name: Dataset.from_dict(rows | {"label": [label]}) for name, label in split.items()})

    asked = []
    for label, expected in ((1, {"train", "dev", "test"}), (-1, {"train", "dev"})):
        monkeypatch.setattr(
            "datasets.load_dataset", lambda *names, label=label, **how: asked.append((*names, how)) or hub(label)
        )
        assert set(load_task("mrpc", "hub").splits) == expected
    assert asked[0] == ("nyu-mll/glue", "mrpc", {})
    data = load_task("mrpc", "hub@v1")
    assert asked[-1] == ("nyu-mll/glue", "mrpc", {"revision": "v1"}) and data.source == "hub: nyu-mll/glue/mrpc@v1"
    with pytest.raises(ValueError, match="'hub@' is not name@revision"):
        load_task("mrpc", "hub@")


@pytest.mark.slow
def test_embedded_task_has_no_leak_between_splits():
    splits = load_task("docpairs", "embedded").splits
    sentences = {name: {*rows["sentence1"], *rows["sentence2"]} for name, rows in splits.items()}
    assert not sentences["train"] & sentences["dev"]
    assert not sentences["train"] & sentences["test"]
    assert not sentences["dev"] & sentences["test"]
    assert all(len(rows) > 200 and sum(rows["label"]) * 2 == len(rows) for rows in splits.values())


@pytest.mark.slow
def test_embedded_task_is_the_same_each_time():
    first = corpus.sentence_pairs()
    corpus.sentence_pairs.cache_clear()
    corpus.docstrings.cache_clear()
    assert corpus.sentence_pairs() == first


def test_a_word_count_cannot_solve_the_embedded_task():
    """Both labels have the same first sentences, and partners of about the same length."""
    rows = corpus.sentence_pairs()["train"]
    mean = [sum(len(r["sentence2"].split()) for r in rows if r["label"] == y) / len(rows) * 2 for y in (0, 1)]
    assert abs(mean[0] - mean[1]) < 1
    assert {r["sentence1"] for r in rows if r["label"]} == {r["sentence1"] for r in rows if not r["label"]}


def test_missing_library():
    with pytest.raises(ModuleNotFoundError, match="no_such_library: install it"):
        corpus.docstrings(("no_such_library",))


@pytest.fixture(scope="module")
def tokenizer():
    from softlms.data.encoders import find_encoder

    return AutoTokenizer.from_pretrained(find_encoder("minilm").location)


def test_encode(tokenizer, tmp_path):
    write(tmp_path, "stsb")
    rows = encode(load_task("stsb", tmp_path), tokenizer)["train"]
    assert tokenizer.decode(rows[0]["input_ids"]) == "[CLS] a plane. [SEP] an airplane. [SEP]"
    assert rows[0]["labels"] == 4.75 and rows[0]["length"] == len(rows[0]["input_ids"])
    short = encode(load_task("stsb", tmp_path), tokenizer, max_length=5)["dev"]
    assert set(short["length"]) == {5}
    with pytest.raises(ValueError, match="max_length must be at least 5, got 4"):
        encode(load_task("stsb", tmp_path), tokenizer, max_length=4)


def test_metrics_of_tasks_are_known():
    from softlms.evaluation.metrics import METRICS

    assert {metric for task in TASKS.values() for metric in task.metrics} <= set(METRICS)
