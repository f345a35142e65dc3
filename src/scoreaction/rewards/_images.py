"""What every reward of images expects of them, and of their conditions when these are digits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from scoreaction.models._digits_nets import parse_digit_prompt
from scoreaction.types import Conditions

TOLERANCE = 1e-4
"""How far outside [0, 1] rounding may put a pixel."""


def check_images(samples: Tensor, *, name: str, channels: tuple[int, ...] = (1, 3)) -> None:
    """Raises ValueError unless samples are floating images (batch, C, H, W) with every value in [0, 1].

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

    >>> rgb(torch.zeros(2, 1, 4, 4)).shape
    torch.Size([2, 3, 4, 4])
    """
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


def class_ids(conditions: Conditions | Sequence[str | int], samples: Tensor, *, name: str) -> Tensor:
    """The digits that the samples were asked to be, (batch,) on their device; ValueError where that is not said.

    Conditions are class ids, a long tensor (batch,), or a list of prompts that each name a digit.

    >>> class_ids(["a handwritten seven", "2"], torch.zeros(2, 1, 16, 16), name="classifier").tolist()
    [7, 2]
    """
    if isinstance(conditions, list | tuple):
        conditions = torch.tensor([parse_digit_prompt(str(prompt)) for prompt in conditions], dtype=torch.long)
    if not isinstance(conditions, Tensor) or conditions.is_floating_point() or conditions.shape != samples.shape[:1]:
        got = f"a tensor {tuple(conditions.shape)}" if isinstance(conditions, Tensor) else type(conditions).__name__
        raise ValueError(f"reward {name}: needs a digit for each of the {len(samples)} samples, got {got}; give prompts")
    ids = conditions.to(samples.device, torch.long)
    if bool(((ids < 0) | (ids > 9)).any()):
        raise ValueError(f"reward {name}: class ids must be 0 to 9, got {int(ids.min())} to {int(ids.max())}; give prompts")
    return ids
