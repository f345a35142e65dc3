"""Models for tests of distillation: a small mixture, and a network whose every layer matters from the start."""

from __future__ import annotations

import torch
from torch import nn

import scoreaction as sa
from scoreaction.models import gaussian_mixture
from scoreaction.networks.model import Model


def small(process="vp", **settings):
    torch.manual_seed(0)
    return gaussian_mixture.build(gaussian_mixture.Config(process=process, hidden=16, depth=2, **settings))


def plain(**options):
    """A network whose every layer matters from the start."""

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(2, 8), nn.Linear(8, 2)

        def forward(self, x, t, cond):
            return self.last(torch.tanh(self.first(x)))

    return Model(Plain(), process=sa.VP(), predicts="v", shape=(2,), **options)
