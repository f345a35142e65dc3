"""Small networks on (x, t, condition) and what they are made of."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from scoreaction.diffusion.predictions import expand
from scoreaction.diffusion.processes import Process
from scoreaction.types import Conditions


def time_features(process: Process, t: Tensor) -> Tensor:
    """What a network is told about time: t, alpha, sigma and bounded waves of the log SNR, (batch, 9) float32."""
    t = t.double()
    level = process.log_snr(t).clamp(-12, 12) / 12
    waves = [f(level * math.pi * k / 2) for k in (1, 2, 4) for f in (torch.sin, torch.cos)]
    return torch.stack([t, process.alpha(t), process.sigma(t), *waves], dim=1).float()


def unit_scaled(process: Process, x: Tensor, t: Tensor) -> Tensor:
    """`x/sqrt(alpha^2 + sigma^2)`: of order one under every process (Karras et al. 2022, c_in)."""
    t = t.double()
    return x / expand(torch.sqrt(process.alpha(t) ** 2 + process.sigma2(t)), x)


class VectorNet(nn.Module):
    """A perceptron on (x, time features, condition): x (batch, d) -> (batch, out)."""

    def __init__(self, process: Process, dim: int, out: int, *, hidden: int = 128, depth: int = 3, condition: int = 0) -> None:
        super().__init__()
        self.process = process
        widths = [dim + 9 + condition] + [hidden] * depth
        layers = [m for a, b in zip(widths[:-1], widths[1:], strict=True) for m in (nn.Linear(a, b), nn.SiLU())]
        self.last = nn.Linear(hidden, out)
        self.body = nn.Sequential(*layers, self.last)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """x (batch, d), t (batch,), condition (batch, condition) -> (batch, out)."""
        parts = [unit_scaled(self.process, x, t), time_features(self.process, t).to(x)] + (
            [] if condition is None else [condition]
        )
        return self.body(torch.cat(parts, 1))


class ImageNet(nn.Module):
    """A small convolutional network with time and condition as channel-wise scale and shift: (batch, C, H, W) -> (batch,)."""

    def __init__(self, process: Process, channels: int, *, width: int = 32, condition: int = 0) -> None:
        super().__init__()
        self.process = process
        sizes = [channels, width, width * 2, width * 2]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=2 if i else 1, padding=1)
            for i, (a, b) in enumerate(zip(sizes[:-1], sizes[1:], strict=True))
        )
        self.modulations = nn.ModuleList(nn.Linear(9 + condition, 2 * b) for b in sizes[1:])
        self.last = nn.Linear(64, 1)
        self.head = nn.Sequential(nn.Linear(width * 2 + 9 + condition, 64), nn.SiLU(), self.last)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """x (batch, C, H, W), t (batch,), condition (batch, condition) -> (batch, 1)."""
        told = time_features(self.process, t).to(x)
        if condition is not None:
            told = torch.cat([told, condition], 1)
        h = unit_scaled(self.process, x, t)
        for convolution, modulation in zip(self.convolutions, self.modulations, strict=True):
            scale, shift = modulation(told)[:, :, None, None].chunk(2, 1)
            h = nn.functional.silu(convolution(h) * (1 + scale) + shift)
        return self.head(torch.cat([h.mean((2, 3)), told], 1))


class RewardScale(nn.Module):
    """Mean and spread of the first rewards that differ, so that networks work on numbers of order one. Fixed once taken."""

    mean: Tensor
    spread: Tensor
    taken: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("spread", torch.ones(()))
        self.register_buffer("taken", torch.zeros((), dtype=torch.bool))

    def calibrate(self, rewards: Tensor) -> None:
        """Takes mean and spread from the first rewards that are not all equal; later calls change nothing."""
        if bool(self.taken):
            return
        self.mean.copy_(rewards.mean())
        if float(rewards.max() - rewards.min()) > 1e-6 * float(rewards.abs().max()):
            self.spread.copy_(rewards.std(correction=0))
            self.taken.fill_(True)


def default_network(process: Process, shape: Sequence[int], condition: int) -> nn.Module:
    """The small network for samples of this shape: a perceptron for vectors, convolutions for images.

    Its output begins at 0, so that what is not learned yet pulls nowhere.
    """
    net: VectorNet | ImageNet
    if len(shape) == 1:
        net = VectorNet(process, shape[0], 1, condition=condition)
    elif len(shape) == 3:
        net = ImageNet(process, shape[0], condition=condition)
    else:
        raise ValueError(f"no critic for samples of shape {tuple(shape)}; use vectors (d,) or images (channels, height, width)")
    nn.init.zeros_(net.last.weight)
    nn.init.zeros_(net.last.bias)
    return net


class ConditionEmbedding(nn.Module):
    """Conditions (class ids or features, one tensor or a dict of them) to one vector of `width`: (batch, 16), or None.

    example: the conditions of all prompts, (prompts, ...). Features (batch, ..., d) are averaged over tokens and standardised
    over those prompts: next to what all texts' states have in common, the differences between two of them are small.
    """

    def __init__(self, example: Conditions) -> None:
        super().__init__()
        named = {} if example is None else example if isinstance(example, dict) else {"": example}
        self.width = 16 if named else 0
        self.names = sorted(named)
        self.parts = nn.ModuleList(self._part(named[name]) for name in self.names)

    def _part(self, example: Tensor) -> nn.Module:
        if example.is_floating_point():
            return nn.Sequential(Standardised(example), nn.Linear(example.shape[-1], self.width))
        return nn.Embedding(int(example.max()) + 1, self.width)

    def forward(self, conditions: Conditions) -> Tensor | None:
        if not self.names:
            return None
        named = conditions if isinstance(conditions, dict) else {"": conditions}
        return torch.stack([part(named[name]) for name, part in zip(self.names, self.parts, strict=True)]).sum(0)


class Standardised(nn.Module):
    """Features (batch, ..., d) averaged over tokens, less their mean and over their std in `example`: (batch, d)."""

    mean: Tensor
    spread: Tensor

    def __init__(self, example: Tensor) -> None:
        super().__init__()
        features = self.averaged(example.detach())
        spread = features.std(0, correction=0)
        rounding = 1e-6 * features.abs().max()
        self.register_buffer("mean", features.mean(0))
        self.register_buffer("spread", torch.where(spread > rounding, spread, torch.ones_like(spread)))

    @staticmethod
    def averaged(features: Tensor) -> Tensor:
        """The mean over all dimensions but the first and the last, in float32."""
        return features.flatten(1, -2).mean(1, dtype=torch.float32) if features.ndim > 2 else features.float()

    def forward(self, features: Tensor) -> Tensor:
        return (self.averaged(features) - self.mean) / self.spread
