"""The command itself: what it imports, and its options."""

import ast
import dataclasses
import sys

import pytest
from test_project import ROOT, imports

from softlms import cli
from softlms.compress import Compression

STATED = {
    "figures": "profile quick, jobs 1",
    "gallery": "profile laptop, out site",
    "benchmark": "rounds 15, batch 16, tokens 64, threads 1, model minilm",
    "benchmark-scan": "rounds 3, batch 16, tokens 128, threads 2",
    "benchmark-speed": "keep 0.5, tokens 128, rounds 9",
    "full-size": "keep 0.5, count total, threads 2",
    "training-memory": "form soft, batch 1, tokens 128",
    "verify": "profile laptop",
}


def test_it_imports_nothing_before_a_command_is_known(capsys):
    tree = ast.parse((ROOT / "softlms/cli.py").read_text("utf-8"))
    assert {name.split(".")[0] for name in imports(tree.body)} <= {*sys.stdlib_module_names}
    for arguments, status, said in (
        (["--help"], 0, "benchmark-speed"),
        ([], 2, "required: command"),
        (["x"], 2, "'x'"),
    ):
        with pytest.raises(SystemExit) as ending:
            cli.main(arguments)
        assert ending.value.code == status and said in "".join(capsys.readouterr())


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_each_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as ending:
        cli.main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert ending.value.code == 0
    for default in filter(None, STATED.get(command, "").split(", ")):
        name, value = default.split()
        assert f"(default {value})" in text.split(name.upper())[-1]


def test_every_setting_of_compress_is_an_option():
    assert {*cli.COMMANDS["compress"][2].split()} == {field.name for field in dataclasses.fields(Compression)} | {"out"}


def test_ctrl_c_is_one_line(monkeypatch, capsys):
    def stop():
        raise KeyboardInterrupt

    monkeypatch.setattr("softlms.workbook.doctor.print_findings", stop)
    assert cli.main(["doctor"]) == 130
    assert capsys.readouterr().err == "softlms doctor: stopped.\n"
