"""The consistency model that a model may have beside its policy."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from scoreaction.diffusion.predictions import expand
from scoreaction.networks.adapters import Adapters, LoraShape, without_adapters
from scoreaction.types import Conditions, Prediction


class Consistent:
    """A model with room for a consistency model: an adapter on the network of the reference, or a copy of it."""

    consistency_net: nn.Module | None
    consistency_parameters: dict[str, nn.Parameter]
    consistency_guidance: float | None
    """The guidance of the teacher that the consistency model was distilled from; None where it is not known."""
    reference_net: nn.Module
    adapters: Adapters
    _predict: Callable[..., Prediction]

    @property
    def has_consistency(self) -> bool:
        """True if the model has a consistency model."""
        return self.consistency_net is not None

    def consistency(self, x: Tensor, t: Tensor, conditions: Conditions = None, *, prompt: Tensor | None = None) -> Tensor:
        """The consistency model's clean sample (batch, *shape): where the reference's ODE from (x, t) ends.

        `f(x, t)` is x0 of the network's own prediction (Song et al. 2023, arXiv 2303.01469), one evaluation; `f(x, 0) = x`.
        The teacher's guidance is in it. Gradients reach x, never a parameter. ValueError where the model has none.
        """
        if self.consistency_net is None:
            raise ValueError(
                "model.consistency: this model has no consistency model; make one with scoreaction distill and name its folder"
            )
        t = torch.as_tensor(t, dtype=torch.float64, device=x.device).expand(x.shape[0])
        clean = t == 0  # there some predictions say nothing of x0
        guidance = self.consistency_guidance or 1.0
        x0 = self._predict("consistency", x, torch.where(clean, 1.0, t), conditions, prompt, guidance).x0
        return torch.where(expand(clean, x).bool(), x, x0)

    def add_consistency(self, lora: LoraShape | None = None) -> dict[str, nn.Parameter]:
        """Gives the model a consistency model that begins as its reference, frozen; its parameters by name.

        With `lora` a second adapter on the network that serves the reference; without, a copy of that network with weights
        of its own. `load_consistency` and `Distiller` fill it. ValueError where the model has one already.
        """
        if self.has_consistency:
            raise ValueError("model.consistency: this model already has a consistency model; build it again for another")
        if lora is not None:
            self.consistency_parameters = self.adapters.add("consistency", lora)
            self.consistency_net = self.reference_net
        else:
            self.consistency_net = without_adapters(self.reference_net)
            self.consistency_parameters = dict(self.consistency_net.named_parameters())
        for p in self.consistency_parameters.values():
            p.requires_grad_(False)
        return self.consistency_parameters
