"""Pretraining of the shipped digits: a class-conditional diffusion model and two classifiers.

Run as `python -m scoreaction.tasks.digits.pretrain --output DIR [--seed K] [--batches N]`. Data: the 1,797 handwritten
digits of scikit-learn (8x8, values 0 to 16), enlarged to 16x16. The diffusion model sees all of them; the reward's
classifier and the held-out judge see disjoint halves. On a CPU the same seed and number of threads give the same files.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from sklearn.datasets import load_digits
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from scoreaction.tasks.digits import corruptions
from scoreaction.tasks.digits.networks import NO_CLASS, DigitsNet, Judge, RewardClassifier
from scoreaction.tasks.fitting import fit, new_scheduler, noisy, save_half, small_unet

EMA_DECAY = 0.998
CLASS_DROPOUT = 0.12
"""Share of training images without their class, for classifier-free guidance (Ho and Salimans 2022)."""


def images_and_labels() -> tuple[Tensor, Tensor]:
    """Images (1797, 1, 16, 16) in [0, 1] and labels (1797,): all the data."""
    pixels, labels = load_digits(return_X_y=True)
    small = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    return F.interpolate(small, scale_factor=2, mode="bilinear"), torch.tensor(labels)


def halves() -> tuple[Tensor, Tensor]:
    """Indices of the reward classifier's half and of the judge's, the same for every seed."""
    order = torch.randperm(1797, generator=Generator().manual_seed(0))
    return order[:898], order[898:]


def train_unet(seed: int, batches: int, console: Console) -> Any:
    """Trains the UNet on `E ||v - net(alpha x0 + sigma eps, t, c)||^2`, v = alpha eps - sigma x0, t stratified in (0, 1].

    It predicts v and not eps, because close to t = 1 x0 is eps over alpha = 0.006: errors of eps would leave noise in the
    samples of the probability-flow ODE.
    """
    generator = Generator().manual_seed(seed)
    torch.manual_seed(seed)
    net = DigitsNet(small_unet((16, 16), 1, width=16, classes=NO_CLASS + 1), new_scheduler().alphas_cumprod)
    images, labels = images_and_labels()
    size = 64

    def loss() -> Tensor:
        index = torch.randint(0, len(images), (size,), generator=generator)
        x0, cond = 2 * images[index] - 1, labels[index]
        cond = torch.where(torch.rand(size, generator=generator) < CLASS_DROPOUT, NO_CLASS, cond)
        t, x, v = noisy(net.process, x0, generator)
        return F.mse_loss(net(x, t, cond), v)

    return fit(net, loss, batches=batches, lr=2e-3, name="diffusion", console=console, decay=EMA_DECAY).unet


def train_classifiers(seed: int, batches: int, console: Console) -> tuple[RewardClassifier, Judge]:
    """Trains the reward's classifier on one half, and the judge on the other, with three sevenths of its batch illegible."""
    generator = Generator().manual_seed(seed + 1)
    images, labels = images_and_labels()
    reward_half, judge_half = halves()

    def draw(half: Tensor, size: int) -> tuple[Tensor, Tensor]:
        index = half[torch.randint(0, len(half), (size,), generator=generator)]
        return images[index], labels[index]

    torch.manual_seed(seed + 1)
    reward = RewardClassifier()

    def reward_loss() -> Tensor:
        x, y = draw(reward_half, 96)
        return F.cross_entropy(reward(corruptions.legible(x, generator)), y, label_smoothing=0.02)

    torch.manual_seed(seed + 2)
    judge = Judge()
    nothing = torch.full((48,), NO_CLASS)

    def judge_loss() -> Tensor:
        x, y = draw(judge_half, 112)
        x = torch.cat([corruptions.legible(x[:64], generator), corruptions.illegible(x[64:], y[64:], generator)])
        y = torch.cat([y[:64], nothing])
        return F.cross_entropy(judge(x), y, label_smoothing=0.02)

    learn = partial(fit, batches=batches, lr=2e-3, console=console, decay=0.99)
    return learn(reward, reward_loss, name="reward classifier"), learn(judge, judge_loss, name="judge")


def accuracy(net: nn.Module, half: Tensor) -> float:
    """Accuracy of a classifier on a half of the data, in [0, 1]."""
    images, labels = images_and_labels()
    with torch.no_grad():
        return float((net(images[half]).argmax(1) == labels[half]).float().mean())


def main(
    output: Annotated[Path, typer.Option(help="Folder to write; it is made if missing.")],
    seed: Annotated[int, typer.Option(help="Seed of everything drawn.")] = 0,
    batches: Annotated[int, typer.Option(help="Batches of 64 for the diffusion model.")] = 2400,
    classifier_batches: Annotated[int, typer.Option(help="Batches of about 100 for each classifier.")] = 1500,
    only: Annotated[str, typer.Option(help="unet, classifiers or all.")] = "all",
) -> None:
    """Trains the networks and saves them in half precision; they are loaded in float32."""
    if only not in ("all", "unet", "classifiers"):
        raise typer.BadParameter(f"--only takes unet, classifiers or all, not {only!r}")
    console = Console()
    torch.set_num_threads(1)
    output.mkdir(parents=True, exist_ok=True)
    if only != "unet":
        reward, judge = train_classifiers(seed, classifier_batches, console)
        reward_half, judge_half = halves()
        console.print(f"reward classifier: {accuracy(reward, judge_half):.4f} right on the other half")
        console.print(f"judge: {accuracy(judge, reward_half):.4f} right on the other half")
        save_half(reward, output / "reward_classifier.safetensors")
        save_half(judge, output / "judge.safetensors")
    if only != "classifiers":
        unet = train_unet(seed, batches, console)
        unet.half().save_pretrained(output / "unet")
        new_scheduler().save_pretrained(output / "scheduler")
        (output / "unet" / "diffusion_pytorch_model.safetensors").chmod(0o644)
    console.print(f"saved in {output}")


if __name__ == "__main__":
    typer.run(main)
