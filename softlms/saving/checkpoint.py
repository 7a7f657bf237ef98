"""Save and load compressed models through transformers itself.

``import softlms`` is all it takes: ``model.save_pretrained(folder)`` writes a model with factored layers, in whatever
form, at its own size, and ``AutoModel....from_pretrained(folder)`` (or ``pipeline``) builds the same layers again. The
weights' header says what stands where, and holds a checksum of each tensor and the configuration: damaged or
half-written weights are refused, a configuration that has changed since is told. For each factored layer the file also
holds an empty tensor under the dense weight's name, so that transformers without softlms stops at its shape instead of
filling the layer with random values.
"""

from __future__ import annotations

import copy
import functools
import inspect
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers import auto
from transformers.utils.generic import ContextManagers
from transformers.utils.hub import PushToHubMixin

from softlms.files import is_orphaned, process_mark
from softlms.layers import Factored
from softlms.origin import METHOD, REST, SoftLMsConfig, is_marked, mark
from softlms.saving.loading import FORMS, MARKER, SoftLMsQuantizer, digest, factor, make_quantizer, sha256, verify
from softlms.saving.model_card import class_name, is_ours, notes, write_card

__all__ = ["SoftLMsConfig", "SoftLMsQuantizer", "verify"]

WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
REMEDY = "the folder cannot hold it. Undo it (an adapter: merge_and_unload()), or keep the model with torch.save."


