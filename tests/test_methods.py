"""Methods plug in: one file and one registration, and they are in chains, tables, plots, folders and counts."""

import copy
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from folders import IDS, load, outputs
from torch import nn
from transformers import AutoModel, BertConfig

import softlms
from softlms.budget import count_parameters
from softlms.experiments.grid import Grid, Pass, Setting, run_grid
from softlms.experiments.recipe import Recipe
from softlms.experiments.report import Report
from softlms.methods import registry
from softlms.methods.base import Config, Method, Work
from softlms.methods.chain import configured, full_name, parse
from softlms.modules import Replacement
from softlms.origin import remember
from softlms.workbook.plots.grid_pictures import plot_quality

CONTRIBUTING = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text("utf-8")


@pytest.fixture(scope="module")
def thin(tmp_path_factory):
    """The method of CONTRIBUTING.md, from there, as a module that other processes can import."""
    (code,) = re.findall(r"```python\n(# thin\.py\n.*?)```", CONTRIBUTING, re.DOTALL)
    folder = tmp_path_factory.mktemp("package")
    (folder / "thin.py").write_text(code, "utf-8")
    sys.path.insert(0, str(folder))
    yield importlib.import_module("thin")
    sys.path.remove(str(folder))
    del sys.modules["thin"]


@pytest.fixture
def registered(monkeypatch, thin):
    """`registry.register` for the time of a test."""
    registry.methods()
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    return registry.register


RECIPE = Recipe(
    dense_epochs=1, epochs=3, batch_size=8, learning_rate=1e-3, alpha_learning_rate=0.1, distillation=0.5, keep=0.6
)


def test_names_of_chains(registered, thin):
    registered(thin.METHOD)
    assert [link.name for link in parse("whitened+soft+thin")] == ["whitened+soft", "thin"]
    assert full_name("static") == "svd+uniform" and full_name("thin+svd+mask") == "thin+svd+mask"
    for wrong in ("", "svd", "soft", "whitened+thin", "thin+soft", "svd+svd+soft", "magic", "svd+soft+", "+thin"):
        with pytest.raises(ValueError, match="Unknown method .*FACTORIZATION.ALLOCATION.* or .*, thin; and chains"):
            parse(wrong)


