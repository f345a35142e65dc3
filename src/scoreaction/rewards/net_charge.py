"""Net charge of a peptide: lysine and arginine, and a tenth of histidine, less aspartate and glutamate."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from scoreaction.rewards import Reward
from scoreaction.rewards._peptides import check_peptides
from scoreaction.settings import Settings
from scoreaction.tasks.peptides.letters import net_charge
from scoreaction.types import Prompts


class Config(Settings, frozen=True, extra="forbid"):
    """`r(x) = (#K + #R + 0.1 #H - #D - #E) / unit`, of the letters before the end, in elementary charges near pH 7.

    The two ends of a peptide cancel. Samples are tokens (n, length) as the model `peptides` has them. Not
    differentiable.

    >>> from scoreaction.tasks.peptides.letters import tokens_of_peptides
    >>> build(Config())(tokens_of_peptides(["GLFDIVKKVVGALGSL", "KRH"]), None)
    tensor([1.0000, 2.1000])
    """

    name: Literal["net_charge"] = "net_charge"
    unit: float = Field(1.0, gt=0, allow_inf_nan=False, description="charge that counts as 1")


def build(config: Config) -> Reward:
    """The reward."""

    def charge(samples: Tensor, prompts: Prompts) -> Tensor:
        check_peptides(samples, name="net_charge")
        return (net_charge(samples) / config.unit).float()

    return Reward(charge)
