"""What every reward of images expects of them, and of their conditions when these are digits."""

from __future__ import annotations

from torch import Tensor

TOLERANCE = 1e-4
"""How far outside [0, 1] rounding may put a pixel."""


def check_images(samples: Tensor, *, name: str, channels: tuple[int, ...] = (1, 3)) -> None:
    """Raises ValueError unless samples are floating images (batch, C, H, W) with every value in [0, 1].

    >>> import torch
    >>> check_images(torch.full((2, 1, 4, 4), -1.0), name="ink")
    Traceback (most recent call last):
    ValueError: reward ink: images must have values in [0, 1], got -1 to -1; map samples in [-1, 1] by (x + 1)/2 and clamp
    """
    if samples.ndim != 4 or samples.shape[1] not in channels or not samples.is_floating_point():
        wanted = " or ".join(map(str, channels))
        got = f"{str(samples.dtype).removeprefix('torch.')} {tuple(samples.shape)}"
        raise ValueError(f"reward {name}: expected floating images (batch, {wanted}, height, width), got {got}")
    if samples.numel() == 0:
        return
    low, high = float(samples.detach().min()), float(samples.detach().max())
    if not (low >= -TOLERANCE and high <= 1 + TOLERANCE):  # also catches NaN
        raise ValueError(
            f"reward {name}: images must have values in [0, 1], got {low:.3g} to {high:.3g}; "
            "map samples in [-1, 1] by (x + 1)/2 and clamp"
        )


def rgb(images: Tensor) -> Tensor:
    """Images with three channels; a single one is repeated.

    >>> import torch
    >>> rgb(torch.zeros(2, 1, 4, 4)).shape
    torch.Size([2, 3, 4, 4])
    """
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
