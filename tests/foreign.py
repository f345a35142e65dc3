"""Networks pretrained as others pretrain them, each by its own loss, and the page's lines that make models of them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import scoreaction as sa

PAGE = Path(__file__).parents[1] / "docs" / "bring_your_own.md"
Pair = tuple[Tensor, Tensor]


class Denoiser(nn.Module):
    """`net(x, time)`, with waves of a time that is largest at `longest`."""

    def __init__(self, longest: float) -> None:
        super().__init__()
        self.longest = longest
        layers = [
            nn.Linear(18, 128),
            nn.SiLU(),
            nn.Linear(128, 128),
            nn.SiLU(),
            nn.Linear(128, 128),
            nn.SiLU(),
            nn.Linear(128, 2),
        ]
        self.body = nn.Sequential(*layers)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        waves = time.to(x)[:, None] / self.longest * 2.0 ** torch.arange(-2, 6)
        return self.body(torch.cat([x, waves.cos(), waves.sin()], 1))


def two_moons(n: int) -> Tensor:
    angle, upper = torch.pi * torch.rand(n), torch.rand(n) < 0.5
    x = torch.where(upper, angle.cos(), 1 - angle.cos()) - 0.5
    y = torch.where(upper, angle.sin() - 0.25, 0.25 - angle.sin())
    return torch.stack([x, y], 1) + 0.05 * torch.randn(n, 2)


def ddpm(net: nn.Module, x0: Tensor, eps: Tensor) -> Pair:
    step = torch.randint(0, 1000, (len(x0),))
    signal = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)[step][:, None]
    return net(signal.sqrt() * x0 + (1 - signal).sqrt() * eps, step), eps


def edm(net: nn.Module, x0: Tensor, eps: Tensor) -> Pair:
    sigma = torch.exp(-1.2 + 1.2 * torch.randn(len(x0), 1))
    x, total = x0 + sigma * eps, sigma**2 + 0.25
    return net(x / total.sqrt(), sigma[:, 0].log() / 4), (x0 - 0.25 / total * x) * total.sqrt() / (0.5 * sigma)


def flow(net: nn.Module, x0: Tensor, eps: Tensor) -> Pair:
    t = torch.rand(len(x0), 1)
    return net(t * x0 + (1 - t) * eps, t[:, 0]), x0 - eps


def score(net: nn.Module, x0: Tensor, eps: Tensor) -> Pair:
    t = 1e-3 + 0.999 * torch.rand(len(x0), 1)
    alpha = torch.exp(-(0.1 * t + 9.95 * t * t) / 2)
    return net(alpha * x0 + (1 - alpha**2).sqrt() * eps, 999 * t[:, 0]), eps


def log_snr(net: nn.Module, x0: Tensor, eps: Tensor) -> Pair:
    t, first = torch.rand(len(x0), 1), math.cos(math.pi / 2 * 0.008 / 1.008)
    alpha = torch.cos(math.pi / 2 * (t + 0.008) / 1.008) / first
    sigma = (1 - alpha**2).clamp(min=1e-8).sqrt()
    level = 2 * torch.log(alpha.clamp(min=1e-8) / sigma)
    return net(alpha * x0 + sigma * eps, level[:, 0].clamp(-20, 20) / 10), alpha * eps - sigma * x0


LOSSES: dict[str, tuple[float, Callable[[nn.Module, Tensor, Tensor], Pair]]] = {
    "DDPM": (1000, ddpm),
    "EDM": (1, edm),
    "Flow": (1, flow),
    "Score": (1000, score),
    "Log SNR": (1, log_snr),
}
"""The longest time of each, and its (output, target): none of this package's code is in them."""


@cache
def pretrained(kind: str, updates: int = 1500) -> Denoiser:
    """A network of two moons, by its own loss."""
    torch.manual_seed(0)
    longest, loss = LOSSES[kind]
    net = Denoiser(longest)
    optimiser = torch.optim.Adam(net.parameters(), 2e-3)
    decay = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, updates)
    for _ in range(updates):
        output, target = loss(net, two_moons(256), torch.randn(256, 2))
        optimiser.zero_grad()
        (output - target).square().mean().backward()
        optimiser.step()
        decay.step()
    return net


def lines(kind: str) -> str:
    """The page's block under the title that begins so."""
    section = next(part for part in re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.M) if part.startswith(kind))
    block = re.search(r"```python\n(.*?)```", section, re.S)
    assert block is not None
    return block[1]


def brought(kind: str, *mistake: str) -> sa.Model:
    """The model that the page's lines make of a pretrained network, with a text in them replaced by another."""
    code = lines(kind)
    if mistake:
        right, wrong = mistake
        assert right in code, f"{right} is not in the page's lines"
        code = code.replace(right, wrong)
    names: dict[str, Any] = {"torch": torch, "nn": nn, "sa": sa, "Denoiser": lambda: deepcopy(pretrained(kind))}
    exec(code, names)
    return names["model"]
