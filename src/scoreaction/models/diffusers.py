"""Any Stable Diffusion 1, 2, XL or 3, FLUX.1, DDPM or DDIM pipeline of diffusers, from a folder or the hub; LoRA or full."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from scoreaction.models._records import Card, Skeleton
from scoreaction.models.pipelines.assemble import LABEL_FILE, LORA_FILE, ROWS, Adaptation, build_from_pipeline, family_of
from scoreaction.models.pipelines.folders import OPTIONAL, check_components, quiet, read_index, variant_of
from scoreaction.models.pipelines.quantise import check_quantise, load_quantised
from scoreaction.models.pipelines.skeleton import pipeline_skeleton
from scoreaction.models.pipelines.tiny import load_tiny
from scoreaction.networks.consistency import load_consistency
from scoreaction.networks.lora_files import read_tensors
from scoreaction.networks.model import Model
from scoreaction.settings import Settings
from scoreaction.types import DTYPES

DEFAULTS: dict[str, Any] = {
    "sampler": {"steps": 20, "eta": 1.0, "grid": "scheduler", "guidance": 5.0},
    "train": {"iterations": 200, "batch": 16, "lr": 1e-4, "max_rows": ROWS, "held_out_rows": 8, "checkpoint_every": 20},
    "evaluation": {"n": 64, "steps": 30},
    "algorithm": {"beta": 0.1, "rows": 16, "updates": 4, "critic_updates": 16},
}

EXAMPLE = {"path": "stable-diffusion-v1-5/stable-diffusion-v1-5"}


class Config(Settings, frozen=True, extra="forbid", allow_inf_nan=False):
    """path: a folder in diffusers format, or a hub id; lora_rank null trains all of the network's weights.

    lora_alpha: scale of the LoRA times its rank (the rank by default); lora_targets: the layers it changes (attention by
    default); dtype: of frozen weights and text encoders, what is trained is fp32; height, width: of pictures, in pixels;
    true_cfg: guidance by both halves for a network that takes `sampler.guidance` as an input (FLUX.1 dev); consistency: an
    LCM-LoRA (a safetensors file, or its folder), or the folder of a consistency model made with `scoreaction distill`.

    To save memory. quantize: the frozen network's linear layers in 4 or 8 bits, by bitsandbytes, on a GPU and under a LoRA;
    tiny_decoder: a small autoencoder of TAESD's kind (a folder or hub id) that decodes where a reward's gradient goes through
    the pictures; offload_vae: the pipeline's own autoencoder is on the device only while it works.

    labels: names of labels that prompts may end with, `"a cat | indoors"`, a control that is learned from labelled pictures.
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
    quantize: Literal["4bit", "8bit"] | None = None
    tiny_decoder: str | None = None
    offload_vae: bool = False
    labels: list[str] | None = None


def build(config: Config) -> Model:
    """Loads the pipeline (safetensors only) and builds its model."""
    options = config.model_dump(exclude={"name", "path", "dtype", "consistency", "quantize", "tiny_decoder"})
    pipeline = load_pipeline(config)
    tiny = None if config.tiny_decoder is None else load_tiny(config.tiny_decoder)
    model = build_from_pipeline(pipeline, tiny_decoder=tiny, **options)
    return model if config.consistency is None else load_consistency(model, config.consistency)


def skeleton(config: Config) -> Skeleton:
    """The model without its weights, from config.json files alone."""
    lora = config.lora_rank, config.lora_alpha, config.lora_targets
    options = Adaptation(*lora, config.gradient_checkpointing, config.true_cfg, labels=config.labels)
    return pipeline_skeleton(
        config.path, options, dtype=DTYPES[config.dtype], height=config.height, width=config.width, quantize=config.quantize,
        tiny_decoder=config.tiny_decoder, offload_vae=config.offload_vae,
    )  # fmt: skip


def card(config: Config, folder: Path, off_below: float) -> Card | None:
    """The way to load in diffusers what a run saved in a folder: a LoRA on its base, or a whole pipeline.

    With `off_below` a callback switches the LoRA off for the steps after it; the whole weights of a pipeline cannot be. The
    vector of a label is added by a hook, which no callback switches off: None with both. Guidance is off with labels: its
    unconditional half is the pretrained model's here, and would be the tuned one's there.
    """
    if config.labels is not None and off_below:
        return None
    lora = (folder / LORA_FILE).is_file()
    base = config.path if lora else "this folder"
    # without a dtype its parts keep the ones they are stored in, which need not go together
    loaded = f'DiffusionPipeline.from_pretrained("{base}", torch_dtype=torch.float32)'
    code = ["import torch", "from diffusers import DiffusionPipeline", f"pipeline = {loaded}"]
    if lora:
        code.append('pipeline.load_lora_weights("this folder")')
    if config.labels is not None:
        _, header = read_tensors(folder / LABEL_FILE)
        code += [
            "from safetensors.torch import load_file",
            f'vector = load_file("this folder/{LABEL_FILE}")[{json.dumps(config.labels[0])}]  # a label\'s',
            f"pipeline.{header['module']}.register_forward_hook(lambda module, inputs, output: output + vector.to(output))",
            "# guidance_scale=1: other guidance would lead away from the tuned model, in training it led away from the base",
        ]
    if lora and off_below:  # `timesteps` are thousandths of the clock; after the last step the LoRA is on again
        switch = f"pipe.disable_lora() if any(pipe.scheduler.timesteps[i + 1 : i + 2] < {1000 * off_below:g})"
        code.append(f"off_below = lambda pipe, i, t, kwargs: ({switch} else pipe.enable_lora()) or kwargs")
        code.append('picture = pipeline("a prompt", callback_on_step_end=off_below).images[0]')
    return Card(
        header={"library_name": "diffusers", "base_model": config.path},
        tags=["lora"] if lora else [],
        code=code,
    )


def load_pipeline(config: Config) -> Any:
    """The pipeline in memory; ValueError, naming model.path, for a wrong folder, a missing component or a damaged file."""
    import diffusers
    import torch
    from safetensors import SafetensorError

    index = read_index(config.path)
    kind = index["_class_name"]
    family = family_of(kind)
    check_components(config.path, index)
    variant = variant_of(config.path, index)
    widths = {"default": DTYPES[config.dtype], "vae": torch.float32}
    if config.lora_rank is None:
        widths[family.component] = torch.float32
    unused: dict[str, Any] = {name: None for name in OPTIONAL if name in index}
    if kind == "StableDiffusionPipeline":
        unused["requires_safety_checker"] = False
    if config.quantize is not None:
        check_quantise(family, config.lora_rank)
        widths.pop(family.component, None)
    try:
        with quiet():
            if config.quantize is not None:
                unused[family.component] = load_quantised(config, index[family.component][1], family.component, variant)
            return getattr(diffusers, kind).from_pretrained(
                config.path, torch_dtype=widths, use_safetensors=True, variant=variant, **unused
            )
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, AttributeError, SafetensorError) as error:
        line = str(error).strip().partition("\n")[0][:160]
        if line.startswith("quantize: "):
            raise
        lacks = "it lacks " if isinstance(error, KeyError) else ""
        raise ValueError(f"model.path: {config.path} cannot be loaded: {lacks}{line}") from error
