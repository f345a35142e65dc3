"""What the rewards of `shapes` expect of their pictures and prompts."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from scoreaction.rewards._images import check_images
from scoreaction.tasks.shapes.scenes import SIZE, Scene, parse_caption
from scoreaction.types import Conditions


def scenes_of(samples: Tensor, conditions: Conditions | Sequence[str], *, name: str) -> list[Scene]:
    """The scenes that the pictures were asked to show; ValueError where pictures or prompts are none of ours.

    >>> import torch
    >>> scenes_of(torch.zeros(1, 3, 32, 32), ["a blue square"], name="shapes")[0].things
    (('blue', 'square'),)
    """
    check_images(samples, name=name, channels=(3,))
    if samples.shape[2:] != (SIZE, SIZE):
        raise ValueError(f"reward {name}: reads pictures of {SIZE}x{SIZE}, got {samples.shape[2]}x{samples.shape[3]}")
    if not isinstance(conditions, list | tuple) or len(conditions) != len(samples):
        raise ValueError(f"reward {name}: needs a prompt for each of the {len(samples)} samples; give prompts: shapes")
    return [parse_caption(str(prompt)) for prompt in conditions]
