"""Training, storing and loading of the shipped networks."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from scoreaction.diffusion.predictions import expand, from_prediction
from scoreaction.diffusion.processes import Process, TableVP
from scoreaction.types import Conditions, Prediction

N = TypeVar("N", bound=nn.Module)
DenoiserFunction = Callable[[Tensor, Tensor, Any], Tensor]
"""`net(x, t, cond) -> v`, x (batch, *shape), t (batch,)."""


def new_scheduler(*, steps_offset: int = 0) -> Any:
    """Makes the diffusers scheduler: a thousand steps of linear beta, which end at clean data."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        clip_sample=False,
        set_alpha_to_one=True,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        steps_offset=steps_offset,
    )


def small_unet(size: tuple[int, int], channels: int, *, width: int, classes: int | None = None) -> Any:
    """Makes an untrained UNet of diffusers: widths 1, 2 and 4 times `width`, a multiple of 8, attention at the lowest only.

    size: height and width of pictures, multiples of 4; at width 16 it has 0.7 million parameters.
    """
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=size[0] if size[0] == size[1] else size,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=1,
        block_out_channels=(width, 2 * width, 4 * width),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=16,
        num_class_embeds=classes,
    )


def convolutions(channels: Sequence[int], strides: Sequence[int]) -> list[nn.Module]:
    """Makes 3x3 convolutions from each number of channels to the next, each before a smooth activation."""
    sizes = zip(channels[:-1], channels[1:], strides, strict=True)
    return [m for a, b, stride in sizes for m in (nn.Conv2d(a, b, 3, stride=stride, padding=1), nn.SiLU())]


def noisy(process: Process, x0: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Draws t, stratified over (0, 1] or a table's times above 0, and noise: t (batch,), `x = alpha x0 + sigma eps`, v."""
    first, size = 1 / (len(process.alphas_cumprod) - 1) if isinstance(process, TableVP) else 0.0, len(x0)
    t = first + (1 - first) * ((torch.arange(size) + torch.rand(size, generator=generator)) / size).double()
    prediction = Prediction(x0, torch.randn(x0.shape, generator=generator).to(x0))
    alpha, sigma = expand(process.alpha(t), x0), expand(process.sigma(t), x0)
    return t, alpha * x0 + sigma * prediction.eps, from_prediction(process, "v", t, prediction)


def denoised_share(net: DenoiserFunction, states: tuple[Tensor, Tensor, Tensor], rows: int = 512) -> float:
    """The mean square error of v over the mean square of v at these (t, x, v): 1 for a network that knows nothing.

    Of data with mean 0 and deviation 1 the best linear network, for a Gaussian without correlations, has 1 too.
    """
    t, x, v = states
    with torch.no_grad():
        error = torch.cat([net(x[part], t[part], None) - v[part] for part in torch.arange(len(t)).split(rows)])
    return float(error.double().square().mean() / v.double().square().mean())


class Fit(Generic[N]):
    """A network in training, a batch at a time: AdamW, and the exponential moving average of the weights, `average`.

    The rate of batch i of T is `lr min(1, 0.01 + 0.99 i/W) (1 + cos(pi i/T))/2`, with a warm-up of W = min(100, T) batches;
    decay: that of the average, smaller in the first batches.

    >>> net = nn.Linear(1, 1)
    >>> fitting = Fit(net, batches=10, lr=0.1, decay=0.9)
    >>> _ = fitting.step(net(torch.ones(1, 1)).square().mean())
    >>> fitting.batch
    1
    """

    def __init__(self, net: N, *, batches: int, lr: float, decay: float) -> None:
        self.net, self.batches, self.lr, self.decay, self.batch = net, batches, lr, decay, 0
        self.optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.01)
        self.average: N = copy.deepcopy(net).requires_grad_(False)

    def rate(self) -> float:
        """The learning rate of this batch."""
        i, warmup = self.batch, min(100, self.batches)
        return self.lr * (0.01 + 0.99 * min(i, warmup) / warmup) * (1 + math.cos(math.pi * i / self.batches)) / 2

    def step(self, loss: Tensor) -> float:
        """One step on the loss of a batch, which it returns."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()
        weight = 1 - min(self.decay, (1 + self.batch) / (10 + self.batch))
        with torch.no_grad():
            for slow, fast in zip(self.average.parameters(), self.net.parameters(), strict=True):
                slow.lerp_(fast, weight)
        self.batch += 1
        return loss.item()

    def state(self) -> dict[str, Any]:
        """All that the next batches depend on."""
        modules = {"net": self.net.state_dict(), "average": self.average.state_dict()}
        return {**modules, "optimizer": self.optimizer.state_dict(), "batch": self.batch}

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes back to a state."""
        self.net.load_state_dict(state["net"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.batch = state["batch"]


def fit(net: N, loss: Callable[[], Tensor], *, batches: int, lr: float, name: str, console: Console, decay: float) -> N:
    """Trains a network as `Fit` does and returns the one with averaged weights, in evaluation mode.

    `loss()` draws a batch and returns its loss; `name` stands before the losses on the console.
    """
    fitting, mean = Fit(net, batches=batches, lr=lr, decay=decay), 0.0
    for i in range(batches):
        mean += (fitting.step(loss()) - mean) / min(i + 1, 100)
        if (i + 1) % 100 == 0 or i + 1 == batches:
            console.print(f"{name}: batch {i + 1} of {batches}, loss {mean:.4f}", highlight=False)
    return fitting.average.eval()


def load_frozen(net: N, file: Path) -> N:
    """Loads stored weights into a network, which is then frozen, in float32; gradients still reach its input."""
    net.load_state_dict(load_file(file))
    return net.float().eval().requires_grad_(False)


def save_half(net: nn.Module, file: Path) -> None:
    """Saves the weights in half precision as safetensors."""
    save_file({name: value.half().contiguous() for name, value in net.state_dict().items()}, file)
    file.chmod(0o644)


def masked_loss(net: nn.Module, x0: Tensor, cond: Conditions, generator: torch.Generator, *, mask: int) -> Tensor:
    """The bound on the log-likelihood of random orders, a token: m of L positions masked, m uniform, the mean over those.

    `E_m mean over masked i of -log p_i(x_i | x_m)`; times the length it is the evidence bound (arXiv 2406.03736). x0
    (batch, L) tokens below `mask`.
    """
    length = x0.shape[1]
    m = torch.randint(1, length + 1, (len(x0), 1), generator=generator)
    masked = torch.rand(x0.shape, generator=generator).argsort(1).argsort(1) < m
    logits = net(torch.where(masked, mask, x0), m[:, 0] / length, cond)
    errors = nn.functional.cross_entropy(logits.transpose(1, 2), x0, reduction="none")
    return ((errors * masked).sum(1) / m[:, 0]).mean()
