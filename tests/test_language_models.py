import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from softlms.data.encoders import find_encoder
from softlms.data.tasks import TASKS, TaskData
from softlms.data.text import blocks
from softlms.evaluation.likelihood import Protocol, measure_perplexity
from softlms.experiments.language_models import FAMILIES, LanguageBench, SmallModel
from softlms.experiments.profiles import LANGUAGE_PROFILES, SMOLLM2
from softlms.experiments.recipe import Recipe
from softlms.experiments.tokenized import tokenize_text, train_tokenizer
from softlms.workbook.book import open_language_book

SIZE = {"hidden": 64, "layers": 1, "vocabulary": 300}
RECIPE = Recipe(
    dense_epochs=3, dense_learning_rate=3e-3, epochs=1, batch_size=8, learning_rate=1e-3, static_learning_rate=1e-3,
    alpha_learning_rate=0.1, deadline=0.6, unit="mean", s=12.5, calibration_rows=16, distillation=0.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts") / "wiki"
    folder.mkdir()
    sentence = "The {} river runs to the {} sea, and the {} sea is wide.\n"
    colours = ["red", "blue", "green", "white", "black"]
    for i, split in enumerate(("train", "valid", "test")):
        rng = np.random.default_rng(i)
        lines = [sentence.format(*rng.choice(colours, 3)) for _ in range(400 if split == "train" else 40)]
        (folder / f"{split}.txt").write_text("".join(lines), "utf-8")
    return folder


def test_tokenizer_gives_every_text_back():
    tokenizer = train_tokenizer("to be or not to be\n" * 20, 270)
    for text in ("to be", "ß and 漢字\n\n\ttabs  and  spaces ", "<|end"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) <= 270 and tokenizer.eos_token_id == 0


def test_text_is_tokenized_once(folder, tmp_path, monkeypatch):
    text = tokenize_text(folder, 300, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(text.tokenizer)
    assert tokenizer.decode(text.splits["test"]) == (folder / "test.txt").read_text("utf-8")
    assert text.source == "folder: wiki" and [p.name for p in tmp_path.iterdir()] == [text.tokenizer.name]
    monkeypatch.setattr("softlms.experiments.tokenized.train_tokenizer", None)
    again = tokenize_text(folder, 300, tmp_path)
    assert all(np.array_equal(ids, again.splits[split]) for split, ids in text.splits.items())
    with pytest.raises(ValueError, match="got 256"):
        tokenize_text(folder, 256, tmp_path)


def test_blocks_are_the_text_in_rows():
    rows = blocks(np.arange(10), 4)[:]
    assert rows["input_ids"].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]] == rows["labels"].tolist()
    assert rows["input_ids"].dtype == torch.int64


