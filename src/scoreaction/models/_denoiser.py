"""The small denoising networks for data of users: a perceptron for tables, a UNet for pictures, both predict v."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from scoreaction.diffusion.processes import Process
from scoreaction.networks.layers import VectorNet
from scoreaction.tasks.fitting import small_unet

TABLE_WIDTH, PICTURE_WIDTH = 256, 32
"""Width of the perceptron's layers, and channels of the UNet at full resolution, where none are named."""


class Denoiser(nn.Module):
    """`net(x, t, cond) = v = alpha eps - sigma x0` for x (batch, d) or (batch, channels, height, width); cond is not used.

    width: of the perceptron's layers, or channels of the UNet; None is the usual one. depth: layers of the perceptron.
    ValueError that begins with the setting at fault, for pictures that the UNet cannot halve twice.
    """

    def __init__(self, shape: tuple[int, ...], process: Process, *, width: int | None = None, depth: int = 3) -> None:
        super().__init__()
        self.pictures = len(shape) == 3
        if not self.pictures:
            (d,) = shape
            self.body: Any = VectorNet(process, d, d, hidden=width or TABLE_WIDTH, depth=depth)
            return
        channels, high, wide = shape
        if high % 4 or wide % 4:
            raise ValueError(f"data: pictures of {high} x {wide} pixels; sides must be multiples of 4, so crop or pad them")
        if (width or PICTURE_WIDTH) % 8:
            raise ValueError(f"width: must be a multiple of 8 for pictures (got {width})")
        self.body = small_unet((high, wide), channels, width=width or PICTURE_WIDTH)

    def forward(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        if not self.pictures:
            return self.body(x, t)
        return self.body(x, (1000 * t).to(x).expand(len(x))).sample
