"""The digits and the scenes that prompts of the small worlds name."""

from __future__ import annotations

import torch
from torch import Tensor

from scoreaction.networks.labels import plain
from scoreaction.rewards._images import check_images, texts_of
from scoreaction.tasks.digits.networks import parse_digit_prompt
from scoreaction.tasks.shapes.scenes import SIZE, Scene, parse_caption
from scoreaction.types import Prompts


def class_ids(samples: Tensor, prompts: Prompts, *, name: str) -> Tensor:
    """The digit of each picture's prompt, (batch,) on its device; ValueError for other pictures, or prompts that name none.

    >>> class_ids(torch.zeros(2, 1, 16, 16), ["a handwritten seven | bold", "2"], name="classifier").tolist()
    [7, 2]
    """
    check_images(samples, name=name, channels=(1,))
    texts = [plain(text) for text in texts_of(samples, prompts, name=name)]
    return torch.tensor([parse_digit_prompt(text) for text in texts], device=samples.device)


def scenes_of(samples: Tensor, prompts: Prompts, *, name: str) -> list[Scene]:
    """The scene of each picture's prompt; ValueError for other pictures than those of shapes, or other prompts.

    >>> scenes_of(torch.zeros(1, 3, 32, 32), ["a blue square"], name="shapes")[0].things
    (('blue', 'square'),)
    """
    check_images(samples, name=name, channels=(3,))
    if samples.shape[2:] != (SIZE, SIZE):
        raise ValueError(f"reward {name}: reads pictures of {SIZE}x{SIZE}, got {samples.shape[2]}x{samples.shape[3]}")
    return [parse_caption(plain(text)) for text in texts_of(samples, prompts, name=name)]
