"""Saved models: the averaged weights with a description of their model, and loading them again. No pickle either way."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from scoreaction.diffusion import processes
from scoreaction.diffusion.processes import Clock
from scoreaction.disk import staged
from scoreaction.networks.adapters import base_tensors
from scoreaction.networks.lora_files import copy_into, refuse_different
from scoreaction.networks.masked import MODELS
from scoreaction.networks.model import Model
from scoreaction.networks.sharding import gathered
from scoreaction.sampling.prompt_path import make_chooser
from scoreaction.sampling.sampler import Sampler
from scoreaction.training.run_folder import MODEL_DESCRIPTION as DESCRIPTION
from scoreaction.world import World

WEIGHTS, NETWORK, REFERENCE = "weights.safetensors", "network.safetensors", "reference.safetensors"


def save_model(model: Model, sampler: Sampler, prompts: list[Any] | None, path: Path, *, recipe: str | None) -> Path:
    """Writes the trained parameters, averaged, with a description of the model and of its sampler.

    `weights.safetensors` and `model.json` always, and what the model's `export` writes for other libraries; `recipe.yaml`
    where there is one; else, where the network can be described without pickle, all its tensors and the reference's.
    """
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path}: is a file; give the name of a folder")
    prompts = prompts if all(isinstance(prompt, str | int | float) for prompt in prompts or []) else None
    description = described(model) | {"sampler": sampler.model_dump(), "prompts": prompts, "functions": model.functions}
    description["moves_noise"], description["net"] = model.moves_noise, None
    description["chooser"] = None if model.chooser is None else model.chooser.description
    leads = World.current().leads
    with model.averaged(), gathered(model, keep=leads):
        if leads:
            _write(model, path, description, recipe)
    return path


def _write(model: Model, path: Path, description: dict[str, Any], recipe: str | None) -> None:
    with staged(path, last=DESCRIPTION) as part:
        save_file(_plain_tensors(dict(model.parameters.items())), part / WEIGHTS)
        if model.export is not None and model.steps_alone:  # other libraries know no other policy
            model.export(part)
        if recipe is not None:
            (part / "recipe.yaml").write_text(recipe, encoding="utf-8")
        else:
            try:
                description["net"] = describe(model.net)
            except TypeError:
                pass  # `load` then asks for the network itself
            else:
                if model.lora is None:
                    save_file(_plain_tensors(model.net.state_dict()), part / NETWORK)
                save_file(_plain_tensors(base_tensors(model.reference_net.state_dict())), part / REFERENCE)
            for name in (DESCRIPTION, NETWORK, REFERENCE):  # of a model that was saved here before
                if not (part / name).exists():
                    (path / name).unlink(missing_ok=True)
        (part / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def described(model: Model) -> dict[str, Any]:
    """Description of a model to which weights belong, as JSON gives it back."""
    kind = {
        "process": {"name": type(model.process).__name__, **asdict(cast(Any, model.process))},
        "predicts": model.predicts,
        "shape": list(model.shape),
        "true_cfg": model.true_cfg,
        "lora": None if model.lora is None else asdict(model.lora),
    }
    return json.loads(json.dumps(kind | ({"causal": True} if model.causal else {}), default=str))


def _plain_tensors(tensors: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}


def read_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; ValueError with the file for one that is damaged."""
    try:
        weights = load_file(file)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, UnicodeError) as error:
        raise ValueError(
            f"{file}: damaged or cut short ({str(error).partition(chr(10))[0][:80]}); fetch or save it again"
        ) from error
    return weights


def load_weights(model: Model, path: Path) -> None:
    """Puts saved weights into a model that was built alike; ValueError names what does not fit or is not finite."""
    file = path / WEIGHTS
    if not file.exists():
        raise ValueError(f"{path}: no {WEIGHTS} there; give the folder that save wrote")
    weights = read_weights(file)
    odd = [name for name, value in weights.items() if value.is_floating_point() and not bool(torch.isfinite(value).all())]
    if odd:
        raise ValueError(f"{file}: {odd[0]} holds numbers that are not finite: a model that diverged; load another one")
    refuse_different(model.parameters, weights, f"{file}:")
    copy_into(model.parameters, weights)
    model.average, model.selected = {name: value.to(model.device) for name, value in weights.items()}, None


def load_described(path: Path, net: nn.Module | Model | None = None) -> Model:
    """Loads the model that `save_model` wrote without a recipe; net: the pretrained one, if no file can hold it."""
    file = path / DESCRIPTION
    if not file.exists():
        raise ValueError(f"{path}: no {DESCRIPTION} there; give the folder that save wrote, or summary() in a run's")
    description = json.loads(file.read_text())
    if isinstance(net, Model):
        different = [name for name, value in described(net).items() if value != description.get(name)]
        if different:
            raise ValueError(f"{path}: net is another model than the one that was saved: {', '.join(different)} differ")
    model, sampler = net if isinstance(net, Model) else _built(path, description, net), description["sampler"]
    if description.get("chooser") is not None:
        if not description["prompts"]:
            raise ValueError(f"{path}: its prompts were not texts, so that the policy that chooses them cannot be rebuilt")
        model.choose_prompts(make_chooser(model, description["prompts"], **description["chooser"]))
    load_weights(model, path)
    model.net.eval()  # as it was trained: dropout and batch statistics off
    model.guidance, model.grid, model.prompts = sampler["guidance"], sampler["grid"], description["prompts"] or model.prompts
    model.off_below, model.moves_noise = sampler["off_below"], description.get("moves_noise", False)
    if sampler["negative_prompt"] is not None:
        model.lead_away_from(sampler["negative_prompt"], guidance=model.guidance)
    return model


