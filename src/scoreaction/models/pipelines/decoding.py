"""Latents to pictures in [0, 1], as many at a time as memory holds, and with a gradient that needs the memory of one call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def to_unit(x0: Tensor) -> Tensor:
    """Pixels from [-1, 1] to [0, 1], clipped as when a picture is saved."""
    return ((x0 + 1) / 2).clamp(0, 1)


def from_unit(samples: Tensor) -> Tensor:
    """Pixels from [0, 1] to [-1, 1].

    >>> to_unit(from_unit(torch.tensor([0.25])))
    tensor([0.2500])
    """
    return 2 * samples - 1


def small_pictures(samples: Tensor) -> Tensor:
    """Features for diversity: pictures averaged down to at most 32 x 32, (batch, C * 32 * 32)."""
    height, width = samples.shape[-2:]
    return torch.nn.functional.adaptive_avg_pool2d(samples.float(), (min(32, height), min(32, width))).flatten(1)


PIXELS = 256 * 256
"""The most pixels of one call: Stable Diffusion's decoder keeps 22 KiB a pixel for its backward, so that these are 1.4 GiB."""


class Decoder:
    """`decode(latents) -> pictures` by a vae in float32 (it overflows in fp16, and bf16 shows bands).

    A call takes as many pictures as have `PIXELS` in all, and at least one. With a gradient all calls but the last are computed
    again in the backward, which begins with the last: the graph of one is in memory at a time. A picture of more than `PIXELS`
    (512 x 512: 5.6 GiB) has the decoder's own checkpoints where it can, one a block: 3.1 GiB for a third more work.

    tiny: a small autoencoder of the same latents, which decodes instead where there is a gradient. offload: the vae is moved to
    the samples' device for a call without gradient and back to the CPU after it.
    """

    def __init__(self, vae: Any, *, tiny: Any = None, offload: bool = False) -> None:
        self.vae = (vae if vae.dtype == torch.float32 else vae.float()).eval().requires_grad_(False)
        config = vae.config
        self.size = 2 ** (len(config.block_out_channels) - 1)
        """Pixels along a side of a latent one."""
        per_channel = config.get("latents_mean") is not None and config.get("latents_std") is not None
        mean = torch.tensor(config.latents_mean if per_channel else [config.get("shift_factor") or 0.0])
        std = torch.tensor(config.latents_std if per_channel else [1.0])
        self.offload, self.tiny = offload, None if tiny is None else Decoder(tiny)
        if self.tiny is not None and (self.tiny.size, tiny.config.latent_channels) != (self.size, config.latent_channels):
            raise ValueError(
                f"model.tiny_decoder: decodes {tiny.config.latent_channels} channels by {self.tiny.size}, and the pipeline has"
                f" {config.latent_channels} by {self.size}; take the one that was made for its latents"
            )
        self.mean, self.scale = mean.view(1, -1, 1, 1), std.view(1, -1, 1, 1) / config.scaling_factor

    def __call__(self, x0: Tensor) -> Tensor:
        learns = torch.is_grad_enabled() and x0.requires_grad
        if learns and self.tiny is not None:
            return self.tiny(x0)
        if self.vae.device != x0.device:
            self.vae.to(x0.device)
        pixels = x0.shape[-2] * x0.shape[-1] * self.size**2
        if pixels > PIXELS and self.vae._supports_gradient_checkpointing and not self.vae.is_gradient_checkpointing:
            self.vae.enable_gradient_checkpointing()
        latents = x0.float() * self.scale.to(x0.device) + self.mean.to(x0.device)
        *first, last = latents.split(max(1, PIXELS // pixels))
        if learns:
            return torch.cat([*(checkpoint(self._decode, part, use_reentrant=False) for part in first), self._decode(last)])
        pictures = torch.cat([self._decode(part) for part in (*first, last)])
        if self.offload:
            self.vae.cpu()
        return pictures

    @torch.no_grad()
    def invert(self, pictures: Tensor) -> Tensor:
        """Latents of pictures in [0, 1]: the means that the vae's encoder gives."""
        if self.vae.device != pictures.device:
            self.vae.to(pictures.device)
        parts = pictures.float().split(max(1, PIXELS // (pictures.shape[-2] * pictures.shape[-1])))
        latents = torch.cat([self.vae.encode(from_unit(part)).latent_dist.mean for part in parts])
        return (latents - self.mean.to(latents)) / self.scale.to(latents)

    def _decode(self, latents: Tensor) -> Tensor:
        return to_unit(self.vae.decode(latents, return_dict=False)[0])
