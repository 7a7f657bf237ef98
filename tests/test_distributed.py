"""Two processes with a batch each are one process with twice the batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

RUN = Path(__file__).with_name("distributed_run.py")


def torchrun(processes, script, *arguments):
    # accelerate's launcher starts several CPU processes by MPI only; torchrun does what it does
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command += [str(RUN.with_name(script)), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, encoding="utf-8", env=environment, timeout=300)


def start(folder, processes, batch, count="linear"):
    folder.mkdir()
    done = torchrun(processes, RUN.name, folder, batch, count)
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
def test_a_deployed_model_trains_sharded_and_a_soft_one_cannot(tmp_path):
    """What README's FSDP configuration does on GPUs, by the same function on two CPU processes."""
    done = torchrun(2, "sharded_run.py", "deployed", tmp_path / "saved")
    assert done.returncode == 0, done.stderr[-3000:]
    assert float(done.stdout.split("distance ")[1]) < 1e-4
    done = torchrun(2, "sharded_run.py", "soft")
    assert done.returncode != 0 and "doesn't support scalar parameters" in done.stderr
