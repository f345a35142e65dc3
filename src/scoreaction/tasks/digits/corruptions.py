"""Corruptions of pictures of digits: some leave them legible, others do not.

All take and return images (batch, 1, 16, 16) with values in [0, 1], and draw from an explicit generator.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor
from torch.nn import functional as F


def uniform(n: int, low: float, high: float, generator: Generator) -> Tensor:
    """Draws n numbers from [low, high), (n, 1, 1, 1)."""
    return low + (high - low) * torch.rand(n, 1, 1, 1, generator=generator)


def dilate(images: Tensor, steps: int = 1) -> Tensor:
    """Thickens strokes by `2 * steps` pixels."""
    for _ in range(steps):
        images = F.max_pool2d(images, 3, stride=1, padding=1)
    return images


def erode(images: Tensor, steps: int = 1) -> Tensor:
    """Thins strokes by `2 * steps` pixels."""
    return 1 - dilate(1 - images, steps)


def warp(images: Tensor, *, shift: float, turn: float, zoom: float, generator: Generator) -> Tensor:
    """Moves each image by up to `shift` pixels, turns it by up to `turn` degrees, scales and shears it by up to `zoom`."""
    n = images.shape[0]
    angle = uniform(n, -turn, turn, generator).view(n) * math.pi / 180
    scale = 1 + uniform(n, -zoom, zoom, generator).view(n)
    shear = uniform(n, -zoom, zoom, generator).view(n)
    move = uniform(2 * n, -shift, shift, generator).view(n, 2) / 8
    cos, sin = angle.cos() * scale, angle.sin() * scale
    matrix = torch.stack([cos, shear - sin, move[:, 0], sin, cos, move[:, 1]], dim=1).view(n, 2, 3)
    return F.grid_sample(images, F.affine_grid(matrix, list(images.shape), align_corners=False), align_corners=False)


def thickness(images: Tensor, generator: Generator) -> Tensor:
    """Blends each image with its eroded or dilated self: strokes thinner or thicker by up to some one and a half pixels."""
    amount = uniform(images.shape[0], -0.8, 0.9, generator)
    thick = images + amount.clamp(min=0) * (dilate(images) - images)
    return thick + amount.clamp(max=0) * (images - erode(images))


def noise(images: Tensor, std: float, generator: Generator) -> Tensor:
    """Adds Gaussian noise, pixel by pixel or smoothed, of a standard deviation drawn from [0, std), and clips."""
    n = images.shape[0]
    fine = torch.randn(images.shape, generator=generator)
    coarse = F.interpolate(torch.randn(n, 1, 8, 8, generator=generator), scale_factor=2, mode="bilinear")
    drawn = torch.where(uniform(n, 0, 1, generator) < 0.5, fine, coarse)
    return (images + uniform(n, 0, std, generator) * drawn).clamp(0, 1)


def contrast(images: Tensor, generator: Generator) -> Tensor:
    """Scales brightness by a factor from [0.5, 1.5) and clips."""
    return (images * uniform(images.shape[0], 0.5, 1.5, generator)).clamp(0, 1)


def legible(images: Tensor, generator: Generator) -> Tensor:
    """Small shifts, turns, changes of thickness and contrast, and noise, which a person still reads; a fifth is unchanged."""
    n = images.shape[0]
    changed = warp(images, shift=1.5, turn=10, zoom=0.1, generator=generator)
    changed = contrast(thickness(changed, generator), generator)
    changed = torch.where(uniform(n, 0, 1, generator) < 0.6, noise(changed, 0.2, generator), changed)
    return torch.where(uniform(n, 0, 1, generator) < 0.2, images, changed)


def blobs(n: int, generator: Generator) -> Tensor:
    """Draws n pictures of one to four smooth spots, some of them with hard edges."""
    grid = torch.arange(16) + 0.5
    picture = torch.zeros(n, 1, 16, 16)
    for i in range(4):
        x, y = uniform(n, 2, 14, generator), uniform(n, 2, 14, generator)
        a, b = uniform(n, 1.2, 7, generator), uniform(n, 1.2, 7, generator)
        spot = torch.exp(-(((grid - x) / a) ** 2 + ((grid[:, None] - y) / b) ** 2) / 2)
        used = uniform(n, 0, 1, generator) < (1.0, 0.6, 0.4, 0.3)[i]
        picture = torch.maximum(picture, spot * used)
    sharp = uniform(n, 0, 1, generator) * 12
    return torch.where(sharp > 3, torch.sigmoid(sharp * (picture - 0.5)), picture) * uniform(n, 0.5, 1, generator)


def _saturated(images: Tensor, generator: Generator) -> Tensor:
    """Digits almost lost in white, in black, or in an even gray."""
    n = images.shape[0]
    share = uniform(n, 0, 0.15, generator)
    return share * images + (1 - share) * uniform(n, -0.2, 1.2, generator).clamp(0, 1)


def _mixed(images: Tensor, others: Tensor, generator: Generator) -> Tensor:
    """Pairs of digits written over one another, or the left half of one and the mirrored right half of another."""
    n = images.shape[0]
    over = torch.maximum(images, others)
    mean = (images + others) / 2
    halves = torch.cat([images[:, :, :8], others[:, :, 8:].flip(3)], dim=2)
    which = uniform(n, 0, 3, generator).floor()
    return torch.where(which == 0, over, torch.where(which == 1, mean, halves))


def _shuffled(images: Tensor, generator: Generator) -> Tensor:
    """Images with their sixteen 4x4 patches in another order."""
    n = images.shape[0]
    patches = images.unfold(2, 4, 4).unfold(3, 4, 4).reshape(n, 16, 4, 4)
    order = torch.rand(n, 16, generator=generator).argsort(1)
    patches = patches[torch.arange(n)[:, None], order].view(n, 4, 4, 4, 4)
    return patches.permute(0, 1, 3, 2, 4).reshape(n, 1, 16, 16)


def _static(n: int, generator: Generator) -> Tensor:
    """Noise without a digit, pixel by pixel or as smooth as digits are."""
    clouds = F.interpolate(torch.randn(n, 1, 8, 8, generator=generator), scale_factor=2, mode="bilinear")
    broad = F.interpolate(torch.randn(n, 1, 5, 5, generator=generator), size=16, mode="bicubic")
    fine = torch.randn(n, 1, 16, 16, generator=generator)
    which = uniform(n, 0, 3, generator).floor()
    drawn = torch.where(which == 0, clouds, torch.where(which == 1, broad, fine))
    return (drawn * uniform(n, 0.2, 2, generator) + uniform(n, 0, 0.8, generator)).clamp(0, 1)


def illegible(images: Tensor, labels: Tensor, generator: Generator) -> Tensor:
    """Illegible pictures, made of legible ones (batch, 1, 16, 16) and their labels (batch,).

    A quarter are blobs; the others, in equal parts, strokes swollen by two or three pixels on each side, strokes worn
    away, digits lost in an even gray, two different digits mixed, patches out of order, and noise. Half are moved and half
    made noisy as in `legible`, so that neither distinguishes them.
    """
    n = images.shape[0]
    moved = warp(images, shift=1.5, turn=10, zoom=0.1, generator=generator)
    images = torch.where(uniform(n, 0, 1, generator) < 0.5, moved, images)
    partner = torch.randperm(n, generator=generator)
    differs = (labels != labels[partner]).view(n, 1, 1, 1)
    thick = dilate((images * uniform(n, 1, 2, generator)).clamp(0, 1), 2)
    swollen = torch.where(uniform(n, 0, 1, generator) < 0.5, thick, dilate(thick))
    worn = erode(images, 2) + uniform(n, 0, 0.12, generator) * images
    mixed = torch.where(differs, _mixed(images, images[partner], generator), swollen)
    kinds = [
        blobs(n, generator),
        blobs(n, generator),
        swollen,
        worn,
        _saturated(images, generator),
        mixed,
        _shuffled(images, generator),
        _static(n, generator),
    ]
    which = torch.randint(0, len(kinds), (n,), generator=generator)
    drawn = torch.stack(kinds)[which, torch.arange(n)].clamp(0, 1)
    return torch.where(uniform(n, 0, 1, generator) < 0.5, noise(drawn, 0.2, generator), drawn)
