"""Parts of the shipped `shapes` pipeline, untrained: tokenizer, text encoder, autoencoder and UNet."""

from __future__ import annotations

import string
from collections import Counter
from typing import Any

from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from scoreaction.tasks.fitting import new_scheduler
from scoreaction.tasks.shapes.scenes import COLOURS, COUNTS, RELATIONS, SHAPES, SIZE

WORDS = (*COUNTS, *COLOURS, *SHAPES, *(f"{shape}s" for shape in SHAPES), *dict.fromkeys(" ".join(RELATIONS).split()))
LENGTH = 16
"""Tokens of a prompt, with the begin and end tokens."""
_BEGIN, _END = "<|startoftext|>", "<|endoftext|>"


def _merges(words: tuple[str, ...]) -> list[tuple[str, str]]:
    """Byte-pair merges (Sennrich et al. 2016, arXiv 1508.07909) after which each of these words is one token."""
    split = [[*word[:-1], f"{word[-1]}</w>"] for word in words]
    merges = []
    while pairs := Counter(pair for parts in split for pair in zip(parts, parts[1:], strict=False)):
        merges.append(max(pairs, key=lambda pair: (pairs[pair], pair)))
        for parts in split:
            i = 0
            while i < len(parts) - 1:
                if (parts[i], parts[i + 1]) == merges[-1]:
                    parts[i : i + 2] = ["".join(merges[-1])]
                i += 1
    return merges


def new_tokenizer() -> Any:
    """Makes the tokenizer: one token for each word of the captions; other words are spelt by the letter.

    >>> new_tokenizer().tokenize("Two red circles")
    ['two</w>', 'red</w>', 'circles</w>']
    """
    merges = _merges(WORDS)
    letters = string.ascii_lowercase + string.digits
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges), _BEGIN, _END]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=LENGTH)


def new_text_encoder(tokenizer: Any) -> Any:
    """Makes the text encoder: two layers of width 64."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        projection_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def new_vae() -> Any:
    """Makes the autoencoder, from 3x32x32 to 4x8x8 and back."""
    return AutoencoderKL(
        sample_size=SIZE,
        latent_channels=4,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    )


def new_unet() -> Any:
    """Makes the UNet of latents at 8x8 and 4x4, with cross-attention to the text at both."""
    return UNet2DConditionModel(
        sample_size=SIZE // 4,
        in_channels=4,
        out_channels=4,
        block_out_channels=(48, 80),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=64,
        attention_head_dim=(3, 5),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
    )


def assemble(vae: nn.Module, text_encoder: nn.Module, unet: nn.Module) -> Any:
    """Assembles a `StableDiffusionPipeline`, with a new tokenizer and scheduler."""
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=new_tokenizer(),
        unet=unet,
        scheduler=new_scheduler(steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
