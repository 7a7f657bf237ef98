"""Claims, their verdicts, and the generated tables held against the rows."""

import io
import json
import re
import shutil

import pandas as pd
import pytest
from rich.console import Console
from test_project import ROOT

from softlms.cli import main
from softlms.workbook.claims import (
    DIFFERS,
    NOT_COMPARABLE,
    NOT_RUN,
    REPRODUCED,
    WITHIN,
    claims_table,
    judge,
    load_claims,
)
from softlms.workbook.results_page import PAGE
from softlms.workbook.verify import verify

CLAIM = {
    "id": "better", "who": "softlms", "ground": "OURS", "text": "It is better.", "unit": "points", "profile": "laptop",
    "setup": "small", "file": "{profile}/scores.csv", "column": "value",
}  # fmt: skip


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results"
    (folder / "laptop").mkdir(parents=True)
    rows = [
        ("a", 0, 2.0, "bert"),
        ("a", 1, 4.0, "bert"),
        ("b", 0, 1.0, "bert"),
        ("b", 1, 1.5, "bert"),
        ("c", 0, None, "bert"),
    ]
    pd.DataFrame(rows, columns=["method", "seed", "value", "model"]).to_csv(folder / "laptop/scores.csv", index=False)
    shutil.copytree(folder / "laptop", folder / "quick")
    return folder


def toml(**fields):
    """One claim as text."""

    def show(value):
        if isinstance(value, dict):
            return "{ " + ", ".join(f"{json.dumps(name)} = {show(x)}" for name, x in value.items()) + " }"
        return json.dumps(value)

    return "[[claim]]\n" + "".join(f"{name} = {show(value)}\n" for name, value in fields.items())


def made(results, **fields):
    (results / "claims.toml").write_text(toml(**CLAIM | fields), "utf-8")
    (claim,) = load_claims(results / "claims.toml")
    return claim


A, B = {"where": {"method": "a"}}, {"method": "b"}


@pytest.mark.parametrize(
    ("fields", "measured", "verdict"),
    [
        (A | {"at_least": 3}, 3, REPRODUCED),
        (A | {"at_least": 3.1}, 3, DIFFERS),
        (A | {"at_least": 3.1, "tolerance": 0.2}, 3, WITHIN),
        (A | {"at_most": 2.5, "tolerance": 0.4}, 3, DIFFERS),
        (A | {"at_most": 3}, 3, REPRODUCED),
        (A | {"equals": 3.04}, 3, DIFFERS),
        (A | {"equals": 3.04, "tolerance": 0.04}, 3, WITHIN),
        (A, 3, REPRODUCED),  # only measured
        (A | {"equals": 300, "scale": 100}, 300, REPRODUCED),
        (A | {"at_least": 4, "aggregate": "max"}, 4, REPRODUCED),
        (A | {"equals": 2, "aggregate": "count"}, 2, REPRODUCED),
        (A | {"minus": B, "at_least": 1.75}, 1.75, REPRODUCED),
        (A | {"over": B, "equals": 2.4}, 2.4, REPRODUCED),
        ({"where": {"method": ["a", "b"], "seed": {"at_least": 1}}, "equals": 2.75}, 2.75, REPRODUCED),
        (A | {"at_least": 3, "needs": {"model": "bert", "seed": {"at_most": 1}}}, 3, REPRODUCED),
        (A | {"at_least": 3, "needs": {"model": "gpt2"}}, 3, NOT_COMPARABLE),
        (A | {"at_least": 3, "needs": {"budget": "total"}}, 3, NOT_COMPARABLE),  # rows that do not say so
        (A | {"at_least": 3, "profile": "paper", "who": "paper", "ground": "PAPER"}, 3, NOT_COMPARABLE),
        ({"where": {"method": "z"}, "at_least": 3}, None, NOT_RUN),
        ({"where": {"method": "c"}, "at_least": 3}, None, NOT_RUN),  # an interval that needs more seeds
        (A | {"minus": {"method": "z"}, "at_least": 3}, None, NOT_RUN),
        ({"file": "{profile}/nowhere.csv", "at_least": 3}, None, NOT_RUN),
    ],
)
def test_verdicts(results, fields, measured, verdict):
    judged = judge(made(results, **fields), results, "laptop")
    assert (judged.measured, judged.verdict) == (measured if measured is None else pytest.approx(measured), verdict)
    assert bool(judged.why) == (verdict in (NOT_COMPARABLE, NOT_RUN))


def test_quick_rows_are_never_judged(results):
    claim = made(results, **A, at_least=100)
    assert judge(claim, results, "laptop").verdict == DIFFERS
    quick = judge(claim, results, "quick")
    assert (quick.measured, quick.verdict) == (3, NOT_COMPARABLE)


