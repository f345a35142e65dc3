"""Training and storing of the shipped networks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor, nn


def fit(
    net: nn.Module, loss: Callable[[], Tensor], *, batches: int, lr: float, name: str, console: Console, decay: float
) -> nn.Module:
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


def save_half(net: nn.Module, file: Path) -> None:
    """Saves the weights in half precision as safetensors."""
    save_file({name: value.half().contiguous() for name, value in net.state_dict().items()}, file)
    file.chmod(0o644)
