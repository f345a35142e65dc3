"""LoRA adapters of the policy and of the consistency model in one network, of which a call uses one or none."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, cast

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from scoreaction.errors import nearest
from scoreaction.networks.labels import LabelTable

Role = Literal["policy", "reference", "consistency"]
NAMES: dict[Role, str] = {"policy": "default", "consistency": "consistency"}
"""Names of the roles' adapters in peft; the reference has none."""
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers that LoRA can change."""


@dataclass(frozen=True)
class LoraShape:
    """Placement and size of a LoRA adapter, `W + alpha/rank B A`.

    targets: names of linear layers and convolutions; one that is no layer's name means all layers whose names end so. ranks:
    ranks that differ from `rank`, by the module's whole name; their alpha is scaled so that alpha/rank is the same everywhere.
    """

    rank: int
    alpha: float
    targets: Sequence[str]
    ranks: Mapping[str, int] = field(default_factory=dict)


class Adapters:
    """LoRA adapters (Hu et al. 2022, arXiv 2106.09685) of one network, one for each role, made by peft.

    The reference is the network with all of them switched off. Between calls the policy's adapter is on.
    """

    def __init__(self, net: nn.Module) -> None:
        refuse_adapters(net)
        self.net = net
        self.layers: list[Any] = [module for module in net.modules() if isinstance(module, LabelTable)]

    def add(self, role: Role, shape: LoraShape) -> dict[str, nn.Parameter]:
        """Adds an adapter with B = 0, which changes nothing yet, and returns its parameters by name, in float32.

        The `requires_grad` of all other parameters stays as it is. ValueError for a target that names no layer.
        """
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.tuners_utils import BaseTunerLayer

        trains = {id(p): p.requires_grad for p in self.net.parameters()}
        config = LoraConfig(
            r=shape.rank,
            lora_alpha=cast(int, shape.alpha),
            target_modules="|".join(map(re.escape, find_targets(self.net, shape.targets))),
            init_lora_weights="gaussian",
            rank_pattern={f"^{re.escape(name)}": rank for name, rank in shape.ranks.items()},
            alpha_pattern={f"^{re.escape(n)}": cast(int, r * shape.alpha / shape.rank) for n, r in shape.ranks.items()},
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # a second adapter is meant
            inject_adapter_in_model(config, self.net, adapter_name=NAMES[role])
        self.layers = [m for m in self.net.modules() if isinstance(m, BaseTunerLayer | LabelTable)]
        for layer in self.layers:
            if isinstance(layer, BaseTunerLayer):
                layer.__class__ = _with_whole_weight(layer.__class__)
        for p in self.net.parameters():
            p.requires_grad_(trains.get(id(p), True))
        for p in self.parameters(role).values():
            p.data = p.data.float()  # also if the frozen weights are in half precision
        self._switch("policy")
        return self.parameters(role)

    def parameters(self, role: Role) -> dict[str, nn.Parameter]:
        """Parameters of a role's adapter by name."""
        pattern = re.compile(rf"\.lora_\w+\.{NAMES[role]}(\.|$)")
        return {name: p for name, p in self.net.named_parameters() if pattern.search(name)}

    def call(self, role: Role, net: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Computes `net(x)` with the adapter of this role switched on, now and during the backward pass.

        Gradient checkpointing runs parts of the network again in the backward pass; hooks at both ends of the call switch
        the same adapter on there. A backward pass visits calls in reverse order, one after the other, so they do not mix.
        """
        if not self.layers:
            return net(x)
        x = x.view_as(x)
        if x.requires_grad:
            x.register_hook(lambda _: self._switch("policy"))
        with self._on(role):
            y = net(x)
        if y.requires_grad:
            y.register_hook(lambda _: self._switch(role))
        return y

    @contextmanager
    def _on(self, role: Role) -> Iterator[None]:
        try:
            self._switch(role)
            yield
        finally:
            self._switch("policy")

    def _switch(self, role: Role) -> None:
        state = role == "reference", [NAMES.get(role, NAMES["policy"])]
        first = self.layers[0]  # all are switched together, by peft too
        if (first._disable_adapters, first._active_adapter) == state:
            return
        for layer in self.layers:
            layer._disable_adapters, layer._active_adapter = state


@cache
def _with_whole_weight(kind: type) -> type:
    """The class of LoRA layers whose `weight` is `W + alpha/rank B A` of the adapter that is on, and not W alone.

    Some code reads weights and never calls the layer: torch's fused transformer layers, the output of its attention.
    """

    def weight(layer: Any) -> Tensor:
        base = layer.get_base_layer().weight
        on = [] if layer.disable_adapters or not base.is_floating_point() else layer.active_adapters
        return sum((layer.get_delta_weight(name).to(base) for name in on if name in layer.r), base)

    copies = {"__reduce_ex__": lambda layer, _: (_without_state, (kind,), vars(layer))}  # pickle knows no class made here
    return kind if "weight" in vars(kind) else type(kind.__name__, (kind,), {"weight": property(weight), **copies})


def _without_state(kind: type) -> Any:
    made: Any = _with_whole_weight(kind)
    return made.__new__(made)


def find_targets(net: nn.Module, targets: Sequence[str], *, key: str = "lora_targets") -> list[str]:
    """Names of the layers that LoRA targets mean; ValueError, naming `key`, for a target that names none.

    >>> find_targets(nn.ModuleDict({"out": nn.Linear(2, 2), "block": nn.ModuleDict({"out": nn.LayerNorm(2)})}), ["out"])
    ['out']
    """
    names = dict.fromkeys(name for name, module in base_modules(net).items() if isinstance(module, LAYERS))
    layers = {t: [t] if t in names else [name for name in names if name.endswith(f".{t}")] for t in targets}
    for target, matches in layers.items():
        if not matches:
            ends = {name.removesuffix(".0").rpartition(".")[2] + (".0" if name.endswith(".0") else "") for name in names}
            hint = nearest(target, {end for end in ends if not end[:1].isdigit()} or names)
            raise ValueError(f"{key}: {target!r} names no linear layer or convolution of the network; {hint}")
    return list(dict.fromkeys(name for matches in layers.values() for name in matches))


def refuse_adapters(net: nn.Module) -> None:
    """Raises ValueError for a network that has adapters: they would be taken for the model's own, and switched with them."""
    for name, module in net.named_modules():
        if hasattr(module, "base_layer") and hasattr(module, "active_adapters"):
            raise ValueError(
                f"net: it already has an adapter ({', '.join(module.active_adapters)} at {name}); load the network or pipeline"
                " anew, or, for a LoRA of your own, merge it into the weights and remove its layers (diffusers: fuse_lora() and"
                " unload_lora_weights(); peft: merge_and_unload())"
            )


def frozen(net: nn.Module) -> nn.Module:
    """A copy of a network, frozen and in evaluation mode; ValueError, with the remedy, where there can be none."""
    for module in net.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and not value.is_leaf:  # such as weight_norm's weight, which a hook makes anew
                setattr(module, name, value.detach())
    try:
        return copy.deepcopy(net).requires_grad_(False).eval()
    except Exception as error:
        raise ValueError(
            f"net: the frozen reference is a copy, and copy.deepcopy fails ({type(error).__name__}: {error}); take out what"
            " cannot be copied, or set lora_rank: LoRA needs no copy"
        ) from error


def base_modules(net: nn.Module) -> dict[str, nn.Module]:
    """Modules of a network by their names without adapters; those of the adapters are left out."""
    return {
        name.removesuffix(".base_layer"): module
        for name, module in net.named_modules()
        if name and ".lora_" not in name and not hasattr(module, "base_layer")
    }


def base_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a network by their names without adapters; those of the adapters are left out.

    >>> import torch
    >>> list(base_tensors({"a.base_layer.weight": torch.ones(1), "a.lora_A.default.weight": torch.ones(1)}))
    ['a.weight']
    """
    return {name.replace(".base_layer.", "."): value for name, value in tensors.items() if ".lora_" not in name}


def without_adapters(net: nn.Module) -> nn.Module:
    """Copies a network as it was before adapters were added and labels learned, frozen and in evaluation mode."""
    copied = frozen(net)
    for module in copied.modules():
        if isinstance(module, LabelTable):
            module.vectors.zero_()
    for name, module in list(copied.named_modules()):
        if hasattr(module, "base_layer"):
            parent, _, child = name.rpartition(".")
            setattr(copied.get_submodule(parent), child, module.base_layer)
    return copied


@contextmanager
def replaced(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Context in which parameters have the values of the same names.

    A tensor that is whole lends its place, which costs nothing. A sharded network is gathered from memory that is its own:
    there the contents change.
    """
    own = {name: p.detach().clone() if isinstance(p, DTensor) else p.data for name, p in parameters.items() if name in values}

    def put(contents: Mapping[str, Tensor]) -> None:
        for name, value in contents.items():
            p = parameters[name]
            if isinstance(p, DTensor):
                p.detach().copy_(value)
            else:
                p.data = value

    try:
        put(values)
        yield
    finally:
        put(own)