def test_a_missing_number_is_not_left_out(results):
    claim = made(results, where={"method": ["a", "c"]}, aggregate="min", at_least=1)
    assert judge(claim, results, "laptop").verdict == NOT_RUN


def test_unknown_tables_are_refused(results):
    (results / "claims.toml").write_text("[[claims]]\nid = 'x'\n", "utf-8")
    with pytest.raises(ValueError, match="unknown table 'claims'"):
        load_claims(results / "claims.toml")


def test_a_number_in_text_is_found(results):
    table = pd.DataFrame({"setting": ["gamma 0.1 (untrained: 0.8885)"]})
    table.to_csv(results / "laptop/scores.csv", index=False)
    claim = made(results, column="setting", pattern=r"untrained: ([\d.]+)", equals=0.8885)
    assert judge(claim, results, "laptop").verdict == REPRODUCED


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"at_least": "3"}, "at_least"),
        ({"at_least": True}, "at_least"),
        ({"at_least": 3, "color": "red"}, "color"),
        ({"at_least": 3, "who": "us"}, "who"),
        ({"at_least": 3, "ground": "PAPER"}, "ground"),
        ({"at_least": 3, "profile": "huge"}, "profile"),
        ({"at_least": 3, "aggregate": "median"}, "aggregate"),
        ({"at_least": 3, "at_most": 4}, "at_least"),
        ({"at_least": 3, "minus": {}, "over": {}}, "minus"),
        ({"at_least": 3, "tolerance": -1}, "tolerance"),
        ({"at_least": 3, "where": {"seed": {"below": 1}}}, "where"),
        ({"at_least": 3, "says": {"README.md": "nothing"}}, "says"),
    ],
)
def test_a_malformed_claim_names_the_field(results, fields, field):
    with pytest.raises(ValueError, match=rf"claims.toml: claim 'better': field '{field}'"):
        made(results, **fields)


def test_missing_fields_repeated_ids_and_unknown_columns(results):
    path = results / "claims.toml"
    path.write_text(toml(**{name: value for name, value in CLAIM.items() if name != "unit"}, at_least=1), "utf-8")
    with pytest.raises(ValueError, match="claim 'better': field 'unit' is missing"):
        load_claims(path)
    path.write_text(2 * toml(**CLAIM, at_least=1), "utf-8")
    with pytest.raises(ValueError, match="claim 'better': field 'id' is used by two claims"):
        load_claims(path)
    with pytest.raises(ValueError, match="claim 'better': field 'where' names 'metod'"):
        judge(made(results, at_least=1, where={"metod": "a"}), results, "laptop")
    with pytest.raises(ValueError, match="claim 'better': field 'column' names 'f1'"):
        judge(made(results, at_least=1, column="f1"), results, "laptop")
    with pytest.raises(ValueError, match="claim 'better': field 'column': 'method' of .*scores.csv"):
        judge(made(results, at_least=1, column="method"), results, "laptop")


def test_command_on_the_committed_tree(capsys, monkeypatch):
    """The tables and every claim of ours are borne out by the committed rows."""
    monkeypatch.chdir(ROOT)
    assert main(["verify"]) == 0, capsys.readouterr().out
    assert main(["verify", "--profile", "huge"]) == 2
    assert "Unknown profile 'huge'; known: quick, laptop, paper" in capsys.readouterr().err


def test_committed_claims_judge_what_the_paper_says_nowhere():
    judged = [judge(claim, ROOT / "results", "laptop") for claim in load_claims(ROOT / "results/claims.toml")]
    of_paper = [one for one in judged if one.claim.who == "paper"]
    assert {one.verdict for one in of_paper} == {NOT_COMPARABLE} and all(one.measured for one in of_paper)
    assert {"paper-mrpc-adaptive": 90.7, "paper-mrpc-static": 86.4, "paper-mrpc-gain": 4.3}.items() <= {
        one.claim.id: one.claim.claimed for one in of_paper
    }.items()


def test_committed_table_of_claims_is_up_to_date():
    """Rows or claims have changed where this fails: softlms figures 10 --profile laptop."""
    judged = [judge(claim, ROOT / "results", "laptop") for claim in load_claims(ROOT / "results/claims.toml")]
    written = pd.read_csv(ROOT / "results/laptop/10_paper_vs_reproduced.csv")
    expected = pd.read_csv(io.StringIO(claims_table(judged).to_csv(index=False, float_format="%.6g")))
    pd.testing.assert_frame_equal(written[expected.columns], expected)


