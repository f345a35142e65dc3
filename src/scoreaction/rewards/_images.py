"""Checks and conversions that rewards of images share: the range [0, 1], a prompt for each sample, picture files."""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import Tensor

from scoreaction.errors import UserError
from scoreaction.types import Prompts

TOLERANCE = 1e-4
"""Distance outside [0, 1] that rounding may put a pixel at."""


def is_images(samples: Tensor) -> bool:
    """True for what can only be images: floating, (batch, 1 or 3, height, width)."""
    return samples.ndim == 4 and samples.shape[1] in (1, 3) and samples.is_floating_point()


def check_range(samples: Tensor, *, where: str) -> None:
    """Raises UserError unless every value is in [0, 1]: the one range in which images reach rewards.

    >>> check_range(torch.full((2, 1, 4, 4), -1.0), where="ink")
    Traceback (most recent call last):
    scoreaction.errors.UserError: ink: images must have values in [0, 1], got -1 to -1; map [-1, 1] to it by (x + 1)/2 and clamp
    """
    if samples.numel() == 0:
        return
    low, high = float(samples.detach().min()), float(samples.detach().max())
    if not (low >= -TOLERANCE and high <= 1 + TOLERANCE):  # also catches NaN
        wrong = f"images must have values in [0, 1], got {low:.3g} to {high:.3g}"
        raise UserError(f"{where}: {wrong}; map [-1, 1] to it by (x + 1)/2 and clamp")


def check_images(samples: Tensor, *, name: str, channels: tuple[int, ...] = (1, 3)) -> None:
    """Raises ValueError unless samples are floating images (batch, C, H, W) in [0, 1]."""
    if samples.ndim != 4 or samples.shape[1] not in channels or not samples.is_floating_point():
        wanted = " or ".join(map(str, channels))
        got = f"{str(samples.dtype).removeprefix('torch.')} {tuple(samples.shape)}"
        raise ValueError(f"reward {name}: expected floating images (batch, {wanted}, height, width), got {got}")
    check_range(samples, where=f"reward {name}")


def texts_of(samples: Tensor, prompts: Prompts, *, name: str) -> list[str]:
    """The text of each sample's prompt; ValueError where there is not one for each.

    >>> texts_of(torch.zeros(2, 3), ["a cat", "a dog"], name="clip")
    ['a cat', 'a dog']
    """
    if not isinstance(prompts, list | tuple) or len(prompts) != len(samples):
        got = str(len(prompts)) if isinstance(prompts, list | tuple) else type(prompts).__name__
        raise ValueError(f"reward {name}: needs a prompt for each of the {len(samples)} samples, got {got}; give prompts")
    return [str(prompt) for prompt in prompts]


def rgb(images: Tensor) -> Tensor:
    """Images with three channels; a single one is repeated.

    >>> rgb(torch.zeros(2, 1, 4, 4)).shape
    torch.Size([2, 3, 4, 4])
    """
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


def picture_files(images: Tensor, kind: str, **options: Any) -> list[bytes]:
    """A picture file of each image (batch, 1 or 3, H, W) in [0, 1], rounded to 8 bits: kind `JPEG` or `PNG`."""
    from PIL import Image

    pixels = (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    files = []
    for picture in pixels:
        file = io.BytesIO()
        Image.fromarray(picture.squeeze(-1) if picture.shape[-1] == 1 else picture).save(file, kind, **options)
        files.append(file.getvalue())
    return files
