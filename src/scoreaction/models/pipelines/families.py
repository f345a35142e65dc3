"""Differences between the families of pipelines: network, process, encoding of text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from scoreaction.diffusion.processes import TableVP
from scoreaction.models.pipelines import networks as _networks
from scoreaction.models.pipelines.config_keys import check_network
from scoreaction.models.pipelines.networks import PipelineNet, side
from scoreaction.models.pipelines.schedules import Schedule, flow_schedule, table_schedule
from scoreaction.models.pipelines.text import Limit
from scoreaction.networks.conditions import map_conditions
from scoreaction.types import Conditions

T5_TOKENS = {"StableDiffusion3Pipeline": 256, "FluxPipeline": 512}
"""Tokens of a prompt that the pipelines' own calls read."""
CLIP_TOKENS = 77
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
JOINT = ("to_add_out", "add_q_proj", "add_k_proj", "add_v_proj")


@dataclass(frozen=True)
class Family:
    """A supported pipeline class.

    component: the name of its network; needs: components it cannot do without; encoders: those of its text; patch: pixels of
    latents that become one token; targets: modules that LoRA changes unless said otherwise; added: the kinds of embedding
    beside the text's states that its call has inputs for; time: the network's module that embeds the time.
    """

    component: str
    needs: tuple[str, ...]
    encoders: tuple[str, ...]
    encode: Callable[[Any, list[str], torch.device], Conditions] | None
    patch: int = 1
    targets: tuple[str, ...] = ATTENTION
    added: tuple[str | None, ...] = (None, "text")
    time: str = "time_embedding"


def _encode_sd(pipeline: Any, prompts: list[str], device: torch.device) -> Conditions:
    text, _ = pipeline.encode_prompt(prompts, device, 1, False)
    return {"text": text}


def _encode_sdxl(pipeline: Any, prompts: list[str], device: torch.device) -> Conditions:
    text, _, pooled, _ = pipeline.encode_prompt(prompts, device=device, do_classifier_free_guidance=False)
    return {"text": text, "pooled": pooled}


def _encode_sd3(pipeline: Any, prompts: list[str], device: torch.device) -> Conditions:
    text, _, pooled, _ = pipeline.encode_prompt(
        prompts,
        None,
        None,
        device=device,
        do_classifier_free_guidance=False,
        max_sequence_length=T5_TOKENS["StableDiffusion3Pipeline"],
    )
    return {"text": text, "pooled": pooled}


def _encode_flux(pipeline: Any, prompts: list[str], device: torch.device) -> Conditions:
    text, pooled, _ = pipeline.encode_prompt(prompts, None, device=device, max_sequence_length=T5_TOKENS["FluxPipeline"])
    return {"text": text, "pooled": pooled}


_PIXELS = Family("unet", ("unet", "scheduler"), (), None)
_TEXT = ("vae", "text_encoder", "tokenizer", "scheduler")
FAMILIES: dict[str, Family] = {
    "StableDiffusionPipeline": Family("unet", ("unet", *_TEXT), ("text_encoder",), _encode_sd),
    "StableDiffusionXLPipeline": Family(
        "unet",
        ("unet", "text_encoder_2", "tokenizer_2", *_TEXT),
        ("text_encoder", "text_encoder_2"),
        _encode_sdxl,
        added=("text_time",),
    ),
    "StableDiffusion3Pipeline": Family(
        "transformer",
        ("transformer", "text_encoder_2", "tokenizer_2", *_TEXT),
        ("text_encoder", "text_encoder_2", "text_encoder_3"),
        _encode_sd3,
        2,
        (*ATTENTION, *JOINT),
        time="time_text_embed",
    ),
    "FluxPipeline": Family(
        "transformer",
        ("transformer", "text_encoder_2", "tokenizer_2", *_TEXT),
        ("text_encoder", "text_encoder_2"),
        _encode_flux,
        2,
        (*ATTENTION, *JOINT),
        time="time_text_embed",
    ),
    "DDPMPipeline": _PIXELS,
    "DDIMPipeline": _PIXELS,
}
"""The supported pipelines by class name."""


