"""Sparse activations and experts: what runs, what it computes, how it is split, routed, counted and saved."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

import softlms
from softlms.experiments.recipe import Recipe
from softlms.methods.dynamic_moe import experts_of, put_experts, set_threshold
from softlms.methods.dynamic_moe.counts import executed, measure_crossover
from softlms.methods.dynamic_moe.method import ExpertsConfig
from softlms.methods.dynamic_moe.routing import entering_states, train_routers
from softlms.methods.dynamic_moe.split import SPLITS, balanced_kmeans
from softlms.methods.sparse_activations import SparseTrainer
from softlms.methods.sparse_activations.method import SparseConfig
from softlms.methods.sparse_activations.penalty import Turning, hoyer, l1

COMMON = {"vocab_size": 200, "initializer_range": 0.2}
LLAMA = COMMON | {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA |= {"num_key_value_heads": 2, "mlp_bias": True}
CAUSAL = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**COMMON, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)),
}


@pytest.fixture(params=["bert", "gpt2", "llama"])
def model(request, tiny_bert):
    made = tiny_bert() if request.param == "bert" else CAUSAL[request.param]().eval()
    with torch.no_grad():
        for name, values in made.named_parameters():
            if name.endswith("bias"):
                values.normal_(std=0.1)
    return made


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


def route(model):
    """Routers that say something, as after training."""
    for experts in experts_of(model).values():
        for linear in (experts.router.enter, experts.router.leave):
            torch.nn.init.normal_(linear.weight, std=0.5)
        experts.trained = True


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("factored", [False, True])
def test_with_all_experts_it_is_the_feed_forward(model, tokens, split, factored):
    if factored:
        softlms.deploy(softlms.decompose(model), keep=0.4)
    before = logits(model, tokens)
    every = put_experts(model, 8, split=split)
    torch.testing.assert_close(logits(model, tokens), before, rtol=1e-4, atol=1e-5)
    assert len(every) == 2 and all(len(experts.U) == 8 for experts in every.values())
    assert all(experts.share() == 1 and experts.tokens == tokens.numel() for experts in every.values())
    route(model)
    set_threshold(model, 1.0)
    torch.testing.assert_close(logits(model, tokens), before, rtol=1e-4, atol=1e-5)
    set_threshold(model, top=8)
    torch.testing.assert_close(logits(model, tokens), before, rtol=1e-4, atol=1e-5)


def test_a_token_runs_the_experts_of_its_router(model, tokens):
    """Gathered and masked are the same, and both are the sum over chosen experts."""
    put_experts(model, 8)
    route(model)
    set_threshold(model, 0.5)
    experts = next(iter(experts_of(model).values()))
    x = torch.randn(21, 32)
    R = experts.router(x)
    runs = experts.chosen(x)
    assert torch.equal(runs, 0.5 * R.max(1, keepdim=True).values <= R)
    assert runs.any(1).all() and len(runs.sum(1).unique()) > 1  # the number varies by token
    with torch.no_grad():
        expected = torch.zeros_like(x) if experts.c is None else experts.c.expand_as(x).clone()
        for e in range(8):
            h = x @ experts.U[e].T + experts.b[e]
            h = h * experts.act(x @ experts.G[e].T + experts.g[e]) if experts.gated else experts.act(h)
            expected += runs[:, e, None] * (h @ experts.V[e])
        for limit in (0.0, 1.1):  # masked, gathered
            experts.grouped_below = limit
            torch.testing.assert_close(experts(x), expected, rtol=1e-4, atol=1e-5)
    assert experts.share() == pytest.approx(runs.float().mean().item())


def test_a_feed_forward_is_split_once(model):
    put_experts(model, 8)
    for again in (lambda: put_experts(model, 8), lambda: SparseTrainer(model)):
        with pytest.raises(ValueError, match="is a Experts, which was put there already"):
            again()


@torch.no_grad()
def test_gathered_is_masked_in_half_precision_and_under_autocast(model, tokens):
    put_experts(model, 8)
    route(model)
    set_threshold(model, 0.5)
    for half in (False, True):
        if half:
            model.bfloat16()
        found = []
        for limit in (0.0, 1.1):
            for experts in experts_of(model).values():
                experts.grouped_below = limit
            with torch.autocast("cpu", torch.bfloat16, enabled=not half):
                found.append(model(tokens).logits.float())
        assert (found[0] - found[1]).abs().mean() < 0.05 * found[0].abs().mean()


@pytest.mark.parametrize("factored", [False, True])
def test_flops_are_those_of_the_products(model, tokens, factored):
    """Counted by torch where everything runs; and what is left out, by the experts that ran."""
    from torch.utils.flop_counter import FlopCounterMode

    if factored:
        softlms.deploy(softlms.decompose(model), keep=0.4)
    every = put_experts(model, 8)
    route(model)
    experts = next(iter(every.values()))
    x = torch.randn(40, 32)
    for tau in (1.0, 0.5):
        set_threshold(model, tau)
        experts.grouped_below = 1.1
        with torch.no_grad(), FlopCounterMode(display=False) as counted:
            experts(x)
        ran, dense = experts.flops()
        assert counted.get_total_flops() == pytest.approx(40 * ran)
        assert dense == 2 * (3 if experts.gated else 2) * 32 * (128 if model.config.model_type == "gpt2" else 64)
    set_threshold(model, 1.0)
    logits(model, tokens)
    assert executed(model) < 1 if factored else executed(model) == 1
    assert 0 <= measure_crossover(experts, x, rounds=1) <= 0.8


def test_fewer_run_as_tau_falls(model, tokens):
    put_experts(model, 8)
    route(model)
    shares = []
    for tau in (1.0, 0.8, 0.5, 0.2, 0.0):
        set_threshold(model, tau)
        logits(model, tokens)
        shares.append([experts.share() for experts in experts_of(model).values()])
    first = [share[0] for share in shares]
    assert first == sorted(first, reverse=True) and first[0] == 1 and first[-1] == pytest.approx(1 / 8)
    set_threshold(model, top=3)
    logits(model, tokens)
    assert all(experts.share() == 3 / 8 for experts in experts_of(model).values())


def test_norms_of_outputs(model):
    put_experts(model, 8)
    experts = next(iter(experts_of(model).values()))
    x = torch.randn(5, 32)
    with torch.no_grad():
        found = experts.outputs(x)
        for e in range(8):
            h = x @ experts.U[e].T + experts.b[e]
            h = h * experts.act(x @ experts.G[e].T + experts.g[e]) if experts.gated else experts.act(h)
            torch.testing.assert_close(found[:, e], (h @ experts.V[e]).norm(dim=1), rtol=1e-3, atol=1e-4)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), experts=st.sampled_from([1, 2, 3, 4, 6, 12]))
def test_experts_are_a_partition_in_equal_parts(seed, experts):
    rows = torch.randn(12, 5, generator=torch.Generator().manual_seed(seed))
    for split in SPLITS.values():
        members = split(rows, experts, seed)
        assert members.shape == (experts, 12 // experts) and members.flatten().sort().values.tolist() == [*range(12)]


def test_clusters_are_found():
    centres = torch.eye(4)
    rows = (centres.repeat(6, 1) + 0.05 * torch.randn(24, 4)) * torch.rand(24, 1).add(0.1)  # lengths do not matter
    members = balanced_kmeans(rows, 4, seed=3)
    assert sorted({frozenset((row % 4).tolist()) for row in members}, key=min) == [frozenset({i}) for i in range(4)]


@pytest.mark.parametrize("factored", [False, True])
def test_saved_and_loaded_bit_for_bit(model, tokens, factored, tmp_path):
    if factored:
        softlms.deploy(softlms.decompose(model), keep=0.4)
    put_experts(model, 8)
    route(model)
    set_threshold(model, 0.5)
    model.save_pretrained(tmp_path)
    kind = AutoModelForSequenceClassification if model.config.model_type == "bert" else AutoModelForCausalLM
    for other in (kind.from_pretrained(tmp_path).eval(), copy.deepcopy(model)):
        assert torch.equal(logits(other, tokens), logits(model, tokens))
        assert all(experts.tau == 0.5 and experts.trained for experts in experts_of(other).values())
        set_threshold(other, top=2)  # still adjustable


def test_routers_learn_the_norms(tiny_bert, bench):
    model, rows = tiny_bert(vocab_size=30522), bench.splits["train"]
    every = put_experts(model, 8)
    states = entering_states(model, every, rows, bench.collator, 500)
    assert all(values.shape == (500, 32) for values in states.values())
    before = {name: values.clone() for name, values in model.state_dict().items() if "router" not in name}
    options = {"batch": 32, "learning_rate": 1e-2, "seed": 0, "note": lambda line: None}
    known = train_routers(every, states, target="norm", epochs=20, **options)
    assert min(known.values()) > 0.6
    after = model.state_dict()
    assert all(torch.equal(values, after[name]) for name, values in before.items())
    again = copy.deepcopy(every)
    assert train_routers(again, states, target="norm", epochs=20, **options) == known  # a seed decides everything


@pytest.mark.parametrize("method", ["experts", "moefication", "sparse+experts", "svd+uniform+experts"])
def test_methods(bench, method):
    settings_of = {name: {"experts": 8, "router_tokens": 300} for name in ("experts", "moefication") if name in method}
    recipe = Recipe(dense_epochs=1, epochs=1, distillation=0.0, keep=0.5, settings=settings_of)
    found = bench.run(method, recipe, 0).result
    assert len(found["routers"]) == 2 and found["scores"]["dev"]
    if method == "experts":
        dense = bench.run("dense", recipe, 0).result
        assert found["scores"] == dense["scores"]  # tau is 1
        assert dense["parameters_total"] < found["parameters_total"]  # routers count


def test_penalties():
    assert hoyer(torch.eye(3)) == pytest.approx(1) and hoyer(torch.ones(2, 7)) == pytest.approx(7)
    assert hoyer(torch.zeros(2, 4)) == 0 and l1(torch.tensor([[1.0, -2.0], [3.0, 0.0]])) == 3
    h = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(hoyer(3 * h), hoyer(h))  # it sees shape, not size
    turning = Turning(torch.nn.GELU())
    x = torch.randn(9)
    assert torch.equal(turning(x), torch.nn.functional.gelu(x))
    turning.s = 1.0
    assert torch.equal(turning(x), x.relu())


def test_training_makes_activations_zero(tiny_bert, rows, bench):
    zeros = {}
    for weight in (0.0, 1.0):
        torch.manual_seed(0)
        model = tiny_bert()
        args = bench.arguments(bench.folder, 1e-2, 8, Recipe(), 0)
        trainer = SparseTrainer(
            model, penalty_weight=weight, turn=0.5, args=args, train_dataset=rows, data_collator=bench.collator
        )
        trainer.train()
        assert model.config.hidden_act == "relu"
        assert all(type(block.intermediate.intermediate_act_fn) is torch.nn.ReLU for block in model.bert.encoder.layer)
        seen = []
        model.bert.encoder.layer[1].output.dense.register_forward_pre_hook(lambda _, x, to=seen: to.append(x[0]))
        logits(model.eval(), torch.tensor([rows[0]["input_ids"]]))
        zeros[weight] = (seen[0] == 0).float().mean()
    assert zeros[1.0] > zeros[0.0] + 0.1


def test_unfit_models_and_settings_are_refused(tiny_bert, tokens):
    mamba = MambaForCausalLM(MambaConfig(vocab_size=99, hidden_size=16, num_hidden_layers=1))
    for make in (lambda m: put_experts(m, 2), lambda m: SparseTrainer(m)):
        with pytest.raises(ValueError, match="the feed-forward of bert, gpt2, llama; this model is a mamba"):
            make(mamba)
    model = tiny_bert()
    with pytest.raises(ValueError, match="7 experts do not divide 64 neurons: take 8 or 4"):
        put_experts(model, 7)
    with pytest.raises(ValueError, match="split must be one of 'kmeans', 'random', got 'other'"):
        put_experts(model, 8, split="other")
    with pytest.raises(ValueError, match="has no experts: split it first"):
        set_threshold(model, 0.5)
    put_experts(model, 8)
    with pytest.raises(ValueError, match=r"The router of bert\.encoder\.layer\.0\.intermediate was never trained"):
        set_threshold(model, 0.5)
    set_threshold(model, 1)
    route(model)
    for wrong in ({"tau": -0.1}, {"tau": float("nan")}, {"tau": 1.5}):
        with pytest.raises(ValueError, match="tau is a share, 0 to 1"):
            set_threshold(model, **wrong)
    for wrong in ({"top": 0}, {"top": 9}):
        with pytest.raises(ValueError, match="top is a number of experts, 1 to 8"):
            set_threshold(model, **wrong)
    with pytest.raises(ValueError, match="Give tau, or top"):
        set_threshold(model)
    soft = softlms.decompose(tiny_bert())
    with pytest.raises(ValueError, match="is a SoftLinear: experts divide dense and low-rank linears"):
        put_experts(soft, 8)
    for wrong in ({"top": 65}, {"top": 4, "tau": 0.5}):
        with pytest.raises(ValueError, match="top is a number of experts, 1 to 64, and tau is left out beside it"):
            ExpertsConfig(**wrong)
    for wrong in ({"split": "x"}, {"tau": 2}, {"experts": 0}, {"router_epochs": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ExpertsConfig(**wrong)
    for wrong in ({"penalty": "x"}, {"penalty_weight": -1}, {"ramp": 2}, {"epochs": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            SparseConfig(**wrong)
        if "epochs" not in wrong:
            with pytest.raises(ValueError, match=next(iter(wrong))):
                SparseTrainer(tiny_bert(), **wrong)