def test_settings_reach_the_methods_that_have_them(registered, thin):
    registered(thin.METHOD)
    chain = configured(parse("svd+soft+thin"), {"keep": 0.3, "epochs": 1}, {"thin": {"width": 7}})
    (_, soft), (_, own) = chain
    assert (soft.keep, soft.factors, own.width) == (0.3, "svd", 7)
    for own, message in (
        ({"thin": {"depth": 1}}, "thin has no setting depth; it has width"),
        ({"mask": {}}, "Settings for mask: no such method in this chain"),
        ({"thin": {"width": 0}}, "width must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            configured(parse("svd+soft+thin"), {}, own)


def test_two_methods_of_one_name_or_form_are_refused(registered, thin):
    registered(thin.METHOD, thin.METHOD)  # again is no harm
    with pytest.raises(ValueError, match="There is already a method 'soft'"):
        registered(Method("soft", Config, thin.apply))

    class Other(thin.ThinEmbedding):
        pass

    with pytest.raises(ValueError, match="There is already a form 'thin embedding': give Other another one"):
        registered(Method("other", Config, thin.apply, (Other,)))


def test_a_toy_method_is_in_grid_table_and_plot(registered, thin, bench):
    registered(thin.METHOD)
    names = ("svd+uniform", "thin", "whitened+soft+thin", "thin+whitened+soft")
    grid = Grid(RECIPE, {"docpairs": Setting()}, (0, 1), (Pass(names, (0.6,)),))
    benches = {"docpairs": bench}
    report = Report(run_grid(grid, benches, note=lambda line: None), benches, (0, 1))
    rows = report.rows
    assert set(rows.method) == {"dense", *names}
    chain = rows[(rows.method == "whitened+soft+thin") & rows.recovered]
    assert set(chain.factorize) == {"whitened"} and set(chain.allocate) == {"soft+thin"}
    total = rows[rows.recovered].groupby("method").kept_total.first()
    assert total["whitened+soft+thin"] < total["thin"] < 1
    assert (rows[rows.recovered & (rows.method != "dense")].groupby("method").kept_linear.max()[["thin"]] == 1).all()
    assert "thin+whitened+soft" in report.table("dev").to_string()
    legend = plot_quality(rows).legends[0]
    assert {"thin", "whitened+soft+thin", "svd"} < {text.get_text() for text in legend.get_texts()}


def test_keys_of_chains(registered, thin, bench, monkeypatch):
    """A run depends on the code and the settings of its own methods, and on no others'."""
    registered(thin.METHOD)

    def keys(recipe):
        return {name: bench._place(name, recipe, 0)[1].name for name in ("dense", "svd+soft", "thin", "svd+soft+thin")}

    before = keys(RECIPE)
    assert keys(RECIPE.changed(static_learning_rate=0.1)) == before
    wider = keys(RECIPE.changed(gamma=0.5))
    assert {name for name in before if wider[name] != before[name]} == {"svd+soft", "svd+soft+thin"}
    assert bench._depends("thin", RECIPE, 0)["code"].keys() >= {"thin.py", "apply_chain"}
    assert "thin.py" not in bench._depends("svd+soft", RECIPE, 0)["code"]


class Widened(Replacement):
    """A feed-forward's two linears as one module, built from the dense ones."""

    form = "widened"

    def __init__(self, size, width):
        super().__init__()
        self.up, self.down = nn.Linear(size, width), nn.Linear(width, size)

    def description(self):
        return {"size": self.down.out_features, "width": self.up.out_features}

    @classmethod
    def skeleton(cls, dense, description):
        return cls(description["size"], description["width"]).to(next(dense.parameters()).device)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


class Exits(Replacement):
    """Heads where the model's class has nothing."""

    form = "exits"

    def __init__(self, heads, size):
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(size, 2) for _ in range(heads))

    def description(self):
        return {"heads": len(self.heads), "size": self.heads[0].in_features}

    @classmethod
    def skeleton(cls, dense, description):
        assert dense is None
        return cls(description["heads"], description["size"])


class Stack(Replacement):
    """A stack of blocks in another form, which keeps the blocks and their names."""

    form = "stack"

    def __init__(self, dense):
        super().__init__()
        self.layer = dense.layer
        self.scale = nn.Parameter(torch.ones(len(dense.layer), device=next(dense.parameters()).device))

    @classmethod
    def skeleton(cls, dense, description):
        return cls(dense)

    def forward(self, hidden_states, attention_mask=None, *args, **options):
        from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

        for block, scale in zip(self.layer, self.scale, strict=True):
            hidden_states = scale * block(hidden_states, attention_mask)
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden_states)


class Shared(Replacement):
    """A linear whose decoder stands in other layers too."""

    form = "shared"

    def __init__(self, codes, decoder):
        super().__init__()
        self.codes, self.decoder = nn.Parameter(codes), decoder
        self.bias = nn.Parameter(torch.zeros(codes.shape[0]))

    def description(self):
        return {"rank": self.codes.shape[1]}

    @classmethod
    def skeleton(cls, dense, description):
        new = dense.weight.new_empty
        m, n = dense.weight.shape
        decoder = nn.Linear(n, description["rank"], bias=False).to(dense.weight.device)
        return cls(new(m, description["rank"]), decoder)

    def forward(self, x):
        return nn.functional.linear(self.decoder(x), self.codes, self.bias)


def in_blocks(model):
    for block in model.bert.encoder.layer:
        block.intermediate.dense = Widened(32, 8)
        block.intermediate.dense.down = nn.Linear(8, 64)
    return model


def with_embedding(model):
    thin = sys.modules["thin"]
    thin.apply(model, thin.ThinConfig(), Work(None, None, 0, None, None))
    return model


def with_exits(model):
    model.bert.exits = Exits(2, 32)
    return model


def with_stack(model):
    model.bert.encoder = Stack(model.bert.encoder)
    model.bert.encoder.scale.data = torch.tensor([1.5, 0.5])
    return model


def with_shared(model):
    decoder = nn.Linear(32, 3, bias=False)
    for block in model.bert.encoder.layer:
        attention = block.attention.self
        attention.query = Shared(torch.randn(32, 3), decoder)
        attention.key = Shared(torch.randn(32, 3), decoder)
    return model


