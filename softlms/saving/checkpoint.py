"""Save and load compressed models through transformers itself.

``import softlms`` is enough: ``model.save_pretrained(folder)`` writes a model with the modules of registered methods,
at its compressed size, and ``AutoModel....from_pretrained(folder)`` (or ``pipeline``) builds the same modules again.
The header of the weight files describes these modules. It also stores the configuration and a checksum of each tensor:
damaged or half-written weights are refused, and later changes of the configuration are reported. For each replaced
module the file also contains an empty tensor under a dense weight's name, so that transformers without softlms stops at
its shape instead of filling the module with random values.
"""

from __future__ import annotations

import copy
import inspect
import json
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils.generic import ContextManagers
from transformers.utils.hub import PushToHubMixin

from softlms.layers import Ranked
from softlms.methods.registry import forms
from softlms.model_card import class_name, is_ours, notes, write_card
from softlms.modules import Replacement
from softlms.origin import DENSE, METHOD, SoftLMsConfig, is_marked, mark, note_dense
from softlms.saving.loading import SoftLMsQuantizer, digest, put_in, sha256, share, verify
from softlms.sharding import check_gathered, is_sharded
from softlms.utils.files import is_orphaned, process_mark

__all__ = ["SoftLMsConfig", "SoftLMsQuantizer", "describe", "save", "unmarked", "upload", "verify"]

WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
REMEDY = "the folder cannot store it. Undo it (an adapter: merge_and_unload()), or save the model with torch.save."