def _built(path: Path, description: dict[str, Any], net: nn.Module | None) -> Model:
    """The model of a description, around the pretrained network or one that is rebuilt."""
    if description["functions"] or (net is None and description["net"] is None):
        lost = " and ".join(description["functions"]) or "network"
        raise ValueError(
            f"{path}: the model's {lost} cannot be rebuilt from a file; give the Model as it was before training:"
            " load(path, net=...)"
        )
    if net is None:
        net = rebuild(description["net"])
    if (path / REFERENCE).is_file():
        try:
            net.load_state_dict(read_weights(path / REFERENCE))
        except RuntimeError as error:
            raise ValueError(f"{path / REFERENCE}: belongs to another network: {' '.join(str(error).split())}") from error
    lora = description["lora"]
    if lora is None:  # what was frozen stays frozen
        trained = read_weights(path / WEIGHTS)
        for name, parameter in net.named_parameters():
            parameter.requires_grad_(name in trained)
    process = _process(description["process"])
    return MODELS.get(type(process), Model).restored(
        net,
        process=process,
        predicts=description["predicts"],
        shape=description["shape"],
        true_cfg=description["true_cfg"],
        lora_rank=lora and lora["rank"],
        lora_alpha=lora and lora["alpha"],
        lora_targets=lora and lora["targets"],
        **({"causal": True} if description.get("causal") else {}),
    )


def _process(values: dict[str, Any]) -> Clock:
    kind = getattr(processes, values["name"], None)
    if not (isinstance(kind, type) and issubclass(kind, Clock)):
        raise ValueError(f"model.json: unknown process {values['name']!r}")
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k != "name"})


_OWN = {*nn.Module().__dict__, "peft_config"}
"""Attributes of every module, or of one with adapters, which `rebuild` makes anew."""


def describe(module: nn.Module) -> dict[str, Any]:
    """A module as plain values: its class, attributes, children, and the shapes of its tensors, all without adapters.

    TypeError where it has more.

    >>> describe(nn.Linear(2, 3))["attributes"]
    {'in_features': 2, 'out_features': 3}
    """
    if "lora_A" in module._modules:  # a layer that has adapters
        module = cast(Any, module).base_layer
    if module._forward_hooks or module._forward_pre_hooks:
        raise TypeError("a module with hooks has no plain description")
    kind = type(module)
    return {
        "class": [kind.__module__, kind.__qualname__],
        "attributes": {name: _plain(value) for name, value in module.__dict__.items() if name not in _OWN},
        "training": module.training,
        "parameters": {name: _shape(value) for name, value in module._parameters.items()},
        "buffers": {name: _shape(value) for name, value in module._buffers.items()},
        "children": {name: None if child is None else describe(child) for name, child in module._modules.items()},
    }


def rebuild(description: dict[str, Any]) -> nn.Module:
    """The module of a description, its tensors empty. Only classes of modules that are already imported are made."""
    module_name, qualname = description["class"]
    kind: Any = sys.modules.get(module_name)
    for part in qualname.split("."):
        kind = getattr(kind, part, None)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise ValueError(
            f"the network's class {module_name}.{qualname} is not imported; import it, or give load(path, net=...)"
        )
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    for name, value in description["attributes"].items():
        module.__dict__[name] = _whole(value)
    for name, shape in description["parameters"].items():
        empty = None if shape is None else nn.Parameter(torch.empty(shape["shape"], dtype=getattr(torch, shape["dtype"])))
        module.register_parameter(name, empty)
    for name, shape in description["buffers"].items():
        module.register_buffer(
            name, None if shape is None else torch.empty(shape["shape"], dtype=getattr(torch, shape["dtype"]))
        )
    for name, child in description["children"].items():
        module.add_module(name, None if child is None else rebuild(child))
    return module.train(description["training"])


def _shape(value: Tensor | None) -> dict[str, Any] | None:
    return None if value is None else {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return {"tuple" if isinstance(value, tuple) else "list": [_plain(item) for item in value]}
    if isinstance(value, Clock):
        named = {field.name: getattr(value, field.name) for field in fields(cast(Any, value))}
        return {"process": {"name": type(value).__name__, **named}}
    raise TypeError(f"no plain description of {type(value).__name__}")


def _whole(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if "process" in value:
        return _process(value["process"])
    (kind, items), *_ = value.items()
    whole = [_whole(item) for item in items]
    return tuple(whole) if kind == "tuple" else whole
