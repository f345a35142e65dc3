"""The critic: a value function with the structure of diffusion, `V = c_skip(t) r(x0_hat) + c_out(t) F(t, x, c)`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from scoreaction.conditions import take
from scoreaction.predictions import expand
from scoreaction.processes import Process
from scoreaction.types import Conditions

Skip = Literal["alpha", "cosine", "whole", "none"]


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


class Critic(nn.Module):
    """`V(t, x, c) = m + c_skip(t) (r(x0_hat) - m) + c_out(t) d F(t, x, c)`, with c_skip(0) = 1 and c_out(0) = 0.

    `alpha`: c_skip = alpha^2, c_out = sigma, of the process scaled to alpha^2 + sigma^2 = 1; `cosine`: cos, sin of pi t/2
    (the published choice); `whole`: c_skip = 1, c_out = sigma, a residual on the soft Q of SQDF; `none`: c_skip = 0, c_out = 1,
    for a reward without a gradient. m and d are the mean and spread
    of the first rewards seen, so that F is of order one. Score as Action (Zhao et al. 2025, arXiv 2502.01819), section 4.
    example: conditions of any batch, or None.

    x (batch, *shape), t (batch,), look_ahead = r(x0_hat) (batch,) or None to leave the skip out; returns (batch,).
    """

    def __init__(self, process: Process, shape: Sequence[int], *, skip: Skip, example: Conditions = None) -> None:
        super().__init__()
        self.process, self.skip = process, skip
        self.embed = ConditionEmbedding(example)
        self.net = default_network(process, shape, self.embed.width)
        self.scale = RewardScale()

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(c_skip, c_out) at t."""
        t = t.double()
        match self.skip:
            case "alpha" | "whole":
                alpha2, sigma2 = self.process.alpha(t) ** 2, self.process.sigma2(t)
                c_skip = alpha2 / (alpha2 + sigma2) if self.skip == "alpha" else torch.ones_like(t)
                return c_skip, torch.sqrt(sigma2 / (alpha2 + sigma2))
            case "cosine":
                return torch.cos(math.pi * t / 2), torch.sin(math.pi * t / 2)
            case "none":
                return torch.zeros_like(t), torch.ones_like(t)
        raise ValueError(f"algorithm.skip: unknown skip {self.skip!r}; choose from alpha, cosine, whole, none")

    def forward(self, x: Tensor, t: Tensor, conditions: Conditions, look_ahead: Tensor | None) -> Tensor:
        c_skip, c_out = self.coefficients(t)
        learned = self.net(x, t, self.embed(conditions)).squeeze(1)
        value = self.scale.mean + c_out.to(x) * self.scale.spread * learned
        if look_ahead is not None:
            value = value + c_skip.to(value) * (look_ahead - self.scale.mean)
        return value

    def slope(self, x: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """The gradient in x of what is learned, `c_out d grad F`, (batch, *shape); the skip's is for the look-ahead to say."""
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            return torch.autograd.grad(self(x, t, conditions, None).sum(), x)[0]


class Surrogate(nn.Module):
    """A ridge regression plus a network fitted to the rewards seen so far: it stands in for a black-box reward's gradient.

    The regression is there from the first batch, when a network alone would point anywhere; the network learns what is left.

    x0 (batch, *shape) before decoding, conditions as the policy's; returns (batch,). It remembers the last `memory`
    samples (fewer where they are large: 64 MiB), which travel with its state; groups (batch,) index the prompts.
    """

    samples: Tensor
    groups: Tensor
    rewards: Tensor
    seen: Tensor
    center: Tensor
    slope: Tensor
    level: Tensor

    def __init__(self, process: Process, shape: Sequence[int], *, prompts: Conditions = None, memory: int = 4096) -> None:
        super().__init__()
        self.prompts = prompts
        self.embed = ConditionEmbedding(prompts)
        self.net = default_network(process, shape, self.embed.width)
        self.scale = RewardScale()
        memory = max(256, min(memory, 2**24 // math.prod(shape)))
        self.register_buffer("samples", torch.zeros(memory, *shape))
        self.register_buffer("groups", torch.zeros(memory, dtype=torch.long))
        self.register_buffer("rewards", torch.zeros(memory))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.register_buffer("center", torch.zeros(*shape))
        self.register_buffer("slope", torch.zeros(math.prod(shape)))
        self.register_buffer("level", torch.zeros(()))

    def forward(self, x0: Tensor, conditions: Conditions) -> Tensor:
        t = torch.zeros(len(x0), dtype=torch.float64, device=x0.device)
        straight = (x0 - self.center).flatten(1) @ self.slope + self.level
        return self.scale.mean + self.scale.spread * (straight + self.net(x0, t, self.embed(conditions)).squeeze(1))

    def remember(self, x0: Tensor, groups: Tensor, rewards: Tensor) -> None:
        """Adds samples with their rewards, over the oldest where full."""
        self.scale.calibrate(rewards)
        slots = (self.seen + torch.arange(len(x0), device=self.seen.device)) % len(self.samples)
        self.seen += len(x0)
        slots, x0, groups, rewards = (part[-len(self.samples) :] for part in (slots, x0, groups, rewards))
        self.samples[slots], self.groups[slots], self.rewards[slots] = x0, groups.to(self.groups), rewards.to(self.rewards)

    @torch.no_grad()
    def fit_line(self, rows: int = 512) -> None:
        """Ridge regression on the last `rows` samples, in its dual form; its penalty, or no slope at all, by leave-one-out.

        The left-out residual of sample i is `a_i/(K + l)^-1_ii` with `a = (K + l)^-1 y` (Golub, Heath and Wahba 1979).
        """
        known = min(int(self.seen), len(self.samples))
        newest = (self.seen - 1 - torch.arange(min(known, rows), device=self.seen.device)) % len(self.samples)
        x, y = self.samples[newest].double(), ((self.rewards[newest] - self.scale.mean) / self.scale.spread).double()
        center, level = x.mean(0), y.mean()
        x, y = (x - center).flatten(1), y - level
        kernel = x @ x.T
        eye = torch.eye(len(x), dtype=x.dtype, device=x.device)
        best, slope = float(y.square().mean()), torch.zeros_like(x[0])
        for share in (1e-3, 1e-2, 1e-1, 1.0):
            inverse = torch.linalg.inv(kernel + share * kernel.trace() / len(x) * eye + 1e-9 * eye)
            dual = inverse @ y
            left_out = float((dual / inverse.diagonal()).square().mean())
            if left_out < best:
                best, slope = left_out, x.T @ dual
        self.center.copy_(center)
        self.slope.copy_(slope)
        self.level.copy_(level)

    def loss(self, rows: int, generator: torch.Generator) -> Tensor:
        """Mean squared error on random remembered samples, in units of the rewards' variance."""
        known = min(int(self.seen), len(self.samples))
        chosen = torch.randint(known, (rows,), generator=generator).to(self.samples.device)
        error = self(self.samples[chosen], take(self.prompts, self.groups[chosen])) - self.rewards[chosen]
        return (error / self.scale.spread).square().mean()


class _ZerothOrder(torch.autograd.Function):
    """A black-box function whose backward is a central difference along one random direction."""

    @staticmethod
    def forward(ctx: Any, x0: Tensor, score: Callable[[Tensor], Tensor], std: float, noise: Tensor) -> Tensor:
        slope = (score(x0 + std * noise) - score(x0 - std * noise)) / (2 * std)
        ctx.save_for_backward(slope.reshape(-1, *[1] * (x0.ndim - 1)) * noise)
        return score(x0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (direction,) = ctx.saved_tensors
        return grad.reshape(-1, *[1] * (direction.ndim - 1)) * direction, None, None, None


def zeroth_order(score: Callable[[Tensor], Tensor], x0: Tensor, std: float, generator: torch.Generator) -> Tensor:
    """`score(x0)` (batch,) with the gradient `(score(x0 + h u) - score(x0 - h u))/(2h) u`, u standard normal: three queries.

    Unbiased for the gradient of score smoothed by N(0, h^2). Nesterov and Spokoiny 2017, eq. 26.
    """
    noise = torch.randn(x0.shape, generator=generator).to(x0)
    return _ZerothOrder.apply(x0, score, std, noise)


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
