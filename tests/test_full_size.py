from pathlib import Path

import pandas as pd
import pytest
import torch
import transformers

from softlms import cli
from softlms.architectures import find_targets
from softlms.budget import count_parameters, parameter_costs
from softlms.experiments.full_size import FULL_SIZE, compress_full_size, find_full_size, half_ranks, stretch_ranks
from softlms.experiments.language_models import FAMILIES, SmallModel
from softlms.surgery import shrink

RESULTS = Path(__file__).parents[1] / "results" / "laptop"
# parameters as the models' authors count them, tied heads once
PUBLISHED = {"bert-base": 109.5e6, "gpt2": 124.4e6, "tinyllama-1.1b": 1100e6, "mamba-130m": 129.1e6}


@pytest.mark.parametrize("model", FULL_SIZE)
def test_configurations_are_the_published_ones(model):
    name, config = FULL_SIZE[model]
    with torch.device("meta"):
        total = sum(p.numel() for p in getattr(transformers, name)(config()).parameters())
    assert total == pytest.approx(PUBLISHED[model], rel=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_is_compressed_and_computes_the_same(tmp_path, family):
    config = SmallModel(family, hidden=64, layers=2, vocabulary=300).config
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    result = compress_full_size(str(tmp_path), keep=0.6, count="linear", threads=1, split=family == "gpt2")
    assert result["error"] < 1e-4 and 0.59 < result["kept_linear"] <= 0.6 < result["kept_total"] < 1
    assert result["parameters_total"] == sum(p.numel() for p in model.parameters())
    assert result["peak_gb"] > 0.05 and all(result[f"{step}_s"] > 0 for step in ("build", "decompose", "deploy"))


def test_command_and_its_csv(tmp_path, capsys):
    out = tmp_path / "sizes.csv"
    arguments = ["mamba-130m", "--layers", "1", "--count", "linear", "--threads", "1", "--out", str(out)]
    for _ in range(2):
        assert cli.main(["full-size", *arguments]) == 0
    assert "mamba-130m, 1 blocks" in capsys.readouterr().out
    rows = pd.read_csv(out)
    assert len(rows) == 2 and (rows.blocks == 1).all() and (rows.error < 1e-4).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gpt2", "--layers", "13"], "layers must be 1 to 12, got 13"),
        (["gpt2", "--keep", "0.2"], "cannot be met"),
        (["/nowhere/model"], "/nowhere/model"),
    ],
)
def test_bad_input(arguments, message, capsys):
    assert cli.main(["full-size", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("results", [None, RESULTS])
@pytest.mark.parametrize("model", FULL_SIZE)
def test_half_of_the_total_in_multiples_of_16(model, results):
    with torch.device("meta"):
        dense = find_full_size(model, None)[0](None)
    ranks = half_ranks(model, dense, results=results)
    counted = count_parameters(shrink(dense, ranks))
    assert 0.498 < counted.kept("total") <= 0.5
    assert all(rank % 16 == 0 for rank in ranks.values())
    if results is not None:  # learned ranks differ from block to block
        blocks = {}
        for target in find_targets(dense):
            blocks.setdefault(target.symbol, set()).add(ranks[target.name])
        assert max(len(different) for different in blocks.values()) > 3


def test_a_stretched_profile_keeps_its_proportions():
    small = {f"h.{block}.fc": (64, 64) for block in range(3)}
    ranks = {"h.0.fc": 8, "h.1.fc": 16, "h.2.fc": 32}
    large = parameter_costs({f"h.{block}.fc": (512, 512) for block in range(6)})
    stretched = stretch_ranks(ranks, small, large, 0.4 * large.dense, 4)
    values = [stretched[f"h.{block}.fc"] for block in range(6)]
    assert values == pytest.approx([values[5] / share for share in (4, 4, 2, 2, 1, 1)], abs=4)
    assert large.of(stretched) <= 0.4 * large.dense < large.of(stretched) + 6 * 4 * 1024
    with pytest.raises(ValueError, match="pooler.dense is in no numbered block"):
        stretch_ranks({"pooler.dense": 3}, {"pooler.dense": (9, 9)}, large, 1e9)
