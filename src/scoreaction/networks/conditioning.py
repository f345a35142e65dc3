"""Conditions of prompts: how a model gets them, what guidance leads away from, and a policy that chooses prompts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from scoreaction.networks.adapters import Role
from scoreaction.networks.conditions import map_conditions
from scoreaction.networks.prompt_chooser import PromptChooser
from scoreaction.types import Conditions


class Conditioning:
    """A model that takes prompts, where it has an `encode`."""

    encode: Callable[[list[Any]], Conditions] | None
    null: Conditions
    true_cfg: float | None
    chooser: PromptChooser | None = None
    """The policy's network where it chooses the prompts that the pretrained model is told along a path."""
    average: dict[str, Tensor] | None
    parameters: dict[str, nn.Parameter]
    device: torch.device
    labelled: bool
    """True if the network is told labels, a control that is trained beside its prompts."""

    def guidance_weight(self, guidance: float) -> float:
        """The weight w of `y_null + w (y_cond - y_null)` in one network call; 1 and below is 1: no unconditional half."""
        return max(1.0, guidance if self.true_cfg is None else self.true_cfg)

    def null_role(self, role: Role) -> Role:
        """The role that is asked for `y_null` of guidance: of a model with labels the reference, whose `y_null` never moves.

        A control is to be learned beside what the model could do already (CTRL, 2406.12120).
        """
        return "reference" if self.labelled else role

    def _with_guidance(self, conditions: Conditions, x: Tensor, guidance: float) -> Conditions:
        return conditions if self.true_cfg is None else {**(conditions or {}), "guidance": x.new_full((len(x),), guidance)}

    def conditions(self, prompts: list[Any] | None) -> Conditions:
        """The network's conditions for these prompts, on the CPU (None without prompts): a call takes its rows from there.

        Where the policy chooses prompts, those of all entries of its menu come after them.
        """
        if prompts is None:
            return None
        return self._encoded(prompts if self.chooser is None else [*prompts, *self.chooser.menu.texts(prompts)])

    def _encoded(self, prompts: list[Any]) -> Conditions:
        if self.encode is None:
            raise ValueError("prompts: this model takes no prompts; leave them out, or pass encode= to Model")
        try:
            encoded = self.encode(prompts)
        except ValueError as error:
            raise ValueError(f"prompts: {str(error).removeprefix('prompts: ')}") from error
        return map_conditions(Tensor.cpu, encoded)

    def lead_away_from(self, negative_prompt: str, *, guidance: float) -> None:
        """Makes guidance lead away from this prompt's condition, not the unconditional one; ValueError without guidance."""
        if self.guidance_weight(guidance) == 1:
            key = "sampler.guidance" if self.true_cfg is None else "model.true_cfg"
            raise ValueError(
                f"sampler.negative_prompt: without guidance nothing leads away from it; set {key} above 1, or null"
            )
        try:
            encoded = self._encoded([negative_prompt])
        except ValueError as error:
            raise ValueError(f"sampler.negative_prompt: {str(error).removeprefix('prompts: ')}") from error
        if self.labelled and not torch.equal(encoded["label"], self.null["label"]):
            raise ValueError("sampler.negative_prompt: names a label, which the pretrained model is not told; leave it out")
        self.null = encoded

    def choose_prompts(self, chooser: PromptChooser) -> None:
        """Makes the policy one of the prompts that the pretrained model is told: the chooser's weights are what is trained.

        ValueError for a model whose own weights are trained already, which would be lost.
        """
        if self.average is not None:
            raise ValueError(
                "algorithm.name: prompt_loop tells the pretrained model, and this one's weights are trained, which would be"
                " lost; build it again"
            )
        self.chooser = chooser.to(self.device)
        self.parameters = dict(chooser.named_parameters())
