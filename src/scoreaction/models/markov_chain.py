"""A Markov chain of tokens whose conditionals and tilted law are known exactly; the policy is exact logits plus a net."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from scoreaction.diffusion.processes import Masking
from scoreaction.diffusion.processes.masking import ScheduleName
from scoreaction.diffusion.sequences import Chain
from scoreaction.networks.masked import MaskedModel
from scoreaction.networks.token_layers import TokenNet
from scoreaction.settings import Settings

DEFAULTS: dict[str, Any] = {
    "train": {"iterations": 200, "batch": 64, "lr": 5e-3},
    "evaluation": {"n": 4096},
    "algorithm": {"rows": 320, "critic_lr": 5e-3, "trust": 0.25},
}


class Config(Settings, frozen=True, extra="forbid", allow_inf_nan=False):
    """A chain of `length` tokens 0 .. vocabulary - 1; initial (V,) and transition (V, V) are drawn from `seed` where left out.

    Drawn: softmax of normal numbers, in the transition of std 1.2. schedule: of the masking.
    """

    name: Literal["markov_chain"] = "markov_chain"
    vocabulary: int = Field(4, ge=2, le=512)
    length: int = Field(8, ge=2, le=1024)
    initial: list[float] | None = None
    transition: list[list[float]] | None = None
    seed: int = Field(11, ge=0, lt=2**32)
    schedule: ScheduleName = "linear"
    hidden: int = Field(192, ge=1, le=2**14)
    depth: int = Field(2, ge=1, le=100)

    @model_validator(mode="after")
    def _laws(self) -> Config:
        rows = {"initial": [self.initial], "transition": self.transition}
        for key, matrix in rows.items():
            for row in matrix or []:
                if row is not None and (len(row) != self.vocabulary or min(row) <= 0 or abs(sum(row) - 1) > 1e-6):
                    raise ValueError(f"{key}: must be {self.vocabulary} positive numbers of sum 1, one for each token")
        if self.transition is not None and len(self.transition) != self.vocabulary:
            raise ValueError(f"transition: must have {self.vocabulary} rows, one for each token")
        return self

    def law(self) -> Chain:
        """The data law."""
        generator = torch.Generator().manual_seed(self.seed)
        initial = torch.softmax(torch.randn(self.vocabulary, generator=generator, dtype=torch.float64), 0)
        drawn = torch.randn(self.vocabulary, self.vocabulary, generator=generator, dtype=torch.float64)
        transition = torch.softmax(1.2 * drawn, 1)
        if self.initial is not None:
            initial = torch.tensor(self.initial, dtype=torch.float64)
        if self.transition is not None:
            transition = torch.tensor(self.transition, dtype=torch.float64)
        return Chain.markov(initial, transition, self.length)


class ChainPlusNet(nn.Module):
    """Exact log conditionals of a chain plus a perceptron that begins at 0."""

    def __init__(self, law: Chain, process: Masking, hidden: int, depth: int) -> None:
        super().__init__()
        self.law = law
        self.change = TokenNet(process, law.length, law.length * law.vocabulary, hidden=hidden, depth=depth)

    def forward(self, x: Tensor, t: Tensor, cond: None) -> Tensor:
        change = self.change(x).unflatten(1, (self.law.length, self.law.vocabulary))
        return self.law.log_conditionals(x).to(change) + change


def suited(config: Config) -> dict[str, Any]:
    """The samplers that suit this length."""
    sampler = {"solver": "one_by_one", "steps": config.length, "grid": "uniform"}
    return {"sampler": sampler, "evaluation": {"solver": "one_by_one", "steps": config.length}}


def build(config: Config) -> MaskedModel:
    """The model, with its law for measuring distances."""
    law, process = config.law(), Masking(config.vocabulary, config.schedule)
    net = ChainPlusNet(law, process, config.hidden, config.depth)
    return MaskedModel(net, process=process, length=config.length, law=law)
