from concurrent.futures import ThreadPoolExecutor

import pandas as pd

from softlms import provenance
from softlms.provenance import append_rows


def test_rows_of_two_processes_are_all_there(tmp_path, monkeypatch):
    """Threads stand for processes: the lock is between open files."""
    monkeypatch.setattr(provenance, "process_mark", iter(map("here-{}".format, range(1000))).__next__)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda i: append_rows(tmp_path / "new/rows.csv", pd.DataFrame({"i": [i]})), range(20)))
    assert sorted(pd.read_csv(tmp_path / "new/rows.csv").i) == list(range(20))
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"rows.csv", ".rows.csv.lock"}
