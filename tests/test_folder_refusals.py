"""What a folder cannot hold, and a folder that is damaged or was mixed up, is refused, and told by name."""

import random
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from folders import FAMILIES, assert_equal, dense, load, outputs, soft, thin
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModel

import softlms
from softlms.budget import count_parameters
from softlms.layers import LowRankLinear

ALONE = """
import sys, transformers
for folder in sys.argv[1:]:
    name = transformers.AutoConfig.from_pretrained(folder).architectures[0]
    try:
        getattr(transformers, name).from_pretrained(folder)
    except RuntimeError as error:
        assert "mismatch" in str(error), error
    else:
        raise SystemExit(f"{folder} was loaded")
assert "softlms" not in sys.modules
"""


def test_transformers_alone_fails_loudly(tiny_bert, tmp_path):
    folders = []
    for family, split in FAMILIES:
        model = soft(dense(tiny_bert, family, split))
        for form in ("soft", "deployed"):
            folders.append(str(tmp_path / f"{family}-{split}-{form}"))
            (model if form == "soft" else softlms.deploy(model)).save_pretrained(folders[-1])
    done = subprocess.run([sys.executable, "-c", ALONE, *folders], capture_output=True, encoding="utf-8", cwd="/")
    assert done.returncode == 0, done.stderr[-2000:]


def test_shards_of_two_saves_do_not_mix(tiny_bert, tmp_path):
    model = soft(tiny_bert())
    model.save_pretrained(tmp_path / "a", max_shard_size="60KB")
    shards = sorted((tmp_path / "a").glob("*.safetensors"))
    assert len(shards) > 1
    assert_equal(load(tmp_path / "a"), model)
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight += 1
    model.save_pretrained(tmp_path / "b", max_shard_size="60KB")
    shutil.copy(tmp_path / "b" / shards[0].name, shards[0])
    with pytest.raises(ValueError, match="parts of different models"):
        load(tmp_path / "a")
    model.save_pretrained(tmp_path / "b")  # fewer files than before: none of the old ones is left
    assert [path.name for path in (tmp_path / "b").glob("*.safetensors*")] == ["model.safetensors"]
    assert_equal(load(tmp_path / "b"), model)


def test_damaged_folders_are_refused_or_bit_equal(tiny_bert, tmp_path, caplog):
    """200 folders, each with bytes flipped or a file cut short; a changed configuration may load, and is told."""
    model = softlms.deploy(soft(tiny_bert(num_hidden_layers=1)))
    model.save_pretrained(tmp_path / "good")
    expected, chance, refused = outputs(model), random.Random(0), 0
    for _ in range(200):
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        shutil.copytree(tmp_path / "good", tmp_path / "bad")
        file = tmp_path / "bad" / chance.choice(["model.safetensors", "model.safetensors", "config.json"])
        content = bytearray(file.read_bytes())
        if chance.random() < 0.3:
            del content[chance.randrange(len(content)) :]
        else:
            header = len(content) if chance.random() < 0.5 else min(len(content), 20_000)
            for _ in range(chance.choice([1, 1, 8])):
                content[chance.randrange(header)] ^= 1 << chance.randrange(8)
        file.write_bytes(content)
        try:
            again = load(tmp_path / "bad")
        except Exception as error:
            assert str(error)
            refused += 1
        else:
            assert file.name == "config.json" or torch.equal(outputs(again), expected)
            assert torch.equal(outputs(again), expected) or "differs from the one saved" in caplog.text
        caplog.clear()
    assert refused > 120


