"""Pretraining of the shipped `glyphs`: a diffusion model of printed digits whose captions are misspelt.

Run as `python -m scoreaction.tasks.glyphs.pretrain --output DIR [--seed K] [--batches N M]`. Data: pictures of random
texts drawn by `drawing.draw`. Every time that a picture is shown, some characters of its caption are others, so that the
model often draws another digit than its prompt's. On a CPU the same seed and number of threads give the same files.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from torch import Generator, Tensor
from torch.nn import functional as F

from scoreaction.tasks.fitting import fit, noisy, save_half
from scoreaction.tasks.glyphs.drawing import BLANK, draw, random_ids, texts_of_ids
from scoreaction.tasks.glyphs.network import GlyphsNet

MISSPELT = (0.25, 0.15)
"""Probability, in each stage, that a character of a caption is drawn anew, which leaves it what it was in one of ten."""
CAPTION_DROPOUT = 0.12
"""Share of pictures without their caption, for classifier-free guidance (Ho and Salimans 2022)."""


def misspelt(ids: Tensor, chance: float, generator: Generator) -> Tensor:
    """Ids (batch, 5) of which each character, but no blank, is drawn anew with this probability."""
    other = torch.randint(0, BLANK, ids.shape, generator=generator)
    return torch.where((ids != BLANK) & (torch.rand(ids.shape, generator=generator) < chance), other, ids)


def train(seed: int, batches: tuple[int, ...], pictures: int, console: Console) -> GlyphsNet:
    """Trains the network on `E ||v - net(alpha x0 + sigma eps, t, c)||^2`, c the misspelt caption, t stratified in (0, 1]."""
    generator = Generator().manual_seed(seed)
    torch.manual_seed(seed)
    net = GlyphsNet()
    ids = random_ids(pictures, generator)
    data = 2 * draw(texts_of_ids(ids), generator) - 1
    size = 64

    def loss(chance: float) -> Tensor:
        index = torch.randint(0, len(data), (size,), generator=generator)
        cond = misspelt(ids[index], chance, generator)
        cond = torch.where(torch.rand(size, 1, generator=generator) < CAPTION_DROPOUT, BLANK, cond)
        t, x, v = noisy(net.process, data[index], generator)
        return F.mse_loss(net(x, t, cond), v)

    for stage, (chance, n) in enumerate(zip(MISSPELT, batches, strict=True), 1):
        net.requires_grad_(True)
        net = fit(net, partial(loss, chance), batches=n, lr=2e-3, name=f"diffusion {stage}", console=console, decay=0.998)
    return net


def main(
    output: Annotated[Path, typer.Option(help="Folder to write; it is made if missing.")],
    seed: Annotated[int, typer.Option(help="Seed of everything drawn.")] = 0,
    batches: Annotated[tuple[int, int], typer.Option(help="Batches of 64, stage by stage.")] = (2400, 1500),
    pictures: Annotated[int, typer.Option(help="Pictures that are drawn for it.")] = 10_000,
) -> None:
    """Trains the network and saves it in half precision; it is loaded in float32."""
    console = Console()
    torch.set_num_threads(1)
    output.mkdir(parents=True, exist_ok=True)
    save_half(train(seed, batches, pictures, console), output / "glyphs.safetensors")
    console.print(f"saved {output}/glyphs.safetensors")


if __name__ == "__main__":
    typer.run(main)
