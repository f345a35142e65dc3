"""Hydrophobic moment of a peptide: how much of it is on one side of a helix."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, FiniteFloat
from torch import Tensor

from scoreaction.rewards import Reward
from scoreaction.rewards._peptides import check_peptides
from scoreaction.settings import Settings
from scoreaction.tasks.peptides.letters import hydrophobic_moment
from scoreaction.types import Prompts


class Config(Settings, frozen=True, extra="forbid"):
    """`r(x) = |sum_k h_k exp(i k delta)| / (L unit)`, h Eisenberg's consensus scale, L letters before the end.

    Eisenberg, Weiss and Terwilliger 1982 (Nature 299, 371-374); the scale is that of Eisenberg, Schwarz, Komaromy and Wall 1984
    (J. Mol. Biol. 179, 125-142). On the data of the model `peptides` its mean is 0.31 of antimicrobial ones and 0.22 of others.
    Samples are tokens (n, length) as that model has them; 0 of an empty one. Not differentiable.

    >>> from scoreaction.tasks.peptides.letters import tokens_of_peptides
    >>> build(Config())(tokens_of_peptides(["GLFDIVKKVVGALGSL"]), None)
    tensor([0.4783])
    """

    name: Literal["hydrophobic_moment"] = "hydrophobic_moment"
    degrees: FiniteFloat = Field(100.0, description="turn of a residue: 100 for an alpha helix, 160 to 180 for a beta strand")
    unit: float = Field(1.0, gt=0, allow_inf_nan=False, description="moment that counts as 1")


def build(config: Config) -> Reward:
    """The reward."""

    def moment(samples: Tensor, prompts: Prompts) -> Tensor:
        check_peptides(samples, name="hydrophobic_moment")
        return (hydrophobic_moment(samples, config.degrees) / config.unit).float()

    return Reward(moment)