def describe(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Form and shape of every replacement by name, outer ones first; a shared one is listed under each name."""
    named = model.named_modules(remove_duplicate=False)
    layers = [(name, module) for name, module in named if isinstance(module, Replacement)]
    return {name: {"form": _form(name, module), **module.description()} for name, module in layers}


def _form(name: str, module: Replacement) -> str:
    """Its form; ValueError if no registered method has exactly this class."""
    kind, form = _own_class(module), getattr(module, "form", None)
    if forms().get(str(form)) is not kind:
        raise ValueError(f"{name} is a {kind.__name__}, which from_pretrained does not know: {REMEDY}")
    return str(form)


def _shared(model: nn.Module, layers: Collection[str]) -> dict[str, str]:
    """Further names of shared tensors in replacements, each with the first name, under which it is stored."""
    inside = tuple(f"{name}." for name in layers)
    every = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    first: dict[int, str] = {}
    shared = {}
    for name, values in every:
        stored = first.setdefault(id(values), name)
        if stored != name and (name.startswith(inside) or stored.startswith(inside)):
            shared[name] = stored
    return shared


def save(original: Any, model: PreTrainedModel, options: dict[str, Any]) -> None:
    """Run ``save_pretrained`` into a hidden folder inside the target, then move the files, weights first."""
    target = Path(options.pop("save_directory"))
    if target.is_file():
        raise FileExistsError(f"{target} is a file: give a folder.")
    push, state = options.pop("push_to_hub", False), options.pop("state_dict", None)
    hub = {name: options.pop(name) for name in ("repo_id", "commit_message", "create_pr", "private") if name in options}
    _check(model, options, pushed_state=push and state is not None)
    if state is None:
        check_gathered(model, "save it with trainer.save_model(folder), called by every process")
    config, layers = model.config, describe(model)
    shared = _shared(model, layers)
    markers = _check_rebuilds(model, layers, shared)
    note_dense(model)
    if held := notes(config):
        config.softlms = held
    target.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(target)
    # keep this model's names, so that names checked are names read
    options["save_original_format"] = False
    staging = Path(tempfile.mkdtemp(prefix=f".saving-{process_mark()}-", dir=target))
    try:
        mark(model)
        config.dtype, config.architectures = str(model.dtype).removeprefix("torch."), [class_name(model)]
        config.save_pretrained(staging)
        written = (staging / "config.json").read_bytes()
        state = dict(model.state_dict() if state is None else state)
        state = {name: values for name, values in state.items() if name not in shared}
        state |= {name: torch.empty(0) for name in markers}
        description = {
            "layers": layers,
            "config": sha256(written),
            "configuration": json.loads(written),
            "dense": vars(model)[DENSE],
            "shared": shared,
            "markers": markers,
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
            (target / name).unlink(missing_ok=True)  # another process may be saving the same model
    finally:
        model.__dict__.pop("hf_quantizer", None)
        shutil.rmtree(staging, ignore_errors=True)
    if push:
        shards = {"max_shard_size": options["max_shard_size"]} if "max_shard_size" in options else {}
        model.push_to_hub(hub.pop("repo_id", target.name), token=options.get("token"), **shards, **hub)


def _remove_leftovers(target: Path) -> None:
    """Remove hidden folders of saves killed on this machine; running saves of other ranks are not touched."""
    for left in filter(is_orphaned, target.glob(".saving-*")):
        shutil.rmtree(left, ignore_errors=True)


def _check(model: PreTrainedModel, options: dict[str, Any], *, pushed_state: bool) -> None:
    """Refuse models that could not be loaded again."""
    if options.get("variant") is not None:
        raise ValueError("A compressed model has no variants in one folder (they share config.json): use another.")
    if options.get("distributed_checkpoint"):
        raise ValueError("A compressed model has no distributed checkpoints: save it without distributed_checkpoint.")
    if model.is_remote_code():
        raise ValueError("Models with custom code (trust_remote_code) cannot be saved compressed yet.")
    if pushed_state:
        raise ValueError("push_to_hub saves the model itself: load state_dict into it first.")
    for name, values in model.state_dict().items():
        if values.is_meta:
            raise ValueError("The model is offloaded: load it without device_map to save it.")
        if not is_sharded(values) and is_traceable_wrapper_subclass(values):
            raise ValueError(
                f"{name} is quantized ({type(values).__name__}): save it unquantized, and quantize after loading."
            )
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError("The model is quantized: save it unquantized, and quantize at or after loading.")


def _check_rebuilds(model: PreTrainedModel, layers: dict[str, dict[str, Any]], shared: Mapping[str, str]) -> list[str]:
    """Refuse a model with anything in it that `from_pretrained` would not build, and so would lose.

    Marks in `layers` those for which the model's own class has nothing in their place.

    Returns
    -------
    list of str
        For each replacement, the name of a dense tensor that it does not have: the name of its marker.

    Raises
    ------
    ValueError
        A module's class, or a tensor's name or shape, differs from what the model's own class builds from its
        configuration with the replacements put in.
    """
    own = _own_class(model)
    try:
        with ContextManagers(own.get_init_context(model.dtype, True, False, False)):
            fresh = own(copy.deepcopy(model.config))
    except TypeError:  # a user's class with unknown arguments
        _check_alone(model, layers)
        return [f"{name}.weight" for name in layers]
    held, dense = model.state_dict(), dict(fresh.named_modules())
    markers = []
    for name, layer in layers.items():
        if name in dense:
            names = [f"{name}.{part}" for part, _ in dense[name].named_parameters()]
            markers += [free for free in names if free not in held][:1]
        elif not any(name.startswith(f"{outer}.") for outer in layers):
            layer["added"] = True
    put_in(fresh, layers)
    share(fresh, shared)
    known = dict(fresh.named_modules())
    for name, module in model.named_modules():
        if name not in known or _own_class(module) is not type(known[name]):
            instead = f"has {_class_path(known[name])}" if name in known else "has nothing there"
            raise ValueError(f"{name} is {_class_path(module)}, where {own.__name__} {instead}: {REMEDY}")
    shapes = {name: tuple(values.shape) for name, values in model.state_dict().items()}
    expected = {name: tuple(values.shape) for name, values in fresh.state_dict().items()}
    if len(inspect.signature(own).parameters) > 1:  # parts are optional, such as BertModel's pooler
        expected = {name: shape for name, shape in expected.items() if not _is_left_out(model, name)}
    for name in [*shapes, *expected]:
        if shapes.get(name) != expected.get(name):
            raise ValueError(
                f"{name} has the shape {shapes.get(name)}, where {own.__name__} of this configuration has "
                f"{expected.get(name)}: {REMEDY}"
            )
    return list(dict.fromkeys(markers))


def _is_left_out(model: nn.Module, name: str) -> bool:
    """Whether the model was built without the module of this tensor, with None in its place."""
    part: Any = model
    for step in name.split(".")[:-1]:
        part = getattr(part, step, False)
        if part is None:
            return True
    return False


def _check_alone(model: nn.Module, layers: Mapping[str, dict[str, Any]]) -> None:
    """Refuse a layer with other tensors than a newly built one, and anything but linear layers."""
    for name, description in layers.items():
        layer: Any = model.get_submodule(name)
        if not isinstance(layer, Ranked):
            raise ValueError(
                f"{name} is a {type(layer).__name__} in a {type(model).__name__}, whose class takes more than a "
                f"configuration, so it cannot be rebuilt for comparison: {REMEDY}"
            )
        dense = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        fresh = forms()[description["form"]].skeleton(dense, description)
        held, expected = ({n: tuple(v.shape) for n, v in m.state_dict().items()} for m in (layer, fresh))
        if differing := [n for n in sorted(held.keys() | expected.keys()) if held.get(n) != expected.get(n)]:
            raise ValueError(f"{name} differs from a {type(fresh).__name__} in its tensors, {differing[0]}: {REMEDY}")


def _own_class(module: nn.Module) -> type[Any]:
    """The module's class without the subclasses that FSDP2 puts in front."""
    return next(kind for kind in type(module).__mro__ if not kind.__name__.startswith("FSDP"))


def _class_path(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


@contextmanager
def unmarked(config: PreTrainedConfig) -> Iterator[None]:
    """Remove the mark inside: a dense model with a compressed one's configuration is not compressed."""
    if not is_marked(config):
        yield
        return
    before = config.quantization_config
    del config.quantization_config
    try:
        yield
    finally:
        config.quantization_config = before


def upload(model: PreTrainedModel, working_dir: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
    """Write our model card again, which push_to_hub has replaced by the hub's card or its template."""
    card = Path(working_dir) / "README.md"
    if is_ours(card) and any(isinstance(module, Replacement) for module in model.modules()):
        write_card(model, card.parent, tags=ModelCard.load(card).data.tags or [])
    return PushToHubMixin._upload_modified_files(model, working_dir, *args, **kwargs)