@pytest.fixture
def tree(tmp_path):
    """What verify reads, to be spoilt."""
    (tmp_path / "results").mkdir()
    for path in (ROOT / "results").glob("*.*"):
        shutil.copy(path, tmp_path / "results")
    (tmp_path / "results" / "laptop").symlink_to(ROOT / "results" / "laptop")
    for folder in ("docs", "notebooks"):
        (tmp_path / folder).mkdir()
    for name in ("README.md", PAGE, "notebooks/notebooks.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def change(path, old, new):
    text = path.read_text("utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), "utf-8")


def run(tree, **options):
    output = io.StringIO()
    return verify(root=tree, console=Console(file=output, width=300), **options), output.getvalue()


@pytest.mark.parametrize("name", ["README.md", PAGE])
def test_a_wrong_cell_fails_and_write_repairs_it(tree, name):
    path = tree / name
    whole = path.read_text("utf-8")
    change(path, "| 25.30\u00a0±", "| 25.20\u00a0±")
    status, output = run(tree)
    assert status == 1 and f"{name} has '| " in output and "25.30" in output and "--write" in output
    assert run(tree, write=True)[0] == 0
    assert path.read_text("utf-8") == whole
    stamp = path.stat().st_mtime_ns
    assert run(tree, write=True)[0] == 0 and path.stat().st_mtime_ns == stamp  # nothing to write, nothing written


def test_a_changed_row_fails(tree):
    scans = pd.read_csv(tree / "results/mamba_scan.csv")
    loop = scans.set_index("form").median_ms["transformers' loop"]
    scans.loc[scans.form == "softlms", "median_ms"] = loop / 4
    scans.to_csv(tree / "results/mamba_scan.csv", index=False)
    assert f"{PAGE} has '| softlms | 701 ms" in run(tree)[1]
    status, output = run(tree, write=True)
    assert status == 1 and "claim scan-10-times: DIFFERS: >= 10, measured 4" in output
    assert f"| softlms | {loop / 4:.0f} ms" in (tree / PAGE).read_text("utf-8")


def test_a_page_that_is_missing_or_goes_on_fails(tree):
    (tree / PAGE).write_text((tree / PAGE).read_text("utf-8") + "\nIt is 12 % better.\n", "utf-8")
    assert f"{PAGE} has '', the rows say 'nothing'" in run(tree)[1]
    (tree / PAGE).unlink()
    assert f"{PAGE} has 'nothing', the rows say '# Results'" in run(tree)[1]
    assert run(tree, write=True)[0] == 0


def test_markers_that_are_no_pair_write_nothing(tree):
    readme = tree / "README.md"
    for old, new in (
        ("<!-- end -->", ""),
        ("<!-- end -->", "<!-- end -->\n<!-- table: headline -->"),
        ("<!-- table: headline -->", "<!-- table: headlines -->"),
    ):
        shutil.copy(ROOT / "README.md", tree)
        change(readme, old, new)
        before = readme.read_text("utf-8")
        with pytest.raises(
            ValueError, match="README.md should have '<!-- table: headline -->' with its '<!-- end -->' once"
        ):
            run(tree, write=True)
        assert readme.read_text("utf-8") == before


def test_a_claim_without_rows_fails(tree):
    (tree / "results/training_step.csv").unlink()
    status, output = run(tree)
    assert status == 1 and "claim step-full-rank: NOT RUN: there is no results/training_step.csv" in output
    assert run(tree, profile="paper")[0] == 1  # it belongs to no profile


def test_a_profile_without_rows_breaks_no_claim(tree):
    status, output = run(tree, profile="paper")
    assert status == 0 and len(re.findall("NOT RUN", output)) > 30


def test_tables_that_follow_from_rows_are_made_again(tree):
    laptop = tree / "results/laptop"
    laptop.unlink()
    shutil.copytree(ROOT / "results/laptop", laptop)

    def spoil(name, how):
        table = pd.read_csv(laptop / f"{name}.csv")
        how(table).to_csv(laptop / f"{name}.csv", index=False)

    spoil("05_bert_table", lambda rows: rows.assign(value=rows.value - 0.05 * rows.method.eq("whitened+soft")))
    spoil("06_gpt2_table_summary", lambda rows: rows[rows.method != "whitened+mask"])
    spoil("07_tinyllama_table_verdicts", lambda rows: rows.assign(difference=rows.difference + 1))
    spoil("07_tinyllama_table_smollm2_summary", lambda rows: rows.assign(mean=rows["mean"] + 1))
    spoil("08_mamba_table_summary", lambda rows: rows.drop(columns="std"))
    spoil("04_static_vs_adaptive_rank_differences", lambda rows: rows.assign(low95=rows.low95 + 1))
    status, output = run(tree, write=True)
    assert status == 1
    for found in (
        "05_bert_table_summary.csv, row",
        "06_gpt2_table_summary.csv has ",
        "07_tinyllama_table_verdicts.csv, row 1: difference is",
        "07_tinyllama_table_smollm2_summary.csv, row 1: mean is",
        "08_mamba_table_summary.csv has no column std",
        "04_static_vs_adaptive_rank_differences.csv, row 1: low95 is",
    ):
        assert found in output
