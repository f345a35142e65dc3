"""Digits as tokens: 64 pixels of 4 grey levels, the shipped network that fills them in, and its pretraining.

Run as `python -m scoreaction.tasks.digits.pixels --output DIR [--network causal] [--seed K] [--batches N]`. Data: the 1,797
handwritten digits of scikit-learn (8x8, values 0 to 16). On a CPU the same seed and number of threads give the same files.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal, get_args

import torch
import typer
from rich.console import Console
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from scoreaction.diffusion.processes import Masking
from scoreaction.diffusion.tails import causal_loss, soft_tail_masking
from scoreaction.networks.causal import CausalTransformer
from scoreaction.networks.token_layers import TokenNet
from scoreaction.tasks.digits.networks import NO_CLASS
from scoreaction.tasks.fitting import fit, load_frozen, masked_loss, save_half

LEVELS, SIDE, SIZE = 4, 8, 128
LENGTH = SIDE * SIDE
CLASS_DROPOUT = 0.12
"""Share of training images without their class, for classifier-free guidance (Ho and Salimans 2022)."""

NetworkName = Literal["masked", "causal"]


def tokens_and_labels() -> tuple[Tensor, Tensor]:
    """Tokens (1797, 64) and labels (1797,): all the data, each pixel rounded to one of 4 levels."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    return (torch.tensor(pixels) / 16 * (LEVELS - 1)).round().long(), torch.tensor(labels)


def to_images(tokens: Tensor) -> Tensor:
    """Images (batch, 1, 16, 16) in [0, 1] of tokens (batch, 64), enlarged as the digits of `models.digits` are.

    >>> float(to_images(torch.full((1, 64), 3)).min())
    1.0
    """
    small = tokens.view(-1, 1, SIDE, SIDE).float() / (LEVELS - 1)
    return F.interpolate(small, scale_factor=2, mode="bilinear")


class PixelsNet(nn.Module):
    """A perceptron that fills masks, `net(tokens, t, cond) -> logits`: cond (batch,) ids of classes, 10 for none, like None."""

    def __init__(self) -> None:
        super().__init__()
        self.body = TokenNet(Masking(LEVELS), LENGTH, LENGTH * LEVELS, hidden=384, depth=3, condition=NO_CLASS + 1)

    def forward(self, tokens: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        label = torch.full((len(tokens),), NO_CLASS, device=tokens.device) if cond is None else cond
        classes = F.one_hot(label, NO_CLASS + 1).to(self.body.last.weight)
        return self.body(tokens, classes).unflatten(1, (LENGTH, LEVELS))


NETWORKS: dict[NetworkName, Callable[[], nn.Module]] = {
    "masked": PixelsNet,
    "causal": lambda: CausalTransformer(LEVELS, LENGTH, width=64, layers=4, heads=4, classes=NO_CLASS),
}
"""The networks, by what they see: all positions, or those before each."""


def shipped() -> Path:
    """Folder of the shipped weights."""
    return Path(str(resources.files("scoreaction") / "data" / "digits" / "pixels"))


def load_network(name: NetworkName, folder: Path | None = None) -> nn.Module:
    """Loads the shipped network, or that of a folder, in float32; all of it can be trained."""
    return load_frozen(NETWORKS[name](), (folder or shipped()) / f"{name}.safetensors").requires_grad_(True)


def tail_loss(net: nn.Module, x0: Tensor, cond: Tensor, generator: Generator) -> Tensor:
    """The loss of a causal network under soft tails of masks, of `diffusion.tails`."""
    t = (torch.arange(len(x0)) + torch.rand(len(x0), generator=generator)) / len(x0)
    x = soft_tail_masking(x0, t, generator, mask=LEVELS)
    return causal_loss(net(x, t, cond), x0, x == LEVELS)


LOSSES: dict[NetworkName, Callable[..., Tensor]] = {"masked": partial(masked_loss, mask=LEVELS), "causal": tail_loss}


def train(name: NetworkName, seed: int, batches: int, console: Console) -> nn.Module:
    """Trains a network on batches of 128, 12 % of them without their class."""
    generator = Generator().manual_seed(seed)
    torch.manual_seed(seed)
    net = NETWORKS[name]()
    tokens, labels = tokens_and_labels()

    def loss() -> Tensor:
        index = torch.randint(0, len(tokens), (SIZE,), generator=generator)
        cond = torch.where(torch.rand(SIZE, generator=generator) < CLASS_DROPOUT, NO_CLASS, labels[index])
        return LOSSES[name](net, tokens[index], cond, generator)

    return fit(net, loss, batches=batches, lr=1e-3, name=name, console=console, decay=0.998)


def main(
    output: Annotated[Path, typer.Option(help="Folder to write; it is made if missing.")],
    network: Annotated[str, typer.Option(help="masked or causal.")] = "masked",
    seed: Annotated[int, typer.Option(help="Seed of everything drawn.")] = 0,
    batches: Annotated[int, typer.Option(help="Batches of 128.")] = 3000,
) -> None:
    """Trains a network and saves it in half precision; it is loaded in float32."""
    if network not in get_args(NetworkName):
        raise typer.BadParameter(f"--network takes masked or causal, not {network!r}")
    torch.set_num_threads(1)
    output.mkdir(parents=True, exist_ok=True)
    name: NetworkName = "causal" if network == "causal" else "masked"
    console = Console()
    save_half(train(name, seed, batches, console), output / f"{name}.safetensors")
    console.print(f"saved {output / name}.safetensors")


command = typer.Typer(add_completion=False)
command.command()(main)

if __name__ == "__main__":
    command()
