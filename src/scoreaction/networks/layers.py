"""Small networks on (x, t, condition) and what they are made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from scoreaction.diffusion.predictions import expand
from scoreaction.diffusion.processes import Process
from scoreaction.networks.conditions import take
from scoreaction.types import Conditions


def time_features(process: Process, t: Tensor) -> Tensor:
    """Features of time for a network: t, alpha, sigma and bounded waves of the log SNR, (batch, 9) float32."""
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


CONVOLUTIONS = {2: nn.Conv1d, 3: nn.Conv2d, 4: nn.Conv3d}
"""Convolutions by the dimensions of a sample, its channels among them."""


class ConvolutionNet(nn.Module):
    """A small convolutional network with time and condition as channel-wise scale and shift: (batch, *shape) -> (batch, 1).

    shape: (channels, length), (channels, height, width) or (channels, frames, height, width).
    """

    def __init__(self, process: Process, shape: Sequence[int], *, width: int = 32, condition: int = 0) -> None:
        super().__init__()
        self.process = process
        sizes, convolution = [shape[0], width, width * 2, width * 2], CONVOLUTIONS[len(shape)]
        self.convolutions = nn.ModuleList(
            convolution(a, b, 3, stride=2 if i else 1, padding=1)
            for i, (a, b) in enumerate(zip(sizes[:-1], sizes[1:], strict=True))
        )
        self.modulations = nn.ModuleList(nn.Linear(9 + condition, 2 * b) for b in sizes[1:])
        self.last = nn.Linear(64, 1)
        self.head = nn.Sequential(nn.Linear(width * 2 + 9 + condition, 64), nn.SiLU(), self.last)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """x (batch, *shape), t (batch,), condition (batch, condition) -> (batch, 1)."""
        features = time_features(self.process, t).to(x)
        if condition is not None:
            features = torch.cat([features, condition], 1)
        h = unit_scaled(self.process, x, t)
        for convolution, modulation in zip(self.convolutions, self.modulations, strict=True):
            h = convolution(h)
            scale, shift = (part.reshape(*h.shape[:2], *[1] * (h.ndim - 2)) for part in modulation(features).chunk(2, 1))
            h = nn.functional.silu(h * (1 + scale) + shift)
        return self.head(torch.cat([h.flatten(2).mean(2), features], 1))


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


CriticNetwork = Callable[[int], nn.Module]
"""Builds a critic's network for conditions of that width, 0 without prompts: `net(x, t, condition) -> (batch,)`."""


def value_network(process: Process, shape: Sequence[int], condition: int, build: CriticNetwork | None) -> nn.Module:
    """The network of a critic: what `build` makes, or the small one for samples of this shape.

    ValueError unless it takes x (batch, *shape), t (batch,) and condition (batch, condition) or None, and gives a number a row.
    """
    if build is None:
        return default_network(process, shape, condition)
    net, rows = build(condition), 2
    example = torch.zeros(rows, *shape), torch.full((rows,), 0.5), torch.zeros(rows, condition) if condition else None
    shapes = f"x {tuple(example[0].shape)}, t {(rows,)}, condition {(rows, condition) if condition else None}"
    try:
        with torch.no_grad():
            value = net(*example)
    except (RuntimeError, TypeError, IndexError, ValueError) as error:
        raise ValueError(f"critic: its network fails on {shapes}: {error}") from error
    if not isinstance(value, Tensor) or value.shape not in ((rows,), (rows, 1)):
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"critic: its network must return ({rows},) or ({rows}, 1) for {shapes}, and gave {got}")
    return net


def default_network(process: Process, shape: Sequence[int], condition: int) -> nn.Module:
    """The small network for samples of this shape: a perceptron for vectors, else convolutions, channels first.

    Its output begins at 0, so that what is not learned yet pulls nowhere.
    """
    net: VectorNet | ConvolutionNet
    if len(shape) == 1:
        net = VectorNet(process, shape[0], 1, condition=condition)
    elif len(shape) in CONVOLUTIONS:
        net = ConvolutionNet(process, shape, condition=condition)
    else:
        known = "(d,), (channels, length), (channels, height, width), (channels, frames, height, width)"
        raise ValueError(
            f"shape: there is no critic for samples of shape {tuple(shape)}; give Model one of your own, critic=lambda width:"
            f" YourNetwork(), or reshape samples in the network to {known}"
        )
    nn.init.zeros_(net.last.weight)
    nn.init.zeros_(net.last.bias)
    return net


class PromptEmbedding(nn.Module):
    """The run's prompts as vectors of `width`: numbers of prompts (batch,) -> (batch, 16), or None without prompts.

    conditions: those of all prompts, (prompts, ...): ids or features, one tensor or a dict of them. Of several ids a prompt,
    (prompts, places), the vectors are added, and each place has its own. Features (prompts, ..., d) are averaged over tokens
    and standardised over the prompts, once: next to what all texts' states have in common, the differences between two of
    them are small.

    >>> PromptEmbedding(torch.tensor([3, 7]))(torch.tensor([0, 1, 1])).shape
    torch.Size([3, 16])
    """

    def __init__(self, conditions: Conditions) -> None:
        super().__init__()
        named = {} if conditions is None else conditions if isinstance(conditions, dict) else {"": conditions}
        self.width = 16 if named else 0
        self.parts = nn.ModuleList()
        for i, name in enumerate(sorted(named)):
            value = named[name].detach()
            value = value.float() if value.dtype == torch.bool else value  # a mask: where two prompts differ
            features = value.is_floating_point()
            value = standardised_features(value) if features else by_place(value)
            # it follows from the prompts and is no weight: checkpoints do not hold it
            self.register_buffer(f"prompts_{i}", value, persistent=False)
            inputs = value.shape[-1] if features else int(value.max()) + 1
            self.parts.append(nn.Linear(inputs, self.width) if features else nn.Embedding(inputs, self.width))

    def forward(self, prompt: Tensor) -> Tensor | None:
        if self.width == 0:
            return None
        rows = (take(self.get_buffer(f"prompts_{i}"), prompt) for i in range(len(self.parts)))
        pairs = zip(self.parts, rows, strict=True)
        return torch.stack([part(row) if row.is_floating_point() else part(row).sum(1) for part, row in pairs]).sum(0)


def by_place(ids: Tensor) -> Tensor:
    """Ids (prompts, places), each place with numbers of its own; (prompts,) is one place.

    >>> by_place(torch.tensor([[0, 2], [1, 0]])).tolist(), by_place(torch.tensor([3, 7])).tolist()
    ([[0, 5], [1, 3]], [[3], [7]])
    """
    ids = ids.reshape(len(ids), -1)
    return ids + (int(ids.max()) + 1) * torch.arange(ids.shape[1], device=ids.device)


def standardised_features(features: Tensor) -> Tensor:
    """Features (prompts, ..., d) averaged over tokens, less their mean and over their std: (prompts, d) float32.

    One number for each prompt, (prompts,), is a feature too: (prompts, 1).

    >>> standardised_features(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))
    tensor([[-1.,  0.],
            [ 1.,  0.]])
    """
    features = features[:, None] if features.ndim == 1 else features
    average = features.flatten(1, -2).mean(1, dtype=torch.float32) if features.ndim > 2 else features.float()
    spread = average.std(0, correction=0)
    spread = torch.where(spread > 1e-6 * average.abs().max(), spread, torch.ones_like(spread))
    return (average - average.mean(0)) / spread
