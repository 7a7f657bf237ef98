"""Save and load compressed models through transformers itself.

``import softlms`` is all it takes: ``model.save_pretrained(folder)`` writes a model with factored layers, in whatever
form, at its own size, and ``AutoModel....from_pretrained(folder)`` (or ``pipeline``) builds the same layers again. The
weights' header says what stands where, and holds a checksum of each tensor and of the configuration: a damaged or
half-written folder is refused. For each factored layer the file also holds an empty tensor under the dense weight's
name, so that transformers without softlms stops at its shape instead of filling the layer with random values.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.hub import PushToHubMixin
from transformers.utils.quantization_config import QuantizationConfigMixin

from softlms.factorization import as_linear
from softlms.fused import SplitLinear
from softlms.layers import Factored, LowRankLinear, SoftLinear
from softlms.masks import MaskedLinear
from softlms.model_card import class_name, is_ours, write_card
from softlms.provenance import is_orphaned, process_mark

__all__ = ["SoftLMsConfig", "SoftLMsQuantizer"]

FORMAT = 1
METHOD = "softlms"
FORMS: dict[str, type[Factored]] = {c.form: c for c in (SoftLinear, LowRankLinear, SplitLinear, MaskedLinear)}
MARKER = "weight"  # of no elements: where the dense layer has its matrix
ATTENTION = ("eager", "sdpa")  # on every machine, and different in the last bits
ALIGNMENT = 64  # bytes
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


class SoftLMsConfig(QuantizationConfigMixin):
    """What ``config.json`` says of a compressed model: which library reads it, and the attention it computed with.

    Parameters
    ----------
    format : int
        Version of the layout; a newer one than this library knows is refused.
    attention : str, optional
        Taken up at loading unless ``attn_implementation`` asks for another.
    """

    def __init__(self, format: int = FORMAT, attention: str | None = None, **others: Any) -> None:
        self.quant_method = METHOD
        self.format = format
        self.attention = attention


class SoftLMsQuantizer(HfQuantizer):
    """transformers' hook around the loading (and the writing) of weights."""

    def __init__(self, quantization_config: SoftLMsConfig, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        self.layers: dict[str, dict[str, Any]] = {}
        self.state: dict[str, Tensor] = {}
        self.metadata: dict[str, str] = {}

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse what a newer version wrote."""
        if self.quantization_config.format > FORMAT:
            raise ValueError(
                f"The model has softlms format {self.quantization_config.format}, this softlms knows {FORMAT}: "
                "update softlms."
            )

    def update_attn_implementation(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """The saved model's attention, where nobody asks for one."""
        if config._attn_implementation_internal is None and self.quantization_config.attention in ATTENTION:
            config._attn_implementation = self.quantization_config.attention
        return config

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if not checkpoint_files:
            raise ValueError("A state_dict alone does not say what layers a compressed model has: load its folder.")
        description = verify([Path(file) for file in checkpoint_files])
        self.layers = _localized(model, description["layers"])
        for name, layer in self.layers.items():
            dense = as_linear(model.get_submodule(name))
            model.set_submodule(name, FORMS[layer["form"]].skeleton(dense, layer))
        soft = [re.escape(name) for name, layer in self.layers.items() if layer["form"] == SoftLinear.form]
        wide = {rf"{name}\.(?:sigma|threshold\.alpha|threshold\.unit)$" for name in soft}
        model._keep_in_fp32_modules_strict = {*(model._keep_in_fp32_modules_strict or ()), *wide}
        ignored = model._keys_to_ignore_on_load_unexpected or ()
        names = "|".join(re.escape(name) for name in description["layers"])
        model._keys_to_ignore_on_load_unexpected = {*ignored, rf"(^|\.)({names})\.{MARKER}$"}

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        # from here on it is a model like any other: to train, to change, and to save again
        self.remove_quantization_config(model)
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                module.config.__dict__.pop("_is_quantized", None)
        for name, layer in self.layers.items():
            if layer["form"] == SoftLinear.form:  # loading makes new parameters
                model.get_submodule(name).threshold.alpha.requires_grad_(layer["learns"])
        _align(model)
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What is written: see `_save`."""
        return self.state, self.metadata

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def describe(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Form and shape of every factored layer by name, outer ones first."""
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, Factored)]
    return {name: {"form": module.form, **module.description()} for name, module in layers}


