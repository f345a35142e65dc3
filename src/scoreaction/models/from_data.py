"""A table of your own as a model: the exact score of a kernel density at its rows, and the policy is that plus a net."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from scoreaction.diffusion.kernel_density import PIECE, KernelDensity, bandwidth
from scoreaction.diffusion.processes import PROCESSES, ProcessName
from scoreaction.diffusion.rescaling import Rescale
from scoreaction.models.gaussian_mixture import ExactPlusNet
from scoreaction.networks.consistency import load_consistency
from scoreaction.networks.model import Model
from scoreaction.settings import Settings
from scoreaction.tasks.data_files import read_table

DEFAULTS: dict[str, Any] = {
    "sampler": {"steps": 25, "eta": 1.0},
    "train": {"iterations": 250, "batch": 256, "lr": 2e-3},
    "evaluation": {"n": 2048, "steps": 100},
}
EXAMPLE = {"data": "moons"}
LARGEST = 2_000_000
"""Numbers in a table, at most: each evaluation looks at all of them."""


class Config(Settings, frozen=True, extra="forbid", allow_inf_nan=False):
    """data: a table as .csv or .npz, rows are samples, or one that ships: moons. array: which one of an .npz.

    bandwidth: std of the kernels, in standard deviations of the columns; `auto` is the likeliest by leaving one out. Columns
    are brought to mean 0 and deviation 1; rewards and samples have the table's own units. process vp, cosine, ve or flow.
    consistency: the folder of a consistency model that `scoreaction distill` made of this model.
    """

    name: Literal["from_data"] = "from_data"
    data: Path
    array: str | None = None
    bandwidth: Literal["auto"] | float = "auto"
    process: ProcessName = "vp"
    hidden: int = Field(128, ge=1, le=2**14)
    depth: int = Field(3, ge=1, le=100)
    consistency: Path | None = None


def build(config: Config) -> Model:
    """The model, with its law for measuring distances."""
    law, decode = density(config)
    process = PROCESSES[config.process]()
    net = ExactPlusNet(law, process, config.hidden, config.depth)
    model = Model(net, process=process, predicts="v", shape=(law.dimension,), law=law, decode=decode)
    model.max_rows = max(64, PIECE // len(law.means))  # a call with a graph keeps a number for each row and point
    return model if config.consistency is None else load_consistency(model, config.consistency)


def density(config: Config) -> tuple[KernelDensity, Rescale]:
    """The density of the table's rows in columns of mean 0 and deviation 1, and the way back to the table's units.

    Rows that come several times are one kernel of that weight.
    """
    table = read_table(config.data, config.array)
    if table.numel() > LARGEST:
        raise ValueError(
            f"data: {config.data} has {table.numel():,} numbers, and a kernel density looks at all of them in every evaluation;"
            f" take at most {LARGEST:,}, or train a network with scoreaction pretrain"
        )
    decode = Rescale.of(table)
    points, counts = torch.unique(decode.inverse(table), dim=0, return_counts=True)
    if len(points) == 1 or (config.bandwidth != "auto" and not config.bandwidth > 0):
        raise ValueError(f"bandwidth: must be auto or a positive number (got {config.bandwidth})")
    std = bandwidth(points, counts.double()) if config.bandwidth == "auto" else config.bandwidth
    return KernelDensity.at(points, std=std, weights=counts.double()), decode
