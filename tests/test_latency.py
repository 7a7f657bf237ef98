import pytest
import torch

from softlms.latency import step_times


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
