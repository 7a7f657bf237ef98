"""Two processes with a batch each are one process with twice the batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import fsdp_run
import pytest
import torch
from transformers import LlamaForCausalLM

import softlms

RUN = Path(__file__).with_name("distributed_run.py")


def torchrun(processes, script, *arguments):
    # accelerate's launcher starts several CPU processes by MPI only; torchrun does what it does
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command += [str(RUN.with_name(script)), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, encoding="utf-8", env=environment, timeout=300)


def start(folder, processes, batch, last="linear", script=RUN.name):
    folder.mkdir()
    done = torchrun(processes, script, folder, batch, last)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"result-{i}.json").read_text("utf-8")) for i in range(processes)]


@pytest.mark.slow
def test_two_processes_learn_the_ranks_of_one_with_twice_the_batch(tmp_path):
    (one,) = start(tmp_path / "one", 1, 16)
    two = start(tmp_path / "two", 2, 8)
    assert [result["processes"] for result in (one, *two)] == [1, 2, 2]
    assert two[0]["ranks"] == two[1]["ranks"] and two[0]["alphas"] == two[1]["alphas"]
    assert two[0]["sigma"] == two[1]["sigma"]
    assert 0 < one["frozen_at"] == two[0]["frozen_at"]
    assert two[0]["alphas"] == pytest.approx(one["alphas"], rel=1e-3)
    assert one["losses"] == pytest.approx(two[0]["losses"], rel=2e-3)
    close = [abs(two[0]["ranks"][name] - rank) <= 1 for name, rank in one["ranks"].items()]
    assert all(close) and sum(two[0]["ranks"][n] == r for n, r in one["ranks"].items()) >= 10


@pytest.mark.slow
def test_rows_count_by_their_labels_whichever_process_has_them(tmp_path):
    """8 rows of differing length: 2 processes x 2 rows x 2 accumulated batches are one batch of 8."""
    gradients = []
    for processes, batch, accumulate in ((1, 8, 1), (2, 2, 2)):
        file = tmp_path / f"{processes}.pt"
        done = torchrun(processes, "ragged_run.py", file, batch, accumulate)
        assert done.returncode == 0, done.stderr[-3000:]
        gradients.append(torch.load(file))
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 10
    for name, expected in gradients[0].items():
        assert (gradients[1][name] - expected).norm() <= 1e-4 * expected.norm(), name


@pytest.mark.slow
def test_processes_that_measured_other_times_learn_the_same_ranks(tmp_path):
    two = start(tmp_path / "two", 2, 8, "latency")
    assert two[0]["ranks"] == two[1]["ranks"] and two[0]["sigma"] == two[1]["sigma"]
    assert two[0]["frozen_at"] == two[1]["frozen_at"]


@pytest.mark.slow
def test_a_deployed_model_trains_sharded_and_a_soft_one_needs_its_trainer(tmp_path):
    """What README's FSDP configuration does on GPUs, by the same function on two CPU processes."""
    done = torchrun(2, "sharded_run.py", "deployed", tmp_path / "saved")
    assert done.returncode == 0, done.stderr[-3000:]
    assert float(done.stdout.split("distance ")[1]) < 1e-4
    done = torchrun(2, "sharded_run.py", "soft")
    assert done.returncode != 0 and "doesn't support scalar parameters" in done.stderr


def start_sharded(folder, processes, batch, **options):
    """The results of the processes, which have agreed on everything."""
    results = start(folder, processes, batch, json.dumps(options), "fsdp_run.py")
    assert all(result == results[0] for result in results) and results[0]["processes"] == processes
    return results[0]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """What one process learns from the same rows at each step, without FSDP."""
    run = fsdp_run.trainer(tmp_path_factory.mktemp("one"), 12, shard=False)
    run.train()
    return fsdp_run.result(run)


def check_same(found, expected):
    assert found["ranks"] == expected["ranks"] and found["frozen_at"] == expected["frozen_at"]
    for name in ("alphas", "losses", "eval_loss"):
        assert found[name] == pytest.approx(expected[name], rel=1e-4), name
    for name, sigma in expected["sigma"].items():
        assert found["sigma"][name] == pytest.approx(sigma, rel=1e-4, abs=1e-5), name


def test_ranks_learned_in_shards_are_those_of_one_process_with_twice_the_batch(tmp_path, one):
    two = start_sharded(tmp_path / "two", 2, 6)
    check_same(two, one)
    assert 0 < one["frozen_at"] < 12 and len(set(one["ranks"].values())) > 5  # met, with ranks that were learned
    assert two["whole"] == sorted(f"{name}.{part}" for name in one["ranks"] for part in ("sigma", "threshold.alpha"))
    deploying, saving = two["refused"]
    assert "trainer.save_model(folder), then load and deploy it in one process" in deploying
    assert "save it with trainer.save_model(folder), called by every process" in saving

    model = LlamaForCausalLM.from_pretrained(tmp_path / "two" / "saved")
    assert softlms.ranks(model) == one["ranks"]
    rows = fsdp_run.trainer(tmp_path, 12, shard=False).eval_dataset.with_format("torch")[:]
    with torch.no_grad():
        assert softlms.deploy(model)(**rows).loss.item() == pytest.approx(two["eval_loss"], rel=1e-5)


@pytest.mark.slow
def test_a_sharded_run_is_resumed_by_another_number_of_processes(tmp_path, one):
    """Before the cut, and at the cut, where the optimizer starts anew; three processes have shards of unequal size."""
    saved = {"save_strategy": "steps", "save_steps": 1}
    check_same(start_sharded(tmp_path / "two", 2, 6, **saved), one)
    for processes, step in ((1, one["frozen_at"] - 3), (3, one["frozen_at"])):
        checkpoint = str(tmp_path / "two" / f"checkpoint-{step}")
        check_same(start_sharded(tmp_path / str(processes), processes, 12 // processes, resumed=checkpoint), one)


@pytest.mark.slow
def test_sharded_batches_are_accumulated_activations_made_anew_and_the_best_model_loaded(tmp_path, one):
    options = {"gradient_accumulation_steps": 2, "gradient_checkpointing": True, "save_strategy": "steps"}
    options |= {"eval_strategy": "steps", "load_best_model_at_end": True, "metric_for_best_model": "loss"}
    check_same(start_sharded(tmp_path / "two", 2, 3, **options, save_steps=4, eval_steps=4), one)


@pytest.mark.slow
def test_a_checkpoint_of_a_run_without_shards_is_refused_by_one_with(tmp_path):
    fsdp_run.trainer(tmp_path / "one", 12, shard=False, save_strategy="steps", save_steps=4).train()
    done = torchrun(1, "fsdp_run.py", tmp_path, 12, json.dumps({"resumed": str(tmp_path / "one" / "checkpoint-4")}))
    assert done.returncode != 0 and "checkpoint-4 was not saved under FSDP: resume it without fsdp" in done.stderr
