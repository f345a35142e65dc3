"""A network of your own and a black box: two moons are learned, then only their left half is wanted.

python examples/own_network.py [iterations]        # half a minute on a laptop's CPU
"""

import sys

import torch
from torch import nn

import scoreaction as sa


class Net(nn.Module):
    """Takes x (batch, 2), t (batch,) in [0, 1] where 0 is data and 1 noise, and a condition, which is None here."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 2))

    def forward(self, x, t, cond):
        return self.body(torch.cat([x, t[:, None], t[:, None] ** 2], dim=1))


def two_moons(n):
    angle, upper = torch.pi * torch.rand(n), torch.rand(n) < 0.5
    x = torch.where(upper, angle.cos(), 1 - angle.cos()) - 0.5
    y = torch.where(upper, angle.sin() - 0.25, 0.25 - angle.sin())
    return torch.stack([x, y], dim=1) + 0.05 * torch.randn(n, 2)


def pretrain(net, updates):
    """Rectified flow: x_t = (1 - t) x0 + t eps, and the network learns the velocity eps - x0."""
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    for _ in range(updates):
        x0, eps, t = two_moons(512), torch.randn(512, 2), torch.rand(512)
        x = (1 - t[:, None]) * x0 + t[:, None] * eps
        loss = (net(x, t, None) - (eps - x0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def on_the_left(samples, prompts):
    """1 or 0: no gradient, so Score as Action fits a surrogate of it."""
    return (samples[:, 0] < 0).float()


iterations = int(sys.argv[1]) if len(sys.argv) > 1 else 60
torch.manual_seed(0)
net = Net()
pretrain(net, updates=50 * iterations)
tuner = sa.Finetuner(
    sa.Model(net, process=sa.Flow(), predicts="velocity", shape=(2,)),
    reward=on_the_left,
    algorithm=sa.ScoreAction(beta=0.2),
    sampler=sa.Sampler(steps=20),
    train=sa.Train(iterations=iterations, batch=256),
)
for metrics in tuner:
    if metrics["iteration"] % 10 == 0:
        print(f"{metrics['iteration']:4d}  reward {metrics['reward_mean']:.2f}  KL {metrics['kl_nats']:.2f} nats")

before = on_the_left(sa.sample(tuner.model, n=2000, reference=True), None).mean()
after = on_the_left(sa.sample(tuner.model, n=2000), None).mean()
print(f"on the left: {before:.0%} before, {after:.0%} after")
