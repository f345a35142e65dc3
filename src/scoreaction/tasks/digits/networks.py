"""Networks of the shipped digits, the diffusion UNet and the two classifiers, with their loaders."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scoreaction.diffusion.predictions import Predicts
from scoreaction.diffusion.processes import TableVP
from scoreaction.tasks.fitting import convolutions, load_frozen

NO_CLASS = 10
"""Class id of "no prompt" (input of the UNet) and of "not a digit" (output of the judge)."""

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

PROMPTS: list[str] = [f"a handwritten {name}" for name in NAMES]
"""Ten prompts, in the order of their class ids."""

_PROMPT = re.compile(rf"(?:an? )?(?:handwritten )?(?:digit )?({'|'.join(NAMES)}|[0-9])")


def parse_digit_prompt(text: str) -> int:
    """Class id of a prompt: a digit or its English name, alone or as "a handwritten ..."; ValueError for anything else.

    >>> [parse_digit_prompt(text) for text in ("a handwritten seven", "a handwritten 7", "Seven", "7")]
    [7, 7, 7, 7]
    """
    match = _PROMPT.fullmatch(" ".join(text.lower().split()))
    if match is None:
        raise ValueError(f"prompt {text!r} names no digit: write for example {PROMPTS[7]!r} or '7'")
    word = match.group(1)
    return int(word) if word.isdigit() else NAMES.index(word)


class DigitsNet(nn.Module):
    """Class-conditional diffusers UNet on the clock t in [0, 1], `net(x, t, cond) = v = alpha eps - sigma x0`.

    x (batch, 1, 16, 16), pixels in [-1, 1] at t = 0; t (batch,) or (); cond (batch,) long class ids 0 to 9, or 10 for no
    prompt, like `cond=None`. `net.process` reaches data at t = 0; `net.predicts` is "v".
    """

    predicts: Predicts = "v"

    def __init__(self, unet: nn.Module, alphas_cumprod: Tensor) -> None:
        super().__init__()
        self.unet = unet
        self.process = TableVP.from_scheduler(alphas_cumprod, ends_at_data=True)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        if cond is None:
            cond = torch.full((x.shape[0],), NO_CLASS, device=x.device)
        timestep = self.process.timestep(t).to(x).expand(x.shape[0])
        return self.unet(x, timestep, class_labels=cond).sample


class RewardClassifier(nn.Module):
    """Classifier for a reward: logits (batch, 10) of the digit in an image (batch, 1, 16, 16) with values in [0, 1].

    Three convolutions, two of them strided, with a smooth activation: the gradient with respect to the image exists
    everywhere.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *convolutions((1, 24, 48, 64), (1, 2, 2)),
            nn.Flatten(),
            nn.Linear(64 * 16, 64),
            nn.SiLU(),
            nn.Linear(64, 10),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(2 * images - 1)


class _Residual(nn.Module):
    """Residual block of two 3x3 convolutions, which halves the resolution."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(4, channels), nn.GroupNorm(4, out)
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.skip = nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.gelu(self.norm1(x)))
        y = self.conv2(F.gelu(self.norm2(y)))
        return F.avg_pool2d(self.skip(x) + y, 2)


class Judge(nn.Module):
    """Held-out classifier, which no reward uses: logits (batch, 11) of ten digits and, as class 10, "not a digit".

    Images (batch, 1, 16, 16) with values in [0, 1]. A residual network, trained on other digits than
    `RewardClassifier` and, as class 10, on blobs, mixtures and images with far too much or too little ink.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.blocks = nn.Sequential(_Residual(16, 32), _Residual(32, 48))
        self.embed = nn.Linear(48 * 16, 64)
        self.head = nn.Linear(64, NO_CLASS + 1)

    def features(self, images: Tensor) -> Tensor:
        """Features (batch, 64) in which diversity is measured."""
        return F.gelu(self.embed(self.blocks(self.stem(2 * images - 1)).flatten(1)))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))

    def log_prob(self, images: Tensor) -> Tensor:
        """Log probabilities (batch, 11); column 10 is "not a digit"."""
        return self(images).log_softmax(1)


def shipped() -> Path:
    """Folder of the shipped weights."""
    return Path(str(resources.files("scoreaction") / "data" / "digits"))


def reward_classifier(folder: Path | None = None) -> RewardClassifier:
    """Loads the shipped `RewardClassifier`, or that of a folder, frozen; gradients still flow to the image."""
    return load_frozen(RewardClassifier(), (folder or shipped()) / "reward_classifier.safetensors")


def judge(folder: Path | None = None) -> Judge:
    """Loads the shipped `Judge`, or that of a folder, frozen."""
    return load_frozen(Judge(), (folder or shipped()) / "judge.safetensors")


def load_net(folder: Path | None = None) -> DigitsNet:
    """Loads the shipped UNet, or that of a folder of `scoreaction.tasks.digits.pretrain`, in float32, with its process."""
    from diffusers import DDIMScheduler, UNet2DModel

    path = str(folder or shipped())
    unet = UNet2DModel.from_pretrained(path, subfolder="unet", torch_dtype=torch.float32)
    return DigitsNet(unet, DDIMScheduler.from_pretrained(path, subfolder="scheduler").alphas_cumprod)
