"""Latents to pictures in [0, 1], one at a time and with a gradient that needs the memory of one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def to_unit(x0: Tensor) -> Tensor:
    """Pixels from [-1, 1] to [0, 1], clipped as when a picture is saved."""
    return ((x0 + 1) / 2).clamp(0, 1)


def small_pictures(samples: Tensor) -> Tensor:
    """Features for diversity: pictures averaged down to at most 32 x 32, (batch, C * 32 * 32)."""
    height, width = samples.shape[-2:]
    return torch.nn.functional.adaptive_avg_pool2d(samples.float(), (min(32, height), min(32, width))).flatten(1)


class Decoder:
    """`decode(latents) -> pictures` by a vae in float32 (it overflows in fp16, and bf16 shows bands)."""

    def __init__(self, vae: Any) -> None:
        self.vae = (vae if vae.dtype == torch.float32 else vae.float()).eval().requires_grad_(False)
        if vae._supports_gradient_checkpointing:
            vae.enable_gradient_checkpointing()
        config = vae.config
        per_channel = config.get("latents_mean") is not None and config.get("latents_std") is not None
        mean = torch.tensor(config.latents_mean if per_channel else [config.get("shift_factor") or 0.0])
        std = torch.tensor(config.latents_std if per_channel else [1.0])
        self.mean, self.scale = mean.view(1, -1, 1, 1), std.view(1, -1, 1, 1) / config.scaling_factor

    def __call__(self, x0: Tensor) -> Tensor:
        if self.vae.device != x0.device:
            self.vae.to(x0.device)
        latents = (x0.float() * self.scale.to(x0.device) + self.mean.to(x0.device)).split(1)
        if torch.is_grad_enabled() and x0.requires_grad:
            return torch.cat([checkpoint(self._one, latent, use_reentrant=False) for latent in latents])
        return torch.cat([self._one(latent) for latent in latents])

    def _one(self, latent: Tensor) -> Tensor:
        return to_unit(self.vae.decode(latent, return_dict=False)[0])
