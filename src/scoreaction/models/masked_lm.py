"""A masked language model of transformers, ESM2 or BERT and their like, from a folder or the hub, with LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from scoreaction.diffusion.processes import Masking
from scoreaction.errors import missing
from scoreaction.models._records import Card
from scoreaction.networks.masked import MaskedModel
from scoreaction.settings import Settings

DEFAULTS: dict[str, Any] = {"train": {"lr": 1e-4}}
EXAMPLE: dict[str, Any] = {"path": "facebook/esm2_t6_8M_UR50D", "length": 32, "alphabet": list("ACDEFGHIKLMNPQRSTVWY")}
ATTENTION = ("query", "key", "value")
"""Layers that LoRA changes by default, of those that the network has."""


class Config(Settings, frozen=True, extra="forbid"):
    """path: a folder of `save_pretrained` with its tokenizer, or a hub id. length: tokens of a sequence, without begin and end.

    alphabet: the tokens that sequences are made of, as the tokenizer writes them, by default all that are not special. Number
    i of a sample, as rewards see it, is the i-th of them; `model.net.numbers[sample]` are the tokenizer's. lora_rank null
    trains all weights; lora_alpha: scale of the LoRA times its rank, by default the rank; lora_targets: the layers that it
    changes, by default query, key and value.
    """

    name: Literal["masked_lm"] = "masked_lm"
    path: str
    length: int = Field(ge=1)
    alphabet: list[str] | None = Field(None, min_length=2)
    lora_rank: int | None = Field(8, ge=1)
    lora_alpha: float | None = Field(None, gt=0)
    lora_targets: list[str] | None = Field(None, min_length=1)


def suited(config: Config) -> dict[str, Any]:
    """The samplers that suit this length."""
    sampler = {"solver": "one_by_one", "steps": config.length, "grid": "uniform"}
    return {"sampler": sampler, "evaluation": {"solver": "one_by_one", "steps": config.length}}


class MaskedLM(nn.Module):
    """A masked language model as `net(tokens, t, cond) -> logits` of an alphabet, between the tokenizer's begin and end.

    tokens (batch, length): numbers in the alphabet, its size for the mask; t is not read.
    """

    numbers: Tensor

    def __init__(
        self, lm: nn.Module, numbers: Sequence[int], *, mask: int, before: Sequence[int], after: Sequence[int]
    ) -> None:
        super().__init__()
        self.lm, self.before, self.after = lm, list(before), list(after)
        self.register_buffer("numbers", torch.tensor([*numbers, mask]), persistent=False)

    def forward(self, tokens: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        ends = [self.numbers.new_tensor(end).expand(len(tokens), -1) for end in (self.before, self.after)]
        ids = torch.cat([ends[0], self.numbers[tokens], ends[1]], 1)
        logits = self.lm(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        first = len(self.before)
        return logits[:, first : first + tokens.shape[1], self.numbers[:-1]]


def build(config: Config) -> MaskedModel:
    """Loads network and tokenizer (safetensors only) and builds their model."""
    lm, tokenizer = load_lm(config.path)
    special = set(tokenizer.all_special_ids)
    every = {text: number for text, number in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])}
    numbers = [number for number in every.values() if number not in special]
    if config.alphabet is not None:
        unknown = [token for token in config.alphabet if every.get(token) in {None, *special}]
        if unknown:
            raise ValueError(f"alphabet: {unknown[0]!r} is no token of {config.path} that a sequence can have; leave it out")
        numbers = [every[token] for token in config.alphabet]
    before = [number for number in (tokenizer.cls_token_id,) if number is not None]
    after = [
        n for n in (tokenizer.eos_token_id if tokenizer.sep_token_id is None else tokenizer.sep_token_id,) if n is not None
    ]
    places = int(getattr(lm.config, "max_position_embeddings", 0) or 0) - len(before) - len(after)
    if 0 < places < config.length:
        raise ValueError(f"length: {config.path} has positions for {places} tokens between begin and end (got {config.length})")
    net = MaskedLM(lm, numbers, mask=tokenizer.mask_token_id, before=before, after=after)
    targets = config.lora_targets or [name for name in ATTENTION if any(n.endswith(f".{name}") for n, _ in lm.named_modules())]
    if config.lora_rank and not targets:
        raise ValueError(f"lora_targets: {config.path} has no {', '.join(ATTENTION)}; name the layers that LoRA should change")
    model = MaskedModel(
        net,
        process=Masking(len(numbers)),
        length=config.length,
        lora_rank=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_targets=targets if config.lora_rank else None,
    )
    model.export = lambda folder: export(model, config.path, tokenizer, folder)
    return model


def load_lm(path: str) -> tuple[Any, Any]:
    """Network in float32 and tokenizer of a folder or hub id; ValueError, naming the key, for what is no such model."""
    try:
        from transformers import AutoModelForMaskedLM, AutoTokenizer
    except ImportError as error:
        raise ValueError(f"model.name: masked_lm {missing('transformers')}") from error
    try:
        lm = AutoModelForMaskedLM.from_pretrained(path, use_safetensors=True, torch_dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        line = str(error).strip().partition("\n")[0][:160]
        raise ValueError(f"path: {path} cannot be loaded as a masked language model: {line}") from error
    if tokenizer.mask_token_id is None:
        raise ValueError(f"path: the tokenizer of {path} has no mask token, and without one nothing can be filled in")
    return lm, tokenizer


def export(model: MaskedModel, base: str, tokenizer: Any, folder: Path) -> None:
    """Writes what transformers and peft load: the adapter with its configuration, or without LoRA the whole model."""
    from safetensors.torch import save_file

    net: Any = model.net
    if model.lora is None:
        net.lm.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return
    from peft import LoraConfig

    shape = model.lora
    LoraConfig(
        r=shape.rank,
        lora_alpha=shape.alpha,
        target_modules=list(shape.targets),
        base_model_name_or_path=base,  # type: ignore
    ).save_pretrained(folder)
    tensors = {
        f"base_model.model.{name.removeprefix('lm.').replace('.default.', '.')}": value.detach().cpu().contiguous().clone()
        for name, value in model.parameters.items()
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def card(config: Config, folder: Path, off_below: float) -> Card:
    """The way to load in transformers what a run saved in a folder: an adapter on its base, or a whole model."""
    code = ["from transformers import AutoModelForMaskedLM"]
    if (folder / "adapter_config.json").is_file():
        code += ["from peft import PeftModel", f'model = AutoModelForMaskedLM.from_pretrained("{config.path}")']
        code.append('model = PeftModel.from_pretrained(model, "this folder")')
        return Card(header={"library_name": "peft", "base_model": config.path}, tags=["lora"], code=code)
    code.append('model = AutoModelForMaskedLM.from_pretrained("this folder")')
    return Card(header={"library_name": "transformers", "base_model": config.path}, tags=[], code=code)
