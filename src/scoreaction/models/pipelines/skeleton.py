"""A pipeline without its weights: every layer, from config.json files alone, in no memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from scoreaction.models._records import Skeleton
from scoreaction.models.pipelines.assemble import Adaptation, assemble, family_of
from scoreaction.models.pipelines.decoding import Decoder
from scoreaction.models.pipelines.families import geometry, text_shapes
from scoreaction.models.pipelines.folders import check_named, quiet, read_index
from scoreaction.models.pipelines.quantise import Bits, check_quantise, frozen_bytes
from scoreaction.models.pipelines.tiny import BY_PIPELINE, empty_tiny
from scoreaction.networks.labels import LabelAdapter
from scoreaction.types import Conditions

SHIPPED = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "stabilityai/stable-diffusion-3-medium-diffusers": "sd3",
    "black-forest-labs/FLUX.1-dev": "flux",
}
"""Hub ids whose sizes are known here, so that the shipped recipes can be planned offline."""


def pipeline_skeleton(
    path: str,
    options: Adaptation,
    *,
    dtype: torch.dtype,
    height: int | None,
    width: int | None,
    quantize: Bits | None = None,
    tiny_decoder: str | None = None,
    offload_vae: bool = False,
) -> Skeleton:
    """The skeleton of a pipeline; ValueError, naming the setting, where a config.json is missing or parts do not fit."""
    import diffusers
    from torch._subclasses.fake_tensor import FakeTensorMode

    path = shipped(path)
    index = read_index(path)
    kind = index["_class_name"]
    family = family_of(kind)
    check_named(path, index)
    if quantize is not None:
        check_quantise(family, options.lora_rank)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    named = {name for name, entry in index.items() if isinstance(entry, list) and entry and entry[0] is not None}
    names = [name for name in (family.component, "vae", *family.encoders) if name in named]
    with quiet():
        scheduler = getattr(diffusers, index["scheduler"][1]).from_pretrained(path, subfolder="scheduler")
        with mode:
            parts = {}
            for name in names:
                wide = name == "vae" or (name == family.component and options.lora_rank is None)
                with _default_dtype(torch.float32 if wide else dtype):
                    parts[name] = _empty(path, name, *index[name]).eval().requires_grad_(False)
            tiny = None if tiny_decoder is None else empty_tiny(tiny_decoder).eval().requires_grad_(False)
    core, vae = parts[family.component], parts.get("vae")
    form = geometry(kind, core.config, None if vae is None else vae.config, height, width)
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    encode = None if family.encode is None else _no_texts  # it has prompts: without conditions it is not tried
    decoder = None if vae is None else Decoder(vae, tiny=tiny)
    model = assemble(kind, core, scheduler, form, options, encode=encode, decoder=decoder)
    if tiny is not None:
        counts["tiny_decoder"] = sum(p.numel() for p in tiny.parameters())
    with mode:
        texts = {name: torch.zeros(1, *shape, dtype=dtype) for name, shape in text_shapes(kind, core.config).items()} or None
        conditions = model.net.null(texts) if isinstance(model.net, LabelAdapter) else texts
    model.null = conditions
    encoders = [parts[name] for name in family.encoders if name in parts]
    encoder_bytes = sum(size_of(encoder) for encoder in encoders)
    frozen = None if quantize is None else frozen_bytes(model.net, quantize)
    stays, moves = size_of(tiny) + (0 if offload_vae else size_of(vae)), size_of(vae) if offload_vae else 0
    suits = BY_PIPELINE.get(kind)
    return Skeleton(model, conditions, counts, mode, stays, encoder_bytes, moves, frozen, suits)


def _no_texts(prompts: list[Any]) -> Conditions:
    raise AssertionError("a skeleton has no encoders")


def shipped(path: str) -> str:
    """The folder of configurations that comes with the package for a well-known hub id, or the path itself."""
    folder = resources.files("scoreaction") / "data" / "skeletons" / SHIPPED.get(path, "")
    return str(folder) if path in SHIPPED and not Path(path).exists() else path


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Context in which parameters have this dtype: fake ones cannot be converted."""
    kept = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(kept)


def size_of(module: Any) -> int:
    """Bytes of a module's parameters."""
    return 0 if module is None else sum(p.numel() * p.element_size() for p in module.parameters())


def _empty(path: str, name: str, library: str, kind: str) -> Any:
    """A component of its configuration alone."""
    import diffusers
    import transformers

    try:
        if library == "transformers":
            made: Any = getattr(transformers, kind)
            return made(made.config_class.from_pretrained(path, subfolder=name))
        made = getattr(diffusers, kind)
        return made.from_config(made.load_config(path, subfolder=name))
    except (OSError, ValueError, AttributeError, KeyError) as error:
        raise ValueError(f"model.path: {path} lacks the config.json of its component {name}, or it cannot be read") from error
