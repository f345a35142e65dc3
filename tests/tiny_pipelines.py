"""Pipelines of the real diffusers classes at small sizes with random weights: a second on one core each, nothing fetched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

LETTERS = "abcdefghijklmnopqrstuvwxyz"
PROMPTS = ["a red cat", "a dog on hay", "an owl"]
TABLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False, "steps_offset": 1}
"""Stable Diffusion's own table."""


def clip_tokenizer(length: int = 16) -> Any:
    """A real CLIPTokenizer that knows single letters, and takes `length` tokens."""
    from transformers import CLIPTokenizer

    words = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=length)


def t5_tokenizer(length: int = 24) -> Any:
    """A real T5Tokenizer that knows single letters."""
    from transformers import T5Tokenizer

    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), *((letter, -3.0) for letter in LETTERS)]
    return T5Tokenizer(vocab=words, extra_ids=0, model_max_length=length)


def clip_encoder(*, projected: bool = False, act: str = "quick_gelu") -> Any:
    """A CLIP text encoder of width 16."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=54, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, hidden_act=act,
        max_position_embeddings=16, projection_dim=16, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def t5_encoder(width: int = 32) -> Any:
    """A T5 encoder."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=30, d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu")
    return T5EncoderModel(config).eval()


def autoencoder(channels: int = 4, **more: Any) -> Any:
    """An AutoencoderKL that halves pictures."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=16,
        **more,
    ).eval()


def unet(**more: Any) -> Any:
    """A UNet with cross-attention for latents (4, 8, 8)."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        **{
            "sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4,
            "attention_head_dim": 2, "cross_attention_dim": 16, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), **more,
        }
    ).eval()  # fmt: skip


def stable_diffusion(prediction: str = "epsilon", **scheduler: Any) -> Any:
    """StableDiffusionPipeline."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    table = {**TABLE, "set_alpha_to_one": False, "prediction_type": prediction, **scheduler}
    return StableDiffusionPipeline(
        vae=autoencoder(scaling_factor=0.18215),
        text_encoder=clip_encoder(),
        tokenizer=clip_tokenizer(),
        unet=unet(),
        scheduler=DDIMScheduler(**table),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl() -> Any:
    """StableDiffusionXLPipeline."""
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline

    return StableDiffusionXLPipeline(
        vae=autoencoder(scaling_factor=0.13025),
        text_encoder=clip_encoder(),
        text_encoder_2=clip_encoder(projected=True, act="gelu"),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=unet(
            cross_attention_dim=32,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=64,  # six time ids of 8 and a pooled text of 16
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
        ),
        scheduler=DDIMScheduler(**TABLE, set_alpha_to_one=False),
        add_watermarker=False,
    )


def stable_diffusion_3(**scheduler: Any) -> Any:
    """StableDiffusion3Pipeline."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32, out_channels=4, pos_embed_max_size=8,
        ).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **scheduler}),
        vae=autoencoder(scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip_encoder(projected=True),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_encoder(projected=True, act="gelu"),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_encoder(),
        tokenizer_3=t5_tokenizer(),
    )  # fmt: skip


def flux(*, distilled: bool = True) -> Any:
    """FluxPipeline, with guidance as an input of the network (dev) or without (schnell)."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=autoencoder(scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip_encoder(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5_encoder(),
        tokenizer_2=t5_tokenizer(),
        transformer=FluxTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=32, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8), guidance_embeds=distilled,
        ).eval(),
    )  # fmt: skip


def unconditional(scheduler: str = "DDPMScheduler") -> Any:
    """DDPMPipeline (or DDIMPipeline) of pixels, 8x8."""
    import diffusers

    net = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip
    made = getattr(diffusers, scheduler)(clip_sample=False)
    kind = diffusers.DDPMPipeline if scheduler == "DDPMScheduler" else diffusers.DDIMPipeline
    return kind(unet=net, scheduler=made)


PIPELINES: dict[str, Callable[[], Any]] = {
    "sd": stable_diffusion,
    "sd_v": lambda: stable_diffusion("v_prediction"),
    "sdxl": stable_diffusion_xl,
    "sd3": stable_diffusion_3,
    "flux": flux,
    "ddpm": unconditional,
}
"""One of each family that is supported."""


def build(name: str, seed: int = 0) -> Any:
    """A tiny pipeline by name, in which no layer that begins at zero hides what the network is told."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = PIPELINES[name]()
        net = pipeline.components.get("unet") or pipeline.components["transformer"]
        for parameter in net.parameters():
            if not bool(parameter.any()):
                torch.nn.init.normal_(parameter, std=0.1)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