@pytest.mark.parametrize("change", [with_embedding, with_exits, with_stack, with_shared])
@pytest.mark.parametrize("linears", [False, True])
def test_every_kind_of_replacement_comes_back_bit_for_bit(registered, thin, tiny_bert, tmp_path, change, linears):
    registered(thin.METHOD, Method("kinds", Config, None, (Widened, Exits, Stack, Shared)))
    model = tiny_bert()
    dense = count_parameters(model)
    remember(model)
    change(model)
    if linears:
        left = [target.name for target in softlms.find_targets(model)]
        softlms.truncate(model, dict.fromkeys(left, 4))
    expected, counted = outputs(model), count_parameters(model)
    model.save_pretrained(tmp_path / "a")
    again, report = load(tmp_path / "a", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert torch.equal(outputs(again), expected)
    kinds = [[(name, type(module)) for name, module in m.named_modules(remove_duplicate=False)] for m in (again, model)]
    assert kinds[0] == kinds[1]
    assert count_parameters(again) == counted and counted.total_dense == dense.total
    again.save_pretrained(tmp_path / "b")
    once_more = load(tmp_path / "b")
    assert torch.equal(outputs(once_more), expected)
    state = model.state_dict()
    assert all(torch.equal(values, state[name]) for name, values in once_more.state_dict().items())
    # in the base model alone
    base = AutoModel.from_pretrained(tmp_path / "a")
    assert count_parameters(base).linear == counted.linear
    with torch.no_grad():
        assert torch.equal(base(IDS).pooler_output, model.bert(IDS).pooler_output)


def test_what_several_layers_share_is_stored_once(registered, tiny_bert, tmp_path):
    registered(Method("kinds", Config, None, (Shared,)))
    model = with_shared(tiny_bert())
    model.save_pretrained(tmp_path)
    stored = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    single = copy.deepcopy(model)
    for block in single.bert.encoder.layer:
        block.attention.self.key.decoder = copy.deepcopy(block.attention.self.key.decoder)
    single.save_pretrained(tmp_path / "single")
    more = sum(path.stat().st_size for path in (tmp_path / "single").glob("*.safetensors"))
    assert more - stored > 2 * 3 * 32 * 4
    again = load(tmp_path)
    decoders = {id(m.decoder.weight) for m in again.modules() if isinstance(m, Shared)}
    assert len(decoders) == 1
    loaded = load(tmp_path / "single")
    assert len({id(m.decoder.weight) for m in loaded.modules() if isinstance(m, Shared)}) == 3


def test_what_no_method_has_registered_is_refused_by_name(registered, tiny_bert, tmp_path, monkeypatch):
    model = with_stack(tiny_bert())
    with pytest.raises(ValueError, match=r"bert\.encoder is a Stack, which from_pretrained does not know"):
        model.save_pretrained(tmp_path / "a")
    assert not any((tmp_path / "a").glob("*")) if (tmp_path / "a").exists() else True
    with monkeypatch.context() as patch:
        patch.setitem(registry._registered, "kinds", Method("kinds", Config, None, (Stack,)))
        model.save_pretrained(tmp_path / "b")
    with pytest.raises(ValueError, match=r"bert\.encoder has the form 'stack', which no registered method knows"):
        load(tmp_path / "b")


def test_transformers_without_softlms_stops(registered, thin, tiny_bert, tmp_path):
    """A thinner embedding must not be filled with random words."""
    registered(thin.METHOD)
    with_embedding(tiny_bert()).save_pretrained(tmp_path)
    code = f"from transformers import AutoModelForSequenceClassification as A; A.from_pretrained({str(tmp_path)!r})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8")
    assert run.returncode and "word_embeddings" in run.stderr


def test_configuration_of_a_smaller_model_keeps_the_dense_counts(registered, tiny_bert, tmp_path):
    """Blocks that are gone: an ordinary smaller model, whose folder still knows what it was."""
    model = tiny_bert()
    dense = count_parameters(model)
    softlms.decompose(model)
    softlms.deploy(model)
    del model.bert.encoder.layer[1:]
    model.config.num_hidden_layers = 1
    counted = count_parameters(model)
    assert (counted.linear_dense, counted.total_dense) == (dense.linear, dense.total)
    model.bert.encoder.layer[0].output.dense = softlms.LowRankLinear(torch.randn(2, 64), torch.randn(32, 2), None)
    model.bert.encoder.layer[0].output.dense.up.bias = nn.Parameter(torch.zeros(32))
    counted = count_parameters(model)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert count_parameters(again) == counted and isinstance(again.config, BertConfig)
