"""The network that draws printed digits, and its loader."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scoreaction.diffusion.predictions import Predicts
from scoreaction.diffusion.processes import VP
from scoreaction.networks.layers import time_features
from scoreaction.tasks.fitting import load_frozen
from scoreaction.tasks.glyphs.drawing import BLANK, HEIGHT, LONGEST, WIDTH

STRIP = 2
"""Pixels of a strip's width: the picture is to the network a row of strips of all its height."""
CHANNELS, TEXT = 128, 32
"""Numbers of a strip in the network, and of what the text says of it."""


class _Block(nn.Module):
    """Residual block of two convolutions along the row, scaled and shifted by the time between them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, CHANNELS), nn.GroupNorm(8, CHANNELS)
        self.conv1 = nn.Conv1d(CHANNELS, CHANNELS, 3, padding=1)
        self.conv2 = nn.Conv1d(CHANNELS, CHANNELS, 3, padding=1)
        self.time = nn.Linear(CHANNELS, 2 * CHANNELS)

    def forward(self, h: Tensor, time: Tensor) -> Tensor:
        scale, shift = self.time(time)[:, :, None].chunk(2, 1)
        y = self.norm2(self.conv1(F.silu(self.norm1(h)))) * (1 + scale) + shift
        return h + self.conv2(F.silu(y))


class GlyphsNet(nn.Module):
    """Residual convolutions along a row of strips, each of which is told what the text says of it, `net(x, t, cond) = v`.

    x (batch, 1, 12, 40), pixels in [-1, 1] at t = 0; t (batch,) or (); cond (batch, 5) ids of characters, all 10 for no text,
    like None. `v = alpha eps - sigma x0` under `net.process`.
    """

    predicts: Predicts = "v"
    process = VP()

    def __init__(self) -> None:
        super().__init__()
        pixels = HEIGHT * STRIP
        self.characters = nn.Embedding(LONGEST * (BLANK + 1), 16)
        self.text = nn.Sequential(nn.Linear(LONGEST * 16, CHANNELS), nn.SiLU(), nn.Linear(CHANNELS, TEXT * WIDTH // STRIP))
        self.time = nn.Sequential(nn.Linear(9, CHANNELS), nn.SiLU())
        self.first = nn.Conv1d(pixels + TEXT, CHANNELS, 3, padding=1)
        self.blocks = nn.ModuleList(_Block() for _ in range(4))
        self.norm = nn.GroupNorm(8, CHANNELS)
        self.last = nn.Conv1d(CHANNELS, pixels, 3, padding=1)
        nn.init.zeros_(self.last.weight)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        if cond is None:
            cond = torch.full((len(x), LONGEST), BLANK, device=x.device)
        places = (BLANK + 1) * torch.arange(LONGEST, device=x.device)
        text = self.text(self.characters(cond + places).flatten(1)).unflatten(1, (TEXT, -1))
        time = self.time(time_features(self.process, t.expand(len(x))).to(x))
        strips = x.reshape(len(x), HEIGHT, -1, STRIP).transpose(2, 3).flatten(1, 2)
        h = self.first(torch.cat([strips, text], 1))
        for block in self.blocks:
            h = block(h, time)
        out = self.last(F.silu(self.norm(h)))
        return out.unflatten(1, (HEIGHT, STRIP)).transpose(2, 3).reshape(x.shape)


def shipped() -> Path:
    """Folder of the shipped weights."""
    return Path(str(resources.files("scoreaction") / "data" / "glyphs"))


def load_net(folder: Path | None = None) -> GlyphsNet:
    """Loads the shipped network, or that of a folder of `tasks.glyphs.pretrain`, in float32; all of it can be trained."""
    return load_frozen(GlyphsNet(), (folder or shipped()) / "glyphs.safetensors").requires_grad_(True)
