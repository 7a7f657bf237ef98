"""Save tiny models of each family in each form, as test data of the format that this version writes.

    python tests/tools/make_saved.py FOLDER

``tests/saved/format-1`` was made so, at the last version that could write nothing but linear layers in other forms. A
folder that is committed is never made again: it stands for what users have on their disks. Beside each model lies
``expected.safetensors``: ids, the logits of the model that was saved, and the weight that each layer stood for.
"""

import argparse
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers import TrainingArguments

import softlms
from softlms.layers import Ranked
from softlms.lowrank.factorization import factorize
from softlms.lowrank.masks import MaskedLinear, MaskTrainer
from softlms.surgery import soft_layers

BLOCKS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
SIZES = {"vocab_size": 40, "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
FAMILIES = {
    "bert": ("BertForSequenceClassification", "BertConfig", BLOCKS | {"max_position_embeddings": 16}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", BLOCKS | {"num_key_value_heads": 1, "max_position_embeddings": 16}),
    "mamba": ("MambaForCausalLM", "MambaConfig", {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}),
}
FORMS = dict.fromkeys((*FAMILIES, "gpt2-split"), ("soft", "thin"))
FORMS["bert"] += ("frozen", "masked", "bfloat16")


def build(family):
    kind, config, sizes = FAMILIES[family.removesuffix("-split")]
    model = getattr(transformers, kind)(getattr(transformers, config)(**SIZES, **sizes)).eval()
    return softlms.split_fused(model) if family.endswith("-split") else model


def compress(model, form):
    """Ranks that differ from layer to layer, one of them full."""
    if form == "masked":
        args = TrainingArguments("unused", max_steps=1, report_to=[], use_cpu=True)
        MaskTrainer(model, factorize(model, "svd"), keep=0.5, args=args)
        for i, layer in enumerate(m for m in model.modules() if isinstance(m, MaskedLinear)):
            layer.score.data[1 + i :] = -1.0
        return model.eval()
    if form == "frozen":
        model.requires_grad_(False)
    softlms.decompose(model)
    for i, layer in enumerate(list(soft_layers(model).values())[:-1]):
        layer.set_rank_(1 + i % 6)
    if form in ("thin", "bfloat16"):
        softlms.deploy(model)
    return model.bfloat16() if form == "bfloat16" else model


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    out = parser.parse_args().folder
    for family, forms in FORMS.items():
        for form in forms:
            torch.manual_seed(0)
            model = compress(build(family), form)
            place = out / f"{family}-{form}"
            model.save_pretrained(place)
            ids = torch.arange(12)[None] % 40
            with torch.no_grad():
                expected = {"ids": ids, "logits": model(ids).logits}
            weights = {f"{n}.weight": m.weight for n, m in model.named_modules() if isinstance(m, Ranked)}
            expected |= {name: weight.detach().clone().contiguous() for name, weight in weights.items()}
            save_file(expected, place / "expected.safetensors")


if __name__ == "__main__":
    main()
