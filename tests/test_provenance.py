from concurrent.futures import ThreadPoolExecutor

import pandas as pd

from softlms.data.hub import weights_hash
from softlms.experiments import provenance
from softlms.experiments.provenance import append_rows


def test_rows_of_two_processes_are_all_there(tmp_path, monkeypatch):
    """Threads stand for processes: the lock is between open files."""
    monkeypatch.setattr("softlms.utils.files.process_mark", iter(map("here-{}".format, range(1000))).__next__)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda i: append_rows(tmp_path / "new/rows.csv", pd.DataFrame({"i": [i]})), range(20)))
    assert sorted(pd.read_csv(tmp_path / "new/rows.csv").i) == list(range(20))
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"rows.csv", ".rows.csv.lock"}


def test_rows_that_are_there_stay_as_they_were_written(tmp_path, monkeypatch):
    """Commits that read like numbers, whole numbers beside a row that lacks them, and names that read like nothing."""
    file, commits = tmp_path / "rows.csv", iter(("12345e6789", "0123456789", "abcdef0123"))
    monkeypatch.setattr(provenance, "commit", lambda: next(commits))
    append_rows(file, pd.DataFrame({"model": ["null"], "x": [123456789], "y": [1 / 3]}))
    first = file.read_text("utf-8").splitlines()[1]
    append_rows(file, pd.DataFrame({"model": ["b"], "y": [0.5]}))
    append_rows(file, pd.DataFrame({"model": ["c"], "z": [True]}))
    assert first == "null,123456789,0.333333,12345e6789"
    assert file.read_text("utf-8").splitlines() == [
        "model,x,y,commit,z", f"{first},", "b,,0.5,0123456789,", "c,,,abcdef0123,True",
    ]  # fmt: skip


def test_other_weights_in_the_same_folder_have_another_hash(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"some weights")
    before = weights_hash(str(tmp_path))
    assert weights_hash(str(tmp_path)) == before
    (tmp_path / "model.safetensors").write_bytes(b"other weight")
    assert weights_hash(str(tmp_path)) != before
