"""Training, storing and loading of the shipped networks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from scoreaction.diffusion.predictions import expand, from_prediction
from scoreaction.diffusion.processes import TableVP
from scoreaction.types import Prediction

N = TypeVar("N", bound=nn.Module)


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


def convolutions(channels: Sequence[int], strides: Sequence[int]) -> list[nn.Module]:
    """Makes 3x3 convolutions from each number of channels to the next, each before a smooth activation."""
    sizes = zip(channels[:-1], channels[1:], strides, strict=True)
    return [m for a, b, stride in sizes for m in (nn.Conv2d(a, b, 3, stride=stride, padding=1), nn.SiLU())]


def noisy(process: TableVP, x0: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Draws t, stratified over the table's times above 0, and noise: t (batch,), `x = alpha x0 + sigma eps`, v of (x0, eps)."""
    first, size = 1 / (len(process.alphas_cumprod) - 1), len(x0)
    t = first + (1 - first) * ((torch.arange(size) + torch.rand(size, generator=generator)) / size).double()
    prediction = Prediction(x0, torch.randn(x0.shape, generator=generator))
    alpha, sigma = expand(process.alpha(t), x0), expand(process.sigma(t), x0)
    return t, alpha * x0 + sigma * prediction.eps, from_prediction(process, "v", t, prediction)


def fit(net: N, loss: Callable[[], Tensor], *, batches: int, lr: float, name: str, console: Console, decay: float) -> N:
    """Trains a network and returns a copy with the exponential moving average of its weights, in evaluation mode.

    AdamW with a warm-up of 100 batches and a cosine decay; `loss()` draws a batch and returns its loss, `decay` is that of
    the average, `name` stands before the losses on the console.
    """
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.01)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=min(100, batches))
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, batches)
    average = copy.deepcopy(net).requires_grad_(False)
    mean = 0.0
    for i in range(batches):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        cosine.step()
        warmup.step()
        weight = 1 - min(decay, (1 + i) / (10 + i))
        with torch.no_grad():
            for slow, fast in zip(average.parameters(), net.parameters(), strict=True):
                slow.lerp_(fast, weight)
        mean += (value.item() - mean) / min(i + 1, 100)
        if (i + 1) % 100 == 0 or i + 1 == batches:
            console.print(f"{name}: batch {i + 1} of {batches}, loss {mean:.4f}", highlight=False)
    return average.eval()


def load_frozen(net: N, file: Path) -> N:
    """Loads stored weights into a network, which is then frozen, in float32; gradients still reach its input."""
    net.load_state_dict(load_file(file))
    return net.float().eval().requires_grad_(False)


def save_half(net: nn.Module, file: Path) -> None:
    """Saves the weights in half precision as safetensors."""
    save_file({name: value.half().contiguous() for name, value in net.state_dict().items()}, file)
    file.chmod(0o644)
