"""Checks of the samples that rewards of peptides get."""

from __future__ import annotations

from torch import Tensor

from scoreaction.tasks.peptides.letters import ALPHABET


def check_peptides(samples: Tensor, *, name: str) -> None:
    """ValueError unless the samples are tokens (n, length) that can be the letters of peptides."""
    if samples.ndim != 2 or samples.is_floating_point():
        kind = str(samples.dtype).removeprefix("torch.")
        raise ValueError(
            f"{name}: scores tokens, (n, length) integers, got {kind} {tuple(samples.shape)}; take the model peptides"
        )
    if samples.numel() and not 0 <= int(samples.min()) <= int(samples.max()) < len(ALPHABET):
        raise ValueError(
            f"{name}: scores tokens from 0 to {len(ALPHABET) - 1}, the letters of {ALPHABET}; take the model peptides"
        )
