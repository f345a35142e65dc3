"""A pipeline's frozen network in 4 or 8 bits by bitsandbytes, under a LoRA that is not."""

from __future__ import annotations

import importlib.util
import logging
import os
from typing import Any, Literal

import torch
from torch import nn

from scoreaction.errors import missing
from scoreaction.models.pipelines.families import Family
from scoreaction.types import DTYPES

Bits = Literal["4bit", "8bit"]
BLOCK = 64
"""Weights that share a scale in 4 bits."""


def check_quantise(family: Family, lora_rank: int | None) -> None:
    """ValueError, naming model.quantize, where a network cannot be quantised here."""
    if lora_rank is None:
        raise ValueError("quantize: whole numbers cannot be trained, only a LoRA beside them; set lora_rank")
    if family.encode is None:
        raise ValueError(
            "quantize: the LoRA of a pipeline without prompts is saved merged into it, whose weights must be whole"
        )


def load_quantised(config: Any, kind: str, component: str, variant: str | None) -> Any:
    """The network of a pipeline's folder or hub id, its linear layers quantised as they are read, on this machine's GPU.

    4bit is NF4 (Dettmers et al. 2023, arXiv 2305.14314), computed in `dtype`; 8bit is LLM.int8 (arXiv 2208.07339).
    ValueError, naming the setting, without a GPU or bitsandbytes.
    """
    import diffusers

    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(f"quantize: {missing('bitsandbytes')}")
    device, width = quantising_device(), DTYPES[config.dtype]
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": width}
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # a line a call: 8 bits are added up in fp16
    return getattr(diffusers, kind).from_pretrained(
        config.path,
        subfolder=component,
        quantization_config=diffusers.BitsAndBytesConfig(**(four if config.quantize == "4bit" else {"load_in_8bit": True})),
        torch_dtype=width,
        device_map={"": device},
        use_safetensors=True,
        variant=variant,
    )


def quantising_device() -> str:
    """The GPU of this process, on which diffusers has bitsandbytes quantise; ValueError where there is none."""
    if not torch.cuda.is_available():
        raise ValueError("quantize: diffusers has bitsandbytes quantise on a GPU, and there is none here; leave it out")
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"


def frozen_bytes(net: nn.Module, quantize: Bits | None) -> int:
    """Bytes of the frozen weights of a network, its linear layers in 4 or 8 bits and the scales that go with them.

    >>> net = nn.Sequential(nn.Linear(64, 8)).requires_grad_(False)
    >>> [frozen_bytes(net, bits) for bits in (None, "8bit", "4bit")]
    [2080, 576, 320]
    """
    linear = {id(m.weight) for m in net.modules() if isinstance(m, nn.Linear)} if quantize else set()
    return sum(
        (_quantised(p, quantize == "4bit") if id(p) in linear else p.numel() * p.element_size())
        for p in net.parameters()
        if not p.requires_grad
    )


def _quantised(weight: nn.Parameter, four: bool) -> int:
    scales = -(-weight.numel() // BLOCK) if four else len(weight)
    return weight.numel() // (2 if four else 1) + 4 * scales