@dataclass(frozen=True)
class Geometry:
    """The samples of a pipeline: channels, height and width of x, the size of a picture in pixels, pixels a latent."""

    channels: int
    height: int
    width: int
    scale: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of x."""
        return self.channels, self.height, self.width

    @property
    def pixels(self) -> tuple[int, int]:
        """Height and width of a picture."""
        return self.height * self.scale, self.width * self.scale


def geometry(kind: str, core: Any, vae: Any, height: int | None, width: int | None) -> Geometry:
    """The shape that is drawn: height and width in pixels, or the network's own; `core` and `vae` are configurations."""
    scale = 1 if vae is None else 2 ** (len(vae.block_out_channels) - 1)
    channels = core.in_channels // 4 if kind == "FluxPipeline" else core.in_channels
    out = core.get("out_channels") or core.in_channels
    if out != core.in_channels:
        raise ValueError(
            f"model.path: the network takes {core.in_channels} channels and gives {out}; inpainting networks and learned"
            " variances are not supported"
        )
    own = side(core.get("sample_size") or 128)
    if vae is None and core.get("sample_size") is None and (height is None or width is None):
        raise ValueError("model.height: the network does not say its size; give model.height and model.width in pixels")
    # a UNet of pixels must halve as often as it does: its way up joins what its way down had
    multiple = 2 ** (len(core.down_block_types) - 1) if vae is None else scale * FAMILIES[kind].patch
    for key, value, default in (("height", height, own[0]), ("width", width, own[1])):
        pixels = default * scale if value is None else value
        if pixels % multiple:
            whose = "got" if value is not None else "the network's own is"
            raise ValueError(f"model.{key}: must be a multiple of {multiple} ({whose} {pixels})")
    rows, columns = (value // scale if value else default for value, default in zip((height, width), own, strict=True))
    return Geometry(channels, rows, columns, scale)


def network(kind: str, core: nn.Module, scheduler: Any, form: Geometry) -> tuple[PipelineNet, Schedule]:
    """The network on our clock, and its schedule."""
    check_network(FAMILIES[kind].component, core, added=FAMILIES[kind].added)
    if kind in T5_TOKENS:
        tokens = (form.height // 2) * (form.width // 2)
        flow = flow_schedule(scheduler, tokens, equal_steps=kind == "FluxPipeline")
        return (_networks.Flux(core) if kind == "FluxPipeline" else _networks.StableDiffusion3(core)), flow
    table = table_schedule(scheduler)
    process = cast(TableVP, table.process)
    match kind:
        case "StableDiffusionPipeline":
            return _networks.StableDiffusion(core, process), table
        case "StableDiffusionXLPipeline":
            return _networks.StableDiffusionXL(core, process, form.pixels), table
    return _networks.UNet(core, process), table


def text_shapes(kind: str, core: Any) -> dict[str, tuple[int, ...]]:
    """The shape of one row of each condition, from the network's configuration."""
    match kind:
        case "StableDiffusionPipeline":
            return {"text": (CLIP_TOKENS, core.cross_attention_dim)}
        case "StableDiffusionXLPipeline":
            pooled = core.projection_class_embeddings_input_dim - 6 * core.addition_time_embed_dim
            return {"text": (CLIP_TOKENS, core.cross_attention_dim), "pooled": (pooled,)}
        case "StableDiffusion3Pipeline":
            tokens = CLIP_TOKENS + T5_TOKENS[kind]
            return {"text": (tokens, core.joint_attention_dim), "pooled": (core.pooled_projection_dim,)}
        case "FluxPipeline":
            return {"text": (T5_TOKENS[kind], core.joint_attention_dim), "pooled": (core.pooled_projection_dim,)}
    return {}


def limits(kind: str, pipeline: Any) -> Sequence[Limit]:
    """The tokenizers that must see a prompt whole: T5 where there is one, which reads on where CLIP stops, else CLIP's."""
    t5 = {"StableDiffusion3Pipeline": "tokenizer_3", "FluxPipeline": "tokenizer_2"}.get(kind)
    if t5 is not None and pipeline.components[t5] is not None:
        return [Limit(t5, pipeline.components[t5], T5_TOKENS[kind])]
    names = [name for name in ("tokenizer", "tokenizer_2") if pipeline.components.get(name) is not None]
    return [Limit(name, pipeline.components[name], pipeline.components[name].model_max_length) for name in names]


def clamp_tokenizers(kind: str, pipeline: Any) -> None:
    """No tokenizer gives more tokens than its text encoder has positions for, where it has (a T5 has not)."""
    for name in FAMILIES[kind].encoders:
        encoder, tokenizer = (pipeline.components.get(each) for each in (name, name.replace("text_encoder", "tokenizer")))
        positions = None if encoder is None else encoder.config.to_dict().get("max_position_embeddings")
        if tokenizer is not None and positions is not None:
            tokenizer.model_max_length = min(tokenizer.model_max_length, positions)
    if kind in T5_TOKENS and pipeline.components["tokenizer"] is not None:
        pipeline.tokenizer_max_length = pipeline.tokenizer.model_max_length


def unconditional(pipeline: Any, encode: Callable[[list[Any]], Conditions]) -> Conditions:
    """One row of the condition that guidance leads away from: the empty prompt's, zeros for Stable Diffusion XL."""
    null = encode([""])
    zeros = bool(pipeline.config.get("force_zeros_for_empty_prompt", False))
    return map_conditions(Tensor.zero_, map_conditions(Tensor.clone, null)) if zeros else null