def verify(files: list[Path]) -> dict[str, Any]:
    """The description in the headers of a folder's weights, after a check of every byte that matters.

    Raises
    ------
    ValueError
        Something is missing, damaged, or of another model.
    """
    seen: dict[str, Any] = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            checksum, _, text = (tensors.metadata() or {}).get(METHOD, "").partition(" ")
            if not text or _sha256(text.encode()) != checksum:
                raise ValueError(f"{file} has no whole softlms description: it is damaged, or of another model.")
            description = json.loads(text)
            if seen and seen != description:
                raise ValueError(f"{file} and {files[0].name} are parts of different models: save the model again.")
            seen = description
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                if _digest(tensors.get_tensor(name)) != description["tensors"].get(name):
                    raise ValueError(f"{name} in {file} is damaged: its checksum differs. Save or copy it again.")
    config = files[0].with_name("config.json")
    if config.is_file() and _sha256(config.read_bytes()) != seen["config"]:
        raise ValueError(
            f"{config} is not the one that was saved with these weights: it is damaged, or was edited. "
            "Restore it, and give what should differ to from_pretrained(..., name=value)."
        )
    return seen


def _save(original: Any, model: PreTrainedModel, folder: str | os.PathLike, options: dict[str, Any]) -> None:
    """All of ``save_pretrained`` into a hidden folder beside its place, then file by file there, weights first."""
    target = Path(folder)
    if target.is_file():
        raise FileExistsError(f"{target} is a file: give a folder.")
    target.mkdir(parents=True, exist_ok=True)
    push, state = options.pop("push_to_hub", False), options.pop("state_dict", None)
    hub = {name: options.pop(name) for name in ("repo_id", "commit_message", "create_pr", "private") if name in options}
    _check(model, options, pushed_state=push and state is not None)
    layers = describe(model)
    _remove_leftovers(target)
    # names as they are in this model: what is checked is what is read
    options["save_original_format"] = False
    staging = Path(tempfile.mkdtemp(prefix=f".saving-{process_mark()}-", dir=target))
    config = model.config
    try:
        config.quantization_config = SoftLMsConfig(attention=config._attn_implementation)
        config.dtype, config.architectures = str(model.dtype).removeprefix("torch."), [class_name(model)]
        config.save_pretrained(staging)
        state = dict(model.state_dict() if state is None else state)
        state |= {f"{name}.{MARKER}": torch.empty(0) for name in layers}
        description = {
            "layers": layers,
            "config": _sha256((staging / "config.json").read_bytes()),
            "tensors": {name: _digest(values) for name, values in state.items()},
        }
        text = json.dumps(description)
        model.hf_quantizer = SoftLMsQuantizer(config.quantization_config)
        model.hf_quantizer.state = state
        model.hf_quantizer.metadata = {METHOD: f"{_sha256(text.encode())} {text}"}
        original(model, staging, **options)
        if is_ours(target / "README.md"):
            write_card(model, staging)
        order = sorted(staging.iterdir(), key=lambda path: (not path.name.endswith(".safetensors"), path.name))
        weights = [path.name for path in target.iterdir() if WEIGHTS.fullmatch(path.name)]
        stale = set(weights) - {path.name for path in order}
        for path in order:
            path.replace(target / path.name)
        for name in stale:
            (target / name).unlink(missing_ok=True)  # another process may save the same
    finally:
        model.__dict__.pop("hf_quantizer", None)
        del config.quantization_config
        shutil.rmtree(staging, ignore_errors=True)
    if push:
        shards = {"max_shard_size": options["max_shard_size"]} if "max_shard_size" in options else {}
        model.push_to_hub(hub.pop("repo_id", target.name), token=options.get("token"), **shards, **hub)


