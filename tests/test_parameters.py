import nbformat
import pytest

from softlms.workbook.parameters import assign_parameters, parse_value, split_assignments

KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}


def write(path, parameters):
    cell = nbformat.v4.new_code_cell(parameters)
    cell.metadata["tags"] = ["parameters"]
    nbformat.write(nbformat.v4.new_notebook(metadata={"kernelspec": KERNEL}, cells=[cell]), path)
    return path


@pytest.mark.parametrize(
    ("text", "default", "value"),
    [
        ("1e-3", 0.5, 1e-3),
        ("1", 0.5, 1.0),
        ("-3", 0, -3),
        ("TRUE", False, True),
        ("false", True, False),
        ("1", "", "1"),
        ("a=b", "", "a=b"),
        ("[1, 2]", (0,), [1, 2]),
        ("('a',)", ["b"], ["a"]),
        ("{'a': 1}", {}, {"a": 1}),
    ],
)
def test_a_value_is_of_its_defaults_type(text, default, value):
    parsed = parse_value("x", text, default)
    assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize(
    ("text", "default", "expected"),
    [
        ("1.0", 0, "whole number, such as 0"),
        ("many", 0.1, "number, such as 0.1"),
        ("1", True, "true or false, such as True"),
        ("3", [1], "list, such as [1]"),
        ("a, b", (1,), "list, such as (1,)"),
        ("[1]", {}, "dict, such as {}"),
    ],
)
def test_a_wrong_type_is_named(text, default, expected):
    with pytest.raises(ValueError) as error:
        parse_value("x", text, default)
    assert str(error.value) == f"Parameter 'x' is {text!r}; expected: {expected}."


def test_a_folder_is_meant_from_where_the_user_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mrpc").mkdir()
    assert parse_value("x", "./mrpc", "") == str(tmp_path / "mrpc")
    assert parse_value("x", "mrpc", "") == "mrpc"  # a task's name
    assert parse_value("x", "org/model", "") == "org/model"


def test_each_notebook_gets_what_it_declares(tmp_path):
    one = write(tmp_path / "01_one.ipynb", "rate = 0.1  # a help\nname = 'a'")
    two = write(tmp_path / "02_two.ipynb", "rate = 1\nseeds: list = [1]")
    assert assign_parameters([one, two], {"rate": "2", "seeds": "[3]"}) == {
        one: {"rate": 2.0},
        two: {"rate": 2, "seeds": [3]},
    }
    with pytest.raises(ValueError, match="'size': none of 01_one, 02_two has it; known: name, rate, seeds."):
        assign_parameters([one, two], {"size": "2"})
    broken = write(tmp_path / "03_broken.ipynb", "rate = 2 * 3")
    with pytest.raises(ValueError, match="03_broken.ipynb: the default of 'rate' is 2 \\* 3, not a literal"):
        assign_parameters([broken], {})


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (["rate"], "-p 'rate' is not a parameter: write -p name=value"),
        (["=1"], "-p '=1' is not a parameter"),
        (["data=x"], "write --data instead"),
        (["a=1", "a=2"], "'a' is given twice: '1' and '2'"),
    ],
)
def test_assignments_that_are_none(pairs, message):
    with pytest.raises(ValueError, match=message):
        split_assignments(pairs)
