"""Any Stable Diffusion 1, 2, XL or 3, FLUX.1, DDPM or DDIM pipeline of diffusers, from a folder or the hub; LoRA or full."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field

from scoreaction.consistency import load_consistency
from scoreaction.model import Model
from scoreaction.models._families import FAMILIES
from scoreaction.models._pipelines import build_from_pipeline, family_of

DEFAULTS: dict[str, Any] = {
    "sampler": {"steps": 20, "eta": 1.0, "grid": "scheduler", "guidance": 5.0},
    "train": {"iterations": 200, "batch": 16, "lr": 1e-4, "max_rows": 2, "held_out_rows": 8, "checkpoint_every": 20},
    "evaluation": {"n": 64, "steps": 30},
    "algorithm": {"beta": 0.1, "rows": 16, "updates": 4, "critic_updates": 16},
}

OPTIONAL = ("safety_checker", "feature_extractor", "image_encoder")
"""Components that are never loaded: a run neither filters pictures nor is given any."""


class Config(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """path: a folder in diffusers format, or a hub id; lora_rank null trains all of the network's weights.

    lora_alpha: scale of the LoRA times its rank (the rank by default); lora_targets: the layers it changes (attention by
    default); dtype: of frozen weights and text encoders, what is trained is fp32; height, width: of pictures, in pixels;
    true_cfg: guidance by both halves for a network that takes `sampler.guidance` as an input (FLUX.1 dev); consistency: an
    LCM-LoRA (a safetensors file, or its folder), or the folder of a consistency model made with `scoreaction distill`.
    """

    name: Literal["diffusers"] = "diffusers"
    path: str
    lora_rank: int | None = Field(4, ge=1)
    lora_alpha: float | None = Field(None, gt=0)
    lora_targets: list[str] | None = Field(None, min_length=1)
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    gradient_checkpointing: bool = True
    compile: bool = False
    height: int | None = Field(None, ge=8)
    width: int | None = Field(None, ge=8)
    true_cfg: float = Field(1.0, ge=0)
    consistency: Path | None = None


def build(config: Config) -> Model:
    """Loads the pipeline (safetensors only) and builds its model."""
    model = build_from_pipeline(
        load_pipeline(config),
        lora_rank=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_targets=config.lora_targets,
        gradient_checkpointing=config.gradient_checkpointing,
        compile=config.compile,
        height=config.height,
        width=config.width,
        true_cfg=config.true_cfg,
    )
    return model if config.consistency is None else load_consistency(model, config.consistency)


def load_pipeline(config: Config) -> Any:
    """The pipeline in memory; ValueError, naming model.path, for a wrong folder, a missing component or a damaged file."""
    import diffusers
    import torch

    index = read_index(config.path)
    kind = index["_class_name"]
    family = family_of(kind)
    check_components(config.path, index)
    narrow = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[config.dtype]
    widths = {"default": narrow, "vae": torch.float32}
    if config.lora_rank is None:
        widths[family.component] = torch.float32
    unused: dict[str, Any] = {name: None for name in OPTIONAL if name in index}
    if kind == "StableDiffusionPipeline":
        unused["requires_safety_checker"] = False
    try:
        with quiet():
            return getattr(diffusers, kind).from_pretrained(config.path, torch_dtype=widths, use_safetensors=True, **unused)
    except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        raise ValueError(f"model.path: {config.path} cannot be loaded: {_first(error)}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Within it diffusers and transformers show no bars and no advice: what goes wrong is said in our one line."""
    from diffusers.utils import logging as ours
    from transformers.utils import logging as theirs

    kept = [(log, log.get_verbosity()) for log in (ours, theirs)]
    try:
        for log, _ in kept:
            log.set_verbosity_error()
            log.disable_progress_bar()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the name of the dtype's argument, by version
            yield
    finally:
        for log, level in kept:
            log.set_verbosity(level)
            log.enable_progress_bar()


def read_index(path: str) -> dict[str, Any]:
    """model_index.json of a folder or a hub id."""
    from diffusers import DiffusionPipeline

    if Path(path).is_dir() and not (Path(path) / "model_index.json").is_file():
        raise ValueError(f"model.path: {path} holds no pipeline (no model_index.json in it); name the folder that has one")
    if Path(path).is_file():
        raise ValueError(f"model.path: {path} is a file; name a folder in diffusers format (convert it with diffusers)")
    try:
        with quiet():
            index = DiffusionPipeline.load_config(path)
    except (OSError, ValueError) as error:
        where = (
            "no such folder" if path.count("/") != 1 or path.startswith((".", "/", "~")) else "neither a folder nor on the hub"
        )
        raise ValueError(
            f"model.path: {path}: {where}, or the hub cannot be reached; download it first, or give the folder it is in"
        ) from error
    if "_class_name" not in index:
        raise ValueError(f"model.path: {path}: its model_index.json names no pipeline class")
    return index


def check_named(path: str, index: dict[str, Any]) -> None:
    """ValueError for a component that the pipeline cannot do without and its index does not name."""
    for name in FAMILIES[index["_class_name"]].needs:
        if not isinstance(index.get(name), list) or index[name][0] is None:
            raise ValueError(f"model.path: {path} lacks the component {name}; its model_index.json must name one")


def check_components(path: str, index: dict[str, Any]) -> None:
    """ValueError for a component that is not named, and in a folder for files that are missing."""
    check_named(path, index)
    if not Path(path).is_dir():
        return
    for name, found in index.items():
        if name.startswith("_") or name in OPTIONAL or not isinstance(found, list) or found[0] is None:
            continue
        folder = Path(path) / name
        if not folder.is_dir():
            raise ValueError(f"model.path: {path} lacks the component {name}: there is no folder {folder}")
        weighs = name in ("unet", "transformer", "vae") or name.startswith("text_encoder")
        if weighs and not list(folder.glob("*.safetensors")):
            raise ValueError(f"model.path: {folder} holds no weights (*.safetensors; pickled files are not read)")


def _first(error: BaseException) -> str:
    """The first line of an error, shortened."""
    line = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {line[:160]}"
