import pytest
import torch

from softlms.experiments.latency import step_times


def test_every_form_is_timed_and_the_model_left_alone(tiny_bert):
    model = tiny_bert()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    threads = torch.get_num_threads()
    seconds = step_times(model, batch=2, tokens=8, rounds=3)
    assert list(seconds) == ["dense", "soft, full rank", "soft, at the budget"]
    assert all(len(taken) == 3 and min(taken) > 0 for taken in seconds.values())
    assert torch.get_num_threads() == threads
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", ["batch", "tokens", "rounds", "threads"])
def test_wrong_numbers(tiny_bert, name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        step_times(tiny_bert(), **{name: 0})


def test_command_prints_and_writes_a_table(tiny_bert, tmp_path, capsys):
    from softlms.cli import main

    tiny_bert(vocab_size=300).save_pretrained(tmp_path / "bert")
    out = tmp_path / "new" / "steps.csv"
    options = ["--model", str(tmp_path / "bert"), "--rounds", "2", "--batch", "2", "--tokens", "8", "--out", str(out)]
    assert main(["benchmark", *options]) == 0
    assert "soft, at the budget" in capsys.readouterr().out
    header, dense, *others = out.read_text("utf-8").splitlines()
    assert header.startswith("form,median_ms") and dense.startswith("dense,") and len(others) == 2