def _remove_leftovers(target: Path) -> None:
    """Hidden folders of saves that were killed on this machine; another rank's save, which goes on, is let alone."""
    for left in filter(is_orphaned, target.glob(".saving-*")):
        shutil.rmtree(left, ignore_errors=True)


def _check(model: PreTrainedModel, options: dict[str, Any], *, pushed_state: bool) -> None:
    """Refuse what could not be loaded again."""
    if options.get("variant") is not None:
        raise ValueError("A compressed model has no variants in one folder (config.json is one): use another.")
    if model.is_remote_code():
        raise ValueError("Models with code of their own (trust_remote_code) cannot be saved compressed yet.")
    if pushed_state:
        raise ValueError("push_to_hub saves the model itself: load the state_dict into it first.")
    if any(values.is_meta for values in model.state_dict().values()):
        raise ValueError("The model is offloaded: load it without device_map to save it.")


def _register() -> None:
    """Tell transformers; again after a reload of this module, as in a notebook."""
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = SoftLMsConfig
    auto.AUTO_QUANTIZER_MAPPING[METHOD] = SoftLMsQuantizer
    present: Any = PreTrainedModel.save_pretrained
    original = getattr(present, "before_softlms", present)

    @functools.wraps(original)
    def save_pretrained(
        self: PreTrainedModel, save_directory: str | os.PathLike, is_main_process: bool = True, **options: Any
    ) -> None:
        adapters = getattr(self, "_hf_peft_config_loaded", False)  # then only these are written
        if adapters or not any(isinstance(module, Factored) for module in self.modules()):
            _forget(self.config)
            original(self, save_directory, is_main_process, **options)
        elif is_main_process:
            _save(original, self, save_directory, options)

    save_pretrained.before_softlms = original  # type: ignore[attr-defined]
    PreTrainedModel.save_pretrained = save_pretrained
    PreTrainedModel._upload_modified_files = _upload


def _forget(config: PreTrainedConfig) -> None:
    """A dense model made from a compressed one's configuration is not compressed."""
    of_ours = getattr(config, "quantization_config", None)
    if isinstance(of_ours, dict) and of_ours.get("quant_method") == METHOD:
        del config.quantization_config


def _upload(self: PreTrainedModel, working_dir: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
    """push_to_hub has just put the hub's card, or its template, in the place of the model card."""
    card = Path(working_dir) / "README.md"
    if is_ours(card) and any(isinstance(module, Factored) for module in self.modules()):
        write_card(self, card.parent, tags=ModelCard.load(card).data.tags or [])
    return PushToHubMixin._upload_modified_files(self, working_dir, *args, **kwargs)


def _localized(model: PreTrainedModel, layers: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The layers' names in this class, which may have (or be) the saved one's base model."""
    prefix = f"{model.base_model_prefix}."
    own = {name for name, _ in model.named_modules()}
    found: dict[str, dict[str, Any]] = {}
    for name, layer in layers.items():
        candidates = [name, name.removeprefix(prefix), prefix + name]
        # a part of a split layer is there as soon as that one is built
        here = [c for c in candidates if c in own or c.rpartition(".")[0] in found]
        if here:  # a head may be another one, or none
            found[here[0]] = layer
    if not found:
        raise ValueError(f"A {type(model).__name__} has none of the saved layers, such as {next(iter(layers))}.")
    return found


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _digest(values: Tensor) -> str:
    """Of type, shape and bytes."""
    digest = hashlib.sha256(f"{values.dtype} {tuple(values.shape)} ".encode())
    digest.update(values.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@torch.no_grad()
def _align(model: nn.Module) -> None:
    """Own memory for tensors that a mapped file left at odd addresses: there products differ in the last bits."""
    for values in (*model.parameters(), *model.buffers()):
        if values.device.type == "cpu" and values.data_ptr() % ALIGNMENT:
            values.data = values.data.clone()


_register()
