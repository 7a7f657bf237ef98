import json
from importlib import import_module

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from test_project import ROOT

from softlms.workbook.plots.drawing import check_drawing, draw
from softlms.workbook.registry import read_registry

RESULTS, FIGURES = ROOT / "results" / "laptop", ROOT / "figures" / "laptop"
# the quickstart has no laptop figure; 11 to 16 and the parts of learned ranks were not run with laptop yet; a variant
# has figures where its tables are
COMMITTED = [
    name
    for book in read_registry(ROOT).values()
    for name, drawing in book.figures.items()
    if not name.startswith(("00", "11", "12", "13", "14", "15", "16", "04_static_vs_adaptive_rank_ingredients"))
    if not drawing.variant or any((RESULTS / f"{table}.csv").is_file() for table in drawing.tables)
]


@pytest.fixture(autouse=True)
def at_home(monkeypatch):
    monkeypatch.chdir(ROOT)
    yield
    plt.close("all")


def test_every_figure_has_a_function():
    plots = {drawing.plot for book in read_registry(ROOT).values() for drawing in book.figures.values()}
    for module, function in (plot.split(".") for plot in plots):
        assert callable(getattr(import_module(f"softlms.workbook.plots.{module}"), function))


@pytest.mark.parametrize("name", COMMITTED)
def test_committed_figures_are_drawn_from_the_committed_rows(name):
    assert check_drawing(name, FIGURES, RESULTS) == []


def test_the_same_rows_are_the_same_bytes(tmp_path):
    first, again = (draw("09_speedup", tmp_path / place, RESULTS) for place in ("a", "b"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]
    assert {path.suffix for path in first} == {".png", ".pdf", ".json"}


def test_a_figure_whose_rows_changed_is_found(tmp_path):
    results = tmp_path / "results"
    results.mkdir()
    table = results / "03_block_sensitivity.csv"
    table.write_bytes((RESULTS / table.name).read_bytes())
    png, _, note = draw("03_block_sensitivity", tmp_path, results)
    assert check_drawing("03_block_sensitivity", tmp_path, results) == []
    assert json.loads(note.read_text("utf-8"))["tables"][0]["rows"] == len(pd.read_csv(table))
    png.write_bytes(png.read_bytes()[:-1])
    table.write_text(table.read_text("utf-8").replace("0.8", "0.9", 1), "utf-8")
    wrong = check_drawing("03_block_sensitivity", tmp_path, results)
    assert len(wrong) == 2 and all("draw it again" in line for line in wrong)
    table.unlink()
    assert "is missing" in check_drawing("03_block_sensitivity", tmp_path, results)[0]
    note.unlink()
    assert "03_block_sensitivity.json is missing" in check_drawing("03_block_sensitivity", tmp_path, results)[0]


@pytest.mark.parametrize("spoil", [{"tables": []}, {"files": []}, {"figure": "09_speedup"}, None])
def test_a_note_that_names_less_is_found(tmp_path, spoil):
    *_, note = draw("03_block_sensitivity", tmp_path, RESULTS)
    note.write_text(json.dumps(json.loads(note.read_text("utf-8")) | spoil) if spoil else "{}", "utf-8")
    (wrong,) = check_drawing("03_block_sensitivity", tmp_path, RESULTS)
    assert "draw it again" in wrong


def test_nothing_is_written_where_a_table_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="Run the notebook that writes it"):
        draw("09_speedup", tmp_path / "figures", tmp_path)
    with pytest.raises(ValueError, match="Unknown figure '99'"):
        draw("99", tmp_path / "figures", tmp_path)
    assert not list(tmp_path.iterdir())
