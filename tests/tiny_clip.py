"""A CLIP of the real classes, small and random, saved as its weights are fetched: config, safetensors, tokenizer."""

from __future__ import annotations

import string
from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

SIZE = 32


def save_tiny_clip(folder: Path, *, safe: bool = True) -> CLIPModel:
    """Writes it, and gives the model; letters are its words."""
    letters = [*string.ascii_lowercase, *(letter + "</w>" for letter in string.ascii_lowercase)]
    vocab = {token: i for i, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    start, end = len(vocab) - 2, len(vocab) - 1
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 8}
    text = {**small, "vocab_size": len(vocab), "max_position_embeddings": 12}
    ends = {"bos_token_id": start, "eos_token_id": end, "pad_token_id": end}
    vision = {**small, "image_size": SIZE, "patch_size": 8}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(CLIPConfig(text_config={**text, **ends}, vision_config=vision, projection_dim=8)).eval()
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    CLIPTokenizer(vocab=vocab, merges=[]).save_pretrained(folder)
    if not safe:
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return model