def test_messages_of_refusals(saved, tmp_path):
    config = tmp_path / "config.json"
    good = config.read_text("utf-8")
    config.write_text(good.replace('"format": 2', '"format": 3'), "utf-8")
    with pytest.raises(ValueError, match="softlms format 3, this softlms knows 2: update"):
        load(tmp_path)
    config.write_text(good, "utf-8")
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match="is damaged: its checksum differs"):
        load(tmp_path)
    # the same weights, written by something that knows nothing of their layers
    undescribed = r"has bert\.encoder\.layer\.0\.\S+ but no complete softlms description"
    save_file(saved.state_dict(), weights, {"format": "pt"})
    with pytest.raises(ValueError, match=undescribed):
        load(tmp_path)
    weights.unlink()
    torch.save(saved.state_dict(), tmp_path / "pytorch_model.bin")
    for kind in (type(saved), AutoModel):
        with pytest.raises(ValueError, match=undescribed):
            kind.from_pretrained(tmp_path)
    (tmp_path / "file").write_text("", "utf-8")
    with pytest.raises(FileExistsError, match="is a file"):
        saved.save_pretrained(tmp_path / "file")
    saved.save_pretrained(tmp_path / "again")
    with pytest.raises(ValueError, match=r"A LlamaForCausalLM has none of the saved layers, such as bert\.encoder"):
        transformers.LlamaForCausalLM.from_pretrained(tmp_path / "again")
    for config in (AutoConfig.from_pretrained(tmp_path / "again"), saved.config):
        with pytest.raises(ValueError, match="state_dict alone does not describe"):
            type(saved).from_pretrained(None, config=config, state_dict=saved.state_dict())


def test_weights_that_do_not_fit_a_changed_configuration_are_refused(saved, tmp_path):
    config = AutoConfig.from_pretrained(tmp_path)
    config.intermediate_size = 48
    config.save_pretrained(tmp_path)
    for options in ({}, {"ignore_mismatched_sizes": True}):
        with pytest.raises(ValueError, match=r"intermediate.dense\.\S+ is of shape .*differs.*: .*intermediate_size"):
            load(tmp_path, **options)
    # another head for another task is none of the weights'
    config.intermediate_size, config.num_labels = 64, 3
    config.save_pretrained(tmp_path)
    again = load(tmp_path, ignore_mismatched_sizes=True)
    assert torch.equal(outputs(again.bert), outputs(saved.bert))
    count_parameters(again)


def test_weights_that_lack_a_factor_are_refused(tiny_bert, tmp_path):
    model = thin(tiny_bert())
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    with safe_open(file, framework="pt") as held:
        metadata, tensors = held.metadata(), {name: held.get_tensor(name) for name in held.keys()}  # noqa: SIM118
    del tensors["bert.encoder.layer.1.output.dense.up.weight"]
    save_file(tensors, file, metadata)
    with pytest.raises(ValueError, match=r"The weights lack bert\.\S*up\.weight of a compressed layer"):
        load(tmp_path)


class Louder(LowRankLinear):
    def forward(self, x):
        return 2 * super().forward(x)


def replaced_embeddings(model):
    model.bert.embeddings.word_embeddings = nn.Embedding(20, 32)


def parametrized(model):
    nn.utils.parametrizations.weight_norm(model.bert.encoder.layer[0].attention.self.query.down)


def other_activation(model):
    model.bert.encoder.layer[0].intermediate.intermediate_act_fn = nn.ReLU()


def added(model):
    model.bert.encoder.layer[0].register_buffer("shift", torch.ones(1))


def own_layer(model):
    model.bert.encoder.layer[0].attention.self.query.__class__ = Louder


def no_pooler(model):
    model.bert.pooler = None


def adapted(model):
    import peft

    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["down"]), model)


def quantized(model):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig(version=2))


@pytest.mark.parametrize(
    "change, told",
    [
        (replaced_embeddings, r"word_embeddings\.weight has the shape \(20, 32\).*configuration has \(200, 32\)"),
        (
            parametrized,
            r"query\.down is \S*\.ParametrizedLinear, where BertForSequenceClassification has \S*\.Linear: ",
        ),
        (other_activation, r"intermediate_act_fn is \S*\.ReLU, where .* has \S*\.GELUActivation: "),
        (added, r"layer\.0\.shift has the shape \(1,\), where .* has None"),
        (own_layer, r"query is a Louder, which from_pretrained does not know"),
        (no_pooler, r"pooler\.dense\.weight has the shape None"),
        (adapted, r"query\.down is peft\.\S*\.Linear, where .* has torch\.\S*\.Linear: .* merge_and_unload"),
        (quantized, r"is quantized \(.*\): save it unquantized, and quantize after loading"),
    ],
)
def test_what_the_folder_cannot_hold_is_refused_by_name(tiny_bert, tmp_path, change, told):
    needed = {quantized: "torchao", adapted: "peft"}
    if change in needed:
        pytest.importorskip(needed[change])
    model = thin(tiny_bert())
    change(model)
    with pytest.raises(ValueError, match=told):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
