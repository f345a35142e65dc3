"""A small autoencoder in place of a pipeline's own, where a gradient goes through the pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scoreaction.models.pipelines.folders import quiet

KNOWN = {"madebyollin/taesd": 4, "madebyollin/taesdxl": 4, "madebyollin/taesd3": 16, "madebyollin/taef1": 16}
"""Hub ids and the channels of their latents, so that they can be planned offline."""
BY_PIPELINE = {
    "StableDiffusionPipeline": "madebyollin/taesd",
    "StableDiffusionXLPipeline": "madebyollin/taesdxl",
    "StableDiffusion3Pipeline": "madebyollin/taesd3",
    "FluxPipeline": "madebyollin/taef1",
}
"""The one that goes with the latents of each pipeline."""


def load_tiny(path: str) -> Any:
    """A diffusers AutoencoderTiny with its weights; ValueError, naming the setting, where there is none."""
    from diffusers import AutoencoderTiny
    from safetensors import SafetensorError

    try:
        with quiet():
            return AutoencoderTiny.from_pretrained(path, use_safetensors=True)
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, AttributeError, SafetensorError) as error:
        line = str(error).strip().partition("\n")[0][:160]
        raise ValueError(f"tiny_decoder: {path} cannot be loaded as an AutoencoderTiny of diffusers: {line}") from error


def empty_tiny(path: str) -> Any:
    """The same without its weights, from its configuration alone."""
    from diffusers import AutoencoderTiny

    if path in KNOWN and not Path(path).exists():
        return AutoencoderTiny(latent_channels=KNOWN[path])
    try:
        with quiet():
            return AutoencoderTiny.from_config(AutoencoderTiny.load_config(path))
    except (OSError, ValueError, TypeError, KeyError) as error:
        line = str(error).strip().partition("\n")[0][:160]
        raise ValueError(f"tiny_decoder: {path} has no configuration of an AutoencoderTiny: {line}") from error