def describe(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Form and shape of every factored layer by name, outer ones first."""
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, Factored)]
    return {name: {"form": module.form, **module.description()} for name, module in layers}


def _save(original: Any, model: PreTrainedModel, options: dict[str, Any]) -> None:
    """All of ``save_pretrained`` into a hidden folder beside its place, then file by file there, weights first."""
    target = Path(options.pop("save_directory"))
    if target.is_file():
        raise FileExistsError(f"{target} is a file: give a folder.")
    push, state = options.pop("push_to_hub", False), options.pop("state_dict", None)
    hub = {name: options.pop(name) for name in ("repo_id", "commit_message", "create_pr", "private") if name in options}
    _check(model, options, pushed_state=push and state is not None)
    config, layers = model.config, describe(model)
    _check_rebuilds(model, layers)
    if held := notes(config):
        config.softlms = held
    target.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(target)
    # names as they are in this model: what is checked is what is read
    options["save_original_format"] = False
    staging = Path(tempfile.mkdtemp(prefix=f".saving-{process_mark()}-", dir=target))
    try:
        mark(model)
        config.dtype, config.architectures = str(model.dtype).removeprefix("torch."), [class_name(model)]
        config.save_pretrained(staging)
        written = (staging / "config.json").read_bytes()
        state = dict(model.state_dict() if state is None else state)
        state |= {f"{name}.{MARKER}": torch.empty(0) for name in layers}
        description = {
            "layers": layers,
            "config": sha256(written),
            "configuration": json.loads(written),
            "rest": vars(model).get(REST, {}),
            "tensors": {name: digest(values) for name, values in state.items()},
        }
        text = json.dumps(description)
        model.hf_quantizer = SoftLMsQuantizer(SoftLMsConfig(**config.quantization_config))
        model.hf_quantizer.state = state
        model.hf_quantizer.metadata = {METHOD: f"{sha256(text.encode())} {text}"}
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
    if options.get("distributed_checkpoint"):
        raise ValueError("A compressed model has no distributed checkpoints: save it without distributed_checkpoint.")
    if model.is_remote_code():
        raise ValueError("Models with code of their own (trust_remote_code) cannot be saved compressed yet.")
    if pushed_state:
        raise ValueError("push_to_hub saves the model itself: load the state_dict into it first.")
    for name, values in model.state_dict().items():
        if values.is_meta:
            raise ValueError("The model is offloaded: load it without device_map to save it.")
        if is_traceable_wrapper_subclass(values) and not hasattr(values, "full_tensor"):
            raise ValueError(
                f"{name} is quantized ({type(values).__name__}): save the model before, quantize it after loading."
            )
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError("The model is quantized: save it before, and quantize it at loading or after.")


def _check_rebuilds(model: PreTrainedModel, layers: Mapping[str, dict[str, Any]]) -> None:
    """Refuse a model with anything in it that `from_pretrained` would not build: it would be lost.

    Raises
    ------
    ValueError
        A module is of another class, or a tensor of another name or shape, than the model's own class makes from its
        configuration with the factored layers put in.
    """
    own = _own_class(model)
    for name, layer in layers.items():
        kind = _own_class(model.get_submodule(name))
        if FORMS.get(layer["form"]) is not kind:
            raise ValueError(f"{name} is a {kind.__name__}, which from_pretrained does not know: {REMEDY}")
    try:
        with ContextManagers(own.get_init_context(model.dtype, True, False, False)):
            fresh = own(copy.deepcopy(model.config))
    except TypeError:  # a class of the user's, with arguments that only they know
        _check_alone(model, layers)
        return
    factor(fresh, layers)
    known = dict(fresh.named_modules())
    for name, module in model.named_modules():
        if name not in known or _own_class(module) is not type(known[name]):
            instead = f"has {_class_path(known[name])}" if name in known else "has nothing there"
            raise ValueError(f"{name} is {_class_path(module)}, where {own.__name__} {instead}: {REMEDY}")
    shapes = {name: tuple(values.shape) for name, values in model.state_dict().items()}
    expected = {name: tuple(values.shape) for name, values in fresh.state_dict().items()}
    if len(inspect.signature(own).parameters) > 1:  # parts are options then, such as BertModel's pooler
        expected = {name: shape for name, shape in expected.items() if not _is_left_out(model, name)}
    for name in [*shapes, *expected]:
        if shapes.get(name) != expected.get(name):
            raise ValueError(
                f"{name} has the shape {shapes.get(name)}, where {own.__name__} of this configuration has "
                f"{expected.get(name)}: {REMEDY}"
            )


def _is_left_out(model: nn.Module, name: str) -> bool:
    """Whether the model was built without the module of this tensor: None stands there."""
    part: Any = model
    for step in name.split(".")[:-1]:
        part = getattr(part, step, False)
        if part is None:
            return True
    return False


def _check_alone(model: nn.Module, layers: Mapping[str, dict[str, Any]]) -> None:
    """Refuse a factored layer that holds other tensors than one that is built anew."""
    for name, description in layers.items():
        layer: Any = model.get_submodule(name)
        dense = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        fresh = FORMS[description["form"]].skeleton(dense, description)
        held, expected = ({n: tuple(v.shape) for n, v in m.state_dict().items()} for m in (layer, fresh))
        if differing := [n for n in sorted(held.keys() | expected.keys()) if held.get(n) != expected.get(n)]:
            raise ValueError(f"{name} holds other tensors than a {type(fresh).__name__}, {differing[0]}: {REMEDY}")


def _own_class(module: nn.Module) -> type[Any]:
    """FSDP2 puts classes of its own before a module's."""
    return next(kind for kind in type(module).__mro__ if not kind.__name__.startswith("FSDP"))


def _class_path(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _register() -> None:
    """Tell transformers; again after a reload of this module, as in a notebook."""
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = SoftLMsConfig
    auto.AUTO_QUANTIZER_MAPPING[METHOD] = make_quantizer
    present: Any = PreTrainedModel.save_pretrained
    original = getattr(present, "before_softlms", present)
    signature = inspect.signature(original)

    # transformers' own hook writes in place, and over the state_dict it is given: hence this way around it
    @functools.wraps(original)
    def save_pretrained(self: PreTrainedModel, *args: Any, **options: Any) -> None:
        adapters = getattr(self, "_hf_peft_config_loaded", False)  # then only these are written
        if adapters or not any(isinstance(module, Factored) for module in self.modules()):
            with _unmarked(self.config):
                original(self, *args, **options)
            return
        given = signature.bind(self, *args, **options).arguments
        given |= given.pop("kwargs", {})
        del given["self"]
        if given.pop("is_main_process", True):
            _save(original, self, given)

    save_pretrained.before_softlms = original  # type: ignore[attr-defined]
    PreTrainedModel.save_pretrained = save_pretrained
    PreTrainedModel._upload_modified_files = _upload
    merge: Any = auto.AutoHfQuantizer.merge_quantization_configs
    merge = getattr(merge, "before_softlms", merge)

    @functools.wraps(merge)
    def merge_quantization_configs(quantization_config: Any, quantization_config_from_args: Any) -> Any:
        asked = quantization_config_from_args
        if asked is None or isinstance(asked, SoftLMsConfig) or not _is_ours(quantization_config):
            return merge(quantization_config, asked)
        return SoftLMsConfig(**dict(quantization_config), then=asked)

    merge_quantization_configs.before_softlms = merge  # type: ignore[attr-defined]
    auto.AutoHfQuantizer.merge_quantization_configs = staticmethod(merge_quantization_configs)


@contextmanager
def _unmarked(config: PreTrainedConfig) -> Iterator[None]:
    """A dense model made from a compressed one's configuration, or sharing it, is not compressed."""
    if not is_marked(config):
        yield
        return
    before = config.quantization_config
    del config.quantization_config
    try:
        yield
    finally:
        config.quantization_config = before


def _upload(self: PreTrainedModel, working_dir: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
    """push_to_hub has just put the hub's card, or its template, in the place of the model card."""
    card = Path(working_dir) / "README.md"
    if is_ours(card) and any(isinstance(module, Factored) for module in self.modules()):
        write_card(self, card.parent, tags=ModelCard.load(card).data.tags or [])
    return PushToHubMixin._upload_modified_files(self, working_dir, *args, **kwargs)


def _is_ours(config: Any) -> bool:
    return dict(config).get("quant_method") == METHOD


_register()
