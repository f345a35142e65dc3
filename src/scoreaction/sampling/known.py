"""Inpainting: a part of the sample is known, and steering draws the rest of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor

from scoreaction.diffusion.mixtures import Quadratic
from scoreaction.diffusion.processes import Process
from scoreaction.diffusion.rescaling import Rescale
from scoreaction.networks.model import Model
from scoreaction.settings import Settings
from scoreaction.tasks.files import read_arrays


class Known(Settings, frozen=True, extra="forbid", allow_inf_nan=False):
    """A part of the sample that is known, in the units of samples.

    values: a number or null for each column of a table's row; of any other samples an .npz with the arrays `values` and `mask`
    of a sample's shape, mask true where the value is known. std: how far from it a sample may be, in standard deviations of a
    column (of pictures, whose pixels are in [0, 1], in halves).
    """

    values: list[float | None] | Path
    std: float = Field(0.05, gt=0)


@dataclass(frozen=True, eq=False)
class Likelihood:
    """The log likelihood of what is known, `-1/2 sum ((y - x)/spread)^2/(std^2 + var(t))` over the known coordinates.

    On the way x is the clean sample that the model predicts, and `var = sigma^2/(alpha^2 + sigma^2)` what is not known of it
    for data of deviation 1 (Song et al. 2023, pseudo-inverse guidance); at the end of the grid var is 0. y, spread and mask are
    of a sample's shape.
    """

    y: Tensor
    spread: Tensor
    mask: Tensor
    std: float

    @classmethod
    def of(cls, model: Model, known: Known) -> Likelihood:
        """The likelihood for samples of a model; ValueError, with the setting's name, where the values are none of its own."""
        with torch.no_grad():
            shape = tuple(model.decode(torch.zeros(1, *model.shape, device=model.device)).shape[1:])
        y, mask = _stored(known.values) if isinstance(known.values, Path) else _listed(known.values)
        if tuple(y.shape) != shape or mask.shape != y.shape:
            raise ValueError(f"steer.known.values: must have the shape of a sample, {shape} (got {tuple(y.shape)})")
        if not bool(mask.any()) or bool(mask.all()):
            raise ValueError("steer.known.values: must have some values that are known and some that are not")
        decode = model.decode
        spread = decode.scale if isinstance(decode, Rescale) else torch.full(shape, 0.5 if len(shape) == 3 else 1.0)
        return cls(y, spread.double(), mask, known.std)

    def __call__(self, samples: Tensor, process: Process, t: Tensor, *, end: bool) -> Tensor:
        """The log likelihood of samples (rows, *shape), or of those predicted at t (), (rows,)."""
        alpha2, sigma2 = process.alpha(t) ** 2, process.sigma2(t)
        variance = self.std**2 + (0.0 if end else float(sigma2 / (alpha2 + sigma2)))
        return -0.5 * self._distances(samples).square().sum(1) / variance

    def _distances(self, samples: Tensor) -> Tensor:
        """`(x - y)/spread` at the known coordinates, (rows, known)."""
        known = self.mask.to(samples.device)
        y, spread = self.y.to(samples)[known], self.spread.to(samples)[known]
        return (samples[:, known] - y) / spread

    def error(self, samples: Tensor) -> float:
        """The root mean square of `(x - y)/spread`: about `std` where the samples agree with what is known."""
        return math.sqrt(float(self._distances(samples).double().square().mean()))

    def quadratic(self) -> Quadratic:
        """The log likelihood as a reward of vectors."""
        return Quadratic(torch.diag(self.mask.double() / (self.std * self.spread) ** 2), torch.zeros(len(self.y)), self.y)


def check_known(model: Model, known: Known | None) -> None:
    """ValueError where what is known is no part of a sample of the model."""
    if known is not None:
        model.refuse_tokens("steer.known")
        Likelihood.of(model, known)


def _listed(values: list[float | None]) -> tuple[Tensor, Tensor]:
    numbers = [0.0 if value is None else value for value in values]
    return torch.tensor(numbers, dtype=torch.float64), torch.tensor([value is not None for value in values], dtype=torch.bool)


def _stored(path: Path) -> tuple[Tensor, Tensor]:
    try:
        arrays = read_arrays(path, "values", "mask")
        y, mask = torch.as_tensor(arrays["values"]).double(), torch.as_tensor(arrays["mask"]).bool()
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"steer.known.values: must be an .npz with the arrays values and mask ({error})") from error
    if not bool(torch.isfinite(y[mask] if y.shape == mask.shape else y).all()):
        raise ValueError(f"steer.known.values: {path} has known values that are no numbers")
    return torch.where(mask, y, 0.0) if y.shape == mask.shape else y, mask