def bench_of(model, folder, tmp_path, **options):
    vocabulary = SIZE["vocabulary"] if isinstance(model, SmallModel) else model.location
    text = tokenize_text(folder, vocabulary, tmp_path)
    return LanguageBench(model, "lm", text, tmp_path / "runs", window=16, note=lambda line: None, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_learns_and_is_compressed(folder, tmp_path, family):
    bench = bench_of(SmallModel(family, **SIZE), folder, tmp_path)
    dense = bench.run("dense", RECIPE, 1)
    assert dense.result["scores"]["test"]["perplexity"] < 6 and dense.result["kept_linear"] == 1
    assert bench.run("dense", RECIPE, 0).result == dense.result  # one checkpoint for all seeds
    for method in ("svd+uniform", "whitened+soft"):
        # at half, this text leaves nothing to recover
        runs = [bench.run(method, RECIPE.changed(epochs=epochs, keep=0.2), 0).result for epochs in (1, 0)]
        assert all(0.15 < result["kept_linear"] <= 0.2 for result in runs)
        tuned, untuned = (result["scores"]["dev"]["perplexity"] for result in runs)
        assert tuned < untuned
        assert runs[0]["encoder"].startswith(family) and runs[0]["data"] == "folder: wiki"
        assert len(runs[0]["sample"]) > 20 and runs[0]["prompt"] == dense.result["prompt"]
    assert set(bench.targets()) == set(dense.result["ranks"])
    with pytest.raises(ValueError, match="set distillation=0"):
        bench.run("svd+uniform", RECIPE.changed(distillation=0.5), 0)


def test_fused_projections_are_split_for_the_cut_only(folder, tmp_path):
    whole, split = (bench_of(SmallModel("gpt2", **SIZE), folder, tmp_path, split=s) for s in (False, True))
    assert whole.run("dense", RECIPE, 0).result == split.run("dense", RECIPE, 0).result
    ranks = split.run("svd+uniform", RECIPE, 0).result["ranks"]
    assert set(ranks) == set(split.targets()) and any(name.endswith("c_attn.q") for name in ranks)
    assert any(name.endswith("c_attn") for name in whole.run("svd+uniform", RECIPE, 0).result["ranks"])
    assert not any(name.endswith("c_attn.q") for name in whole.targets())


def test_a_checkpoint_is_taken_as_it_is(folder, tmp_path):
    small = SmallModel("llama", **SIZE)
    trained = bench_of(small, folder, tmp_path).run("dense", RECIPE, 0)
    text = tokenize_text(folder, SIZE["vocabulary"], tmp_path)
    AutoTokenizer.from_pretrained(text.tokenizer).save_pretrained(trained.model)
    bench = bench_of(find_encoder(str(trained.model)), folder, tmp_path / "other")
    again = bench.run("dense", RECIPE.changed(dense_epochs=0), 0).result
    assert again["scores"] == trained.result["scores"] and again["steps"] == 0
    assert bench.run("svd+uniform", RECIPE.changed(dense_epochs=0), 0).result["kept_linear"] <= 0.5


def test_a_protocol_is_measured_and_goes_with_the_numbers(folder, tmp_path):
    small = SmallModel("llama", **SIZE)
    plain = bench_of(small, folder, tmp_path)
    bench = bench_of(small, folder, tmp_path, protocol=Protocol(32, tokens=70))
    run = bench.run("dense", RECIPE, 0)
    model, ids = AutoModelForCausalLM.from_pretrained(run.model), bench.text.splits["test"]
    found = measure_perplexity(model, ids, bench.protocol)
    assert run.result["scores"]["test"]["perplexity"] == pytest.approx(found.value, rel=1e-6)
    assert found.predicted == 67 and run.result["data"] == f"folder: wiki; {bench.protocol}"
    assert plain.data.source == "folder: wiki" and plain.stored("dense", RECIPE, 0) is None
    for options, message in (
        ({"protocol": Protocol(16, bos=True)}, "The tokenizer has no BOS token"),
        ({"protocol": Protocol(16, tokens=10**6)}, "not 1000000: ask for fewer"),
        ({"protocol": Protocol(513)}, "513 tokens is longer than the 512 that the model reads"),
        ({"protocol": Protocol(16), "test_tokens": 64}, r"test_tokens \(64\) and protocol both say"),
    ):
        with pytest.raises(ValueError, match=message):
            bench_of(small, folder, tmp_path, **options)


def test_a_bench_travels_to_another_process(folder, tmp_path):
    """Without its note, which may be anything, and without what can be made again."""
    bench = bench_of(SmallModel("gpt2", **SIZE), folder, tmp_path)
    assert bench.splits and bench.collator
    there = pickle.loads(pickle.dumps(bench))
    assert there._place("svd+soft", RECIPE, 0) == bench._place("svd+soft", RECIPE, 0)
    assert there.note is print and "splits" not in vars(there)


def test_what_cannot_be_done_is_said_before_any_work(folder, tmp_path):
    small = SmallModel("gpt2", **SIZE)
    text = tokenize_text(folder, SIZE["vocabulary"], tmp_path)
    shortest = min(map(len, text.splits.values()))
    for window, limit in ((1, 512), (513, 512)):
        with pytest.raises(ValueError, match=rf"window must be 2 to {limit} tokens .* got {window}\."):
            LanguageBench(small, "lm", text, tmp_path, window=window)
    with pytest.raises(ValueError, match=rf"2 to {shortest} tokens .* got {shortest + 1}\."):
        LanguageBench(SmallModel("mamba", **SIZE), "lm", text, tmp_path, window=shortest + 1)
    with pytest.raises(ValueError, match="2 to 8 tokens"):
        LanguageBench(small, "lm", text, tmp_path, window=16, test_tokens=8)
    with pytest.raises(ValueError, match="set distillation=0"):
        bench_of(small, folder, tmp_path).run("svd+uniform", RECIPE.changed(distillation=0.5), 0)
    assert not (tmp_path / "runs").exists()


def test_a_notebook_is_about_its_family(folder, tmp_path, monkeypatch):
    AutoModelForCausalLM.from_config(SmallModel("llama", **SIZE).config).save_pretrained(tmp_path / "llama")
    with pytest.raises(ValueError, match="is a llama model; this notebook is about mamba"):
        open_language_book(
            "08_mamba_table", "mamba", profile="quick", text=str(folder), checkpoint=str(tmp_path / "llama")
        )
    with pytest.raises(ValueError, match="Unknown family 'bert'; known: gpt2"):
        open_language_book("09", "bert", profile="quick")


def test_a_real_model_stands_beside_the_profiles_own(folder, tmp_path, monkeypatch):
    """With its own text, grid and protocol, under its own name; here a tiny Llama is in the place of SmolLM2."""
    small = SmallModel("llama", **SIZE)
    place = bench_of(small, folder, tmp_path).run("dense", RECIPE, 0).model
    AutoTokenizer.from_pretrained(tokenize_text(folder, SIZE["vocabulary"], tmp_path).tokenizer).save_pretrained(place)
    tiny = replace(SMOLLM2, window=16, train_tokens=2000, protocol=Protocol(16, tokens=64))
    monkeypatch.setitem(LANGUAGE_PROFILES["laptop"].beside, "smollm2", tiny)
    monkeypatch.setattr("softlms.workbook.book.project_root", lambda: tmp_path)
    options = {"profile": "laptop", "beside": "smollm2", "text": str(folder), "checkpoint": str(place)}
    book = open_language_book("07", "llama", **options)
    assert book.bench.data.task.name == "smollm2" and "smollm2" in book.profile.grid.tasks
    assert book.bench.data.source == f"folder: wiki; {tiny.protocol}" and book.results == tmp_path / "results/laptop"
    assert book.name == "07_smollm2"
    dense, cut = (book.bench.run(m, book.profile.grid.recipe, 0).result for m in ("dense", "whitened+uniform"))
    assert dense["steps"] == 0 and cut["kept_linear"] <= 0.5 and cut["steps"] > 0
    for changes, known in (
        ({"profile": "quick"}, "none"),
        ({"beside": "other"}, "smollm2, smollm2-1024, smollm2-2048"),
    ):
        with pytest.raises(ValueError, match=rf"has no llama model .* beside its own; it has: {known}\."):
            open_language_book("07", "llama", **options | changes)
    with pytest.raises(ValueError, match="other_text 'elsewhere' is for a model beside"):
        open_language_book("07", "llama", **options | {"beside": "", "other_text": "elsewhere"})
    with pytest.raises(ValueError, match=r"has no gpt2 model 'smollm2' beside its own; it has: none\."):
        open_language_book("06", "gpt2", **options)


@pytest.mark.parametrize("window", [1024, 2048])
def test_the_whole_test_split_is_measured_in_windows_of_papers(window):
    sizes = LANGUAGE_PROFILES["laptop"].beside
    chosen, first = sizes[f"smollm2-{window}"], sizes["smollm2"]
    assert (chosen.protocol.window, chosen.protocol.tokens) == (window, None)
    assert list(chosen.grid.tasks) == [f"smollm2-{window}"] and chosen.grid.recipe == first.grid.recipe
    untuned, trained_as_long, recovered = chosen.grid.passes
    assert not untuned.recover and untuned.keeps == (0.9, 0.8, 0.7, 0.5)
    assert trained_as_long.recover and trained_as_long.keeps == (1.0,) and recovered.keeps == (0.8,)


def test_models_are_scored_beyond_their_text(folder, tmp_path):
    """On a text of another domain and zero-shot, recovered; what is scored there is in the run's key."""
    text = tokenize_text(folder, SIZE["vocabulary"], tmp_path)
    rows = Dataset.from_dict({"sentence": ["the red sea", "a wide river"] * 200, "label": [0, 1] * 200})
    asked = TaskData(TASKS["sst2"], {"dev": rows}, "folder: here")
    options = {"protocol": Protocol(16, tokens=64), "beyond": {"other": text, "sst2 zero-shot": asked}}
    bench = bench_of(SmallModel("llama", **SIZE), folder, tmp_path, **options)
    recipe = RECIPE.changed(dense_epochs=0)
    tuned, untuned = (bench.run("svd+uniform", recipe.changed(epochs=n), 0).result["scores"] for n in (1, 0))
    assert tuned["other"] == tuned["test"] and 0 <= tuned["sst2 zero-shot"]["accuracy"] <= 1
    assert set(untuned) == {"dev", "test"}
    alone = bench_of(SmallModel("llama", **SIZE), folder, tmp_path, **options | {"beyond": {"other": text}})
    assert alone.stored("svd+uniform", recipe, 0) is None
    assert "beyond.sst2 zero-shot" in alone.why_missing("svd+uniform", recipe, 0)
    few = TaskData(TASKS["sst2"], {"dev": rows.select(range(9))}, "folder: here")
    for changes, message in (({"protocol": None}, "other, sst2 zero-shot are scored by a protocol"),
                             ({"beyond": {"few": few}}, "sst2 dev has 9 rows, not 400")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            bench_of(SmallModel("llama", **SIZE), folder, tmp_path, **options | changes)


def test_unknown_family():
    with pytest.raises(ValueError, match="Unknown family 'bert'; known: gpt2, llama, mamba"):
        SmallModel("bert")
