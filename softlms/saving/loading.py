"""transformers' hook around the loading of weights: builds the modules that the folder describes."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging

from softlms.methods.registry import forms
from softlms.modules import Attached, retie
from softlms.origin import DENSE, FORMAT, METHOD, REGISTRIES, SoftLMsConfig, mark, note_dense

__all__ = ["SoftLMsQuantizer", "digest", "make_quantizer", "put_in", "sha256", "share", "verify"]

logger = logging.get_logger(__name__)

BY_HARDWARE = re.compile(r"paged\|.*|flash_attention_\d|flex_attention|.+/.+")  # the last: hub kernels
ALIGNMENT = 64  # bytes


class Loading(HfQuantizer):
    """transformers' hook around the loading of weights: builds the replacements that the folder describes.

    If the folder's weights are in fact dense, it does nothing.
    """

    mark: SoftLMsConfig
    layers: Mapping[str, dict[str, Any]] = {}
    shared_buffers: Mapping[str, str] = {}

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse formats of newer versions."""
        if self.mark.format > FORMAT:
            raise ValueError(
                f"The model has softlms format {self.mark.format}, this softlms knows {FORMAT}: update softlms."
            )
        super().validate_environment(*args, **kwargs)

    def update_attn_implementation(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Use the saved model's attention, unless one is given."""
        saved = self.mark.attention
        if config._attn_implementation_internal is None and saved is not None:
            if BY_HARDWARE.fullmatch(saved):
                logger.warning(
                    f"The model was saved with attn_implementation={saved!r}, which not every machine has, and is "
                    "loaded with transformers' default: pass it to from_pretrained to use it."
                )
            else:
                _check_registered(saved, self.mark.registered)
                config._attn_implementation = saved
        return super().update_attn_implementation(config)

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if not checkpoint_files:
            raise ValueError(
                "A state_dict alone does not describe the layers of a compressed model: load its folder. (If it is "
                "dense, pass a configuration without quantization_config.)"
            )
        files = [Path(file) for file in checkpoint_files]
        if _is_described(files):
            self._build(model, files)
        else:
            _check_dense(model, files)
        super()._process_model_before_weight_loading(model, checkpoint_files=checkpoint_files, **kwargs)

    def _build(self, model: PreTrainedModel, files: list[Path]) -> None:
        description = verify(files)
        changes = _changes(files[0].with_name("config.json"), description)
        self.layers = _localized(model, description["layers"])
        _recall_dense(model, description, self.layers)
        put_in(model, self.layers)
        shared = _shared_here(model, description.get("shared", {}))
        share(model, shared)
        _check_shapes(model, self.layers, files, changes, shared)
        if changes:
            logger.warning(
                f"{files[0].with_name('config.json')} differs from the one saved with these weights: {changes}."
            )
        known = forms()
        precise = [f"{name}.{part}" for name, layer in self.layers.items() for part in known[layer["form"]].precise]
        exactly = {f"{re.escape(name)}$" for name in precise}
        model._keep_in_fp32_modules_strict = {*(model._keep_in_fp32_modules_strict or ()), *exactly}
        # transformers ties parameters alone
        self.shared_buffers = {name: first for name, first in shared.items() if not _is_parameter(model, name)}
        absent = {f"^{re.escape(name)}$" for name in self.shared_buffers}
        model._keys_to_ignore_on_load_missing = {*(model._keys_to_ignore_on_load_missing or ()), *absent}
        ignored = model._keys_to_ignore_on_load_unexpected or ()
        markers = description.get("markers", [f"{name}.weight" for name in description["layers"]])
        names = "|".join(map(re.escape, markers))
        model._keys_to_ignore_on_load_unexpected = {*ignored, rf"(^|\.)({names})$"}

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        share(model, self.shared_buffers)
        for name, layer in self.layers.items():
            module: Any = model.get_submodule(name)
            module.restore(name, layer)
            if isinstance(module, Attached):
                module.attach(model)
        share(model, self.shared_buffers)  # a module may have moved them
        _align(model)
        return super()._process_model_after_weight_loading(model, **kwargs)


class SoftLMsQuantizer(Loading):
    """The hook for a model that is only compressed; also stores what is written at saving."""

    def __init__(self, quantization_config: SoftLMsConfig, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        self.mark = quantization_config
        self.state: dict[str, Tensor] = {}
        self.metadata: dict[str, str] = {}

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        # from here on it is a model like any other: it can be trained, changed and saved
        self.remove_quantization_config(model)
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                module.config.__dict__.pop("_is_quantized", None)
        if self.layers:
            mark(model)
        return super()._process_model_after_weight_loading(model, **kwargs)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The state dict and metadata to write; see `softlms.saving.checkpoint.save`."""
        return self.state, self.metadata

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def make_quantizer(config: SoftLMsConfig, **options: Any) -> HfQuantizer:
    """The hook for a folder; if another library quantizes at loading, its hook is combined with ours."""
    if config.then is None:
        return SoftLMsQuantizer(config, **options)
    other = auto.AutoHfQuantizer.from_config(config.then, pre_quantized=False)
    kind = type(other)

    class Both(Loading, kind):  # type: ignore[misc, valid-type]
        mark = config

        def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
            super()._process_model_after_weight_loading(model, **kwargs)
            self.__class__ = kind  # from here on the model belongs to the other library
            return model

    other.__class__ = Both
    return other


def verify(files: list[Path]) -> dict[str, Any]:
    """Check every relevant byte of a folder's weights, and return the description in their headers.

    Raises
    ------
    ValueError
        Something is missing, damaged, or from another model.
    """
    seen: dict[str, Any] = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            checksum, _, text = (tensors.metadata() or {}).get(METHOD, "").partition(" ")
            if not text or sha256(text.encode()) != checksum:
                raise ValueError(f"{file} has no complete softlms description: it is damaged, or from another model.")
            description = json.loads(text)
            if seen and seen != description:
                raise ValueError(f"{file} and {files[0].name} are parts of different models: save the model again.")
            seen = description
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                if digest(tensors.get_tensor(name)) != description["tensors"].get(name):
                    raise ValueError(f"{name} in {file} is damaged: its checksum differs. Save or copy it again.")
    return seen


def _changes(config: Path, description: dict[str, Any]) -> str:
    """The entries of ``config.json`` that differ from those saved with the weights; empty if none do."""
    if not config.is_file() or sha256(config.read_bytes()) == description["config"]:
        return ""
    if "configuration" not in description:
        return "its entries (older versions did not record them)"
    now, then = json.loads(config.read_text(encoding="utf-8")), description["configuration"]
    differing = {name for name in now.keys() | then.keys() if now.get(name) != then.get(name)}
    return ", ".join(sorted(differing - {"transformers_version"}))


def put_in(model: nn.Module, layers: Mapping[str, dict[str, Any]]) -> None:
    """Put replacements with arbitrary values into a dense model.

    Parameters
    ----------
    model : nn.Module
    layers : mapping
        Form and description by name, outer ones first.

    Raises
    ------
    ValueError
        No registered method has such a form.
    """
    known = forms()
    for name, layer in layers.items():
        if layer["form"] not in known:
            raise ValueError(
                f"{name} has the form {layer['form']!r}, which no registered method knows: import the package that "
                f"registers it, or update softlms. Known: {', '.join(sorted(known))}."
            )
        try:
            dense = model.get_submodule(name)
        except AttributeError:  # the model's own class has nothing there
            dense = None
        model.set_submodule(name, known[layer["form"]].skeleton(dense, layer))


def share(model: nn.Module, shared: Mapping[str, str]) -> None:
    """Share tensors again: each further name gets the tensor under its stored name."""
    for name, stored in shared.items():
        (place, leaf), (source, original) = (n.rpartition(".")[::2] for n in (name, stored))
        setattr(model.get_submodule(place), leaf, getattr(model.get_submodule(source), original))
    parameters = {name: stored for name, stored in shared.items() if _is_parameter(model, name)}
    if parameters and isinstance(model, PreTrainedModel):
        retie(model, parameters)  # loading creates new parameters, and ties only those that it knows


def _is_parameter(model: nn.Module, name: str) -> bool:
    place, _, leaf = name.rpartition(".")
    return leaf in model.get_submodule(place)._parameters


def _shared_here(model: PreTrainedModel, shared: Mapping[str, str]) -> dict[str, str]:
    own = model.state_dict().keys()
    found = {}
    for names in shared.items():
        here = [next((c for c in _names(model, name) if c in own), None) for name in names]
        if None not in here:
            found[str(here[0])] = str(here[1])
    return found


def _recall_dense(model: PreTrainedModel, description: dict[str, Any], layers: Collection[str]) -> None:
    """Restore the record of the dense model; older folders lack the layers, which are as the class builds them."""
    note_dense(model)
    known = vars(model)[DENSE]
    saved = description.get("dense", {"parameters": description.get("rest", {}), "linears": known["linears"]})
    names = {*saved["parameters"], *(f"{name}.weight" for name in saved["linears"])}
    own = dict(model.named_parameters())
    way = next((i for i in range(3) if any(_names(model, name)[i] in own for name in names)), 0)
    prefix = f"{model.base_model_prefix}."

    def here(name: str) -> str | None:
        # a base model lacks the head
        return None if way == 1 and not name.startswith(prefix) else _names(model, name)[way]

    parameters = {place: size for name, size in saved["parameters"].items() if (place := here(name))}
    if "dense" in description:
        for kind in ("linears", "whole"):
            known[kind] = [place for name in saved.get(kind, []) if (place := here(name))]
    elif parameters:
        inside = tuple(f"{name}." for name in layers)
        parameters |= {name: size for name, size in known["parameters"].items() if name.startswith(inside)}
    known["parameters"] = parameters or known["parameters"]


def _names(model: PreTrainedModel, name: str) -> list[str]:
    """Possible names, in this class, of a name in the saved model: one may be the other's base model."""
    prefix = f"{model.base_model_prefix}."
    return [name, name.removeprefix(prefix), prefix + name]


def _localized(model: PreTrainedModel, layers: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The layers under their names in this class."""
    own = {name for name, _ in model.named_modules()}
    found: dict[str, dict[str, Any]] = {}
    for name, layer in layers.items():
        # a part of a replacement exists once that is built; an addition needs only a parent
        places = own if layer.get("added") else found
        here = [c for c in _names(model, name) if c in own or c.rpartition(".")[0] in places]
        if here:  # a head may differ, or be missing
            found[here[0]] = layer
    if not found:
        raise ValueError(f"A {type(model).__name__} has none of the saved layers, such as {next(iter(layers))}.")
    return found


def _check_shapes(
    model: PreTrainedModel,
    layers: Mapping[str, dict[str, Any]],
    files: Sequence[Path],
    changes: str,
    shared: Collection[str],
) -> None:
    """Refuse weights that do not fit the replacements in this configuration: they would be ignored."""
    inside = tuple(f"{name}." for name in layers)
    own = {name: values for name, values in model.state_dict().items() if name.startswith(inside)}
    missing = own.keys() - set(shared)
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                here = next((c for c in _names(model, name) if c in own), None)
                shape = tuple(tensors.get_slice(name).get_shape())
                if here is not None and tuple(own[here].shape) != shape:
                    raise ValueError(
                        f"{name} is of shape {shape}, but the configuration expects {tuple(own[here].shape)}. It "
                        f"differs from the saved one in: {changes or 'options of from_pretrained'}. Restore it."
                    )
                missing.discard(here or "")
    if missing:
        raise ValueError(f"The weights lack {min(missing)} of a compressed layer, so it would be random: save again.")


def _is_described(files: Sequence[Path]) -> bool:
    """Whether any of these weights were written by softlms."""
    for file in files:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as tensors:
                if METHOD in (tensors.metadata() or {}):
                    return True
    return False


def _check_dense(model: PreTrainedModel, files: Sequence[Path]) -> None:
    """Refuse weights of factored layers without a description: they would be ignored."""
    linears = {name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    for file in files:
        for name in _tensor_names(file):
            for here in _names(model, name):
                stems = [here[: dot.start()] for dot in re.finditer(r"\.", here)]
                layer = next((stem for stem in stems if stem in linears), None)
                if layer is not None and here[len(layer) + 1 :] not in ("weight", "bias"):
                    raise ValueError(
                        f"{file} has {name} but no complete softlms description: it is damaged, or was not written by "
                        "save_pretrained of the compressed model. Use that to save it."
                    )


def _tensor_names(file: Path) -> list[str]:
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as tensors:
            return list(tensors.keys())
    return list(torch.load(file, map_location="meta", weights_only=True))


def _check_registered(attention: str, registries: Sequence[str]) -> None:
    for registry in registries:
        if attention not in REGISTRIES[registry]:
            raise ValueError(
                f"The model was saved with the attention function {attention!r}: call "
                f"{registry}.register({attention!r}, ...) first, or pass another to from_pretrained, such as "
                "attn_implementation='sdpa'."
            )


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def digest(values: Tensor) -> str:
    """Hash of dtype, shape and bytes."""
    digest = hashlib.sha256(f"{values.dtype} {tuple(values.shape)} ".encode())
    digest.update(values.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@torch.no_grad()
def _align(model: nn.Module) -> None:
    """Copy tensors that a mapped file left at unaligned addresses, where products differ in the last bits."""
    for values in (*model.parameters(), *model.buffers()):
        if values.device.type == "cpu" and values.data_ptr() % ALIGNMENT:
            values.data = values.data.clone()
