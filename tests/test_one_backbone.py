"""One small backbone for several tasks: cut once, and served with an adapter for each."""

from dataclasses import replace

import pytest

from softlms import count_parameters
from softlms.experiments.one_backbone import serve, small_backbone
from softlms.experiments.recipe import Recipe

RECIPE = Recipe(start="pretrained", distillation=0.0, dense_epochs=1, epochs=2, keep=0.5)


@pytest.fixture
def backbone(bench):
    return small_backbone({"docpairs": bench}, 0.5)


def test_a_backbone_is_cut_once(bench, backbone):
    again = small_backbone({"docpairs": bench}, 0.5)
    smaller = small_backbone({"docpairs": bench}, 0.4)
    assert again == backbone and smaller.location != backbone.location
    assert "50% of its linears kept" in backbone.source
    kept = [count_parameters(place.for_task(bench.data.task)).kept("linear") for place in (backbone, smaller)]
    assert 0.45 < kept[0] <= 0.5 and kept[1] <= 0.4


def test_adapters_on_one_backbone_are_served_as_they_were_trained(bench, backbone):
    """Two adapters in one model: each scores what its own run stored."""
    on_one = replace(bench, encoder=backbone)
    recipes = {
        name: RECIPE.changed(settings={"lora-xs": {"r": 4, "adapter_learning_rate": rate}})
        for name, rate in (("one", 1e-3), ("other", 1e-1))
    }
    runs = {name: on_one.run("lora-xs", recipe, 0) for name, recipe in recipes.items()}
    adapters = {
        name: on_one.folder_of("lora-xs", recipe, 0) / "trainer" / "adapter" for name, recipe in recipes.items()
    }
    scores = serve(backbone, dict.fromkeys(adapters, on_one), adapters)
    for name, run in runs.items():
        assert scores[name] == pytest.approx(run.result["scores"]["dev"], abs=1e-6)
    assert all(run.result["kept_linear"] <= 0.5 for run in runs.values())  # merged without growing
    assert scores["one"] != scores["other"]
