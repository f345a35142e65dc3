"""LoRA adapters of the policy and of the consistency model in one network, of which a call uses one or none."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from torch import Tensor, nn

Role = Literal["policy", "reference", "consistency"]
NAMES: dict[Role, str] = {"policy": "default", "consistency": "consistency"}
"""Names of the roles' adapters in peft; the reference has none."""


@dataclass(frozen=True)
class LoraShape:
    """Placement and size of a LoRA adapter, `W + alpha/rank B A`.

    targets: names of modules, or the endings of names; a single text is a regular expression of whole names. ranks: ranks
    that differ from `rank`, by the module's whole name; their alpha is scaled so that alpha/rank is the same everywhere.
    """

    rank: int
    alpha: float
    targets: Sequence[str] | str
    ranks: Mapping[str, int] = field(default_factory=dict)


class Adapters:
    """LoRA adapters (Hu et al. 2022, arXiv 2106.09685) of one network, one for each role, made by peft.

    The reference is the network with all of them switched off. Between calls the policy's adapter is on.
    """

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        self.layers: list[Any] = []

    def add(self, role: Role, shape: LoraShape) -> dict[str, nn.Parameter]:
        """Adds an adapter with B = 0, which changes nothing yet, and returns its parameters by name, in float32.

        The `requires_grad` of all other parameters stays as it is. ValueError if no module matches the targets.
        """
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.tuners_utils import BaseTunerLayer

        trains = {id(p): p.requires_grad for p in self.net.parameters()}
        config = LoraConfig(
            r=shape.rank,
            lora_alpha=cast(int, shape.alpha),
            target_modules=shape.targets if isinstance(shape.targets, str) else list(shape.targets),
            init_lora_weights="gaussian",
            rank_pattern={f"^{re.escape(name)}": rank for name, rank in shape.ranks.items()},
            alpha_pattern={f"^{re.escape(n)}": cast(int, r * shape.alpha / shape.rank) for n, r in shape.ranks.items()},
        )
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # a second adapter is meant
                inject_adapter_in_model(config, self.net, adapter_name=NAMES[role])
        except ValueError as error:
            message = f"lora_targets: no module of the network matches {shape.targets}; see net.named_modules()"
            raise ValueError(message) from error
        self.layers = [m for m in self.net.modules() if isinstance(m, BaseTunerLayer)]
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
        for layer in self.layers:
            layer._disable_adapters = role == "reference"
            layer._active_adapter = [NAMES.get(role, NAMES["policy"])]


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
    """Copies a network as it was before adapters were added, frozen and in evaluation mode."""
    copied = copy.deepcopy(net).requires_grad_(False).eval()
    for name, module in list(copied.named_modules()):
        if hasattr(module, "base_layer"):
            parent, _, child = name.rpartition(".")
            setattr(copied.get_submodule(parent), child, module.base_layer)
    return copied


@contextmanager
def replaced(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Context in which parameters have the values of the same names."""
    own = {name: p.data for name, p in parameters.items()}
    try:
        for name, value in values.items():
            parameters[name].data = value
        yield
    finally:
        for name, p in parameters.items():
            p.data = own[name]
