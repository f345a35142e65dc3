"""From a diffusers pipeline in memory to a `Model`: LoRA, reference, text, decoding, checkpointing, export."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from scoreaction.models.pipelines.decoding import Decoder, from_unit, small_pictures, to_unit
from scoreaction.models.pipelines.families import FAMILIES, Geometry, clamp_tokenizers, geometry, limits, network, unconditional
from scoreaction.models.pipelines.networks import PipelineNet
from scoreaction.models.pipelines.text import TextEncoding
from scoreaction.networks.adapters import LoraShape, find_targets
from scoreaction.networks.labels import GAIN, LabelAdapter
from scoreaction.networks.model import Model
from scoreaction.types import Conditions

LORA_FILE, LABEL_FILE = "pytorch_lora_weights.safetensors", "labels.safetensors"
ROWS = 2
"""Points of one network call unless a run says otherwise; guidance doubles them. Few, since their graph is kept."""


class Adaptation(NamedTuple):
    """Options of a pipeline's network: its LoRA, and the way it is called."""

    lora_rank: int | None
    lora_alpha: float | None
    lora_targets: Sequence[str] | None
    gradient_checkpointing: bool
    true_cfg: float
    compile: bool = False
    labels: Sequence[str] | None = None


def build_from_pipeline(
    pipeline: Any,
    *,
    lora_rank: int | None = 4,
    lora_alpha: float | None = None,
    lora_targets: Sequence[str] | None = None,
    gradient_checkpointing: bool = False,
    compile: bool = False,
    height: int | None = None,
    width: int | None = None,
    true_cfg: float = 1.0,
    tiny_decoder: Any = None,
    offload_vae: bool = False,
    labels: Sequence[str] | None = None,
) -> Model:
    """The model of a pipeline that is in memory; its network is changed in place.

    labels: names of labels that prompts may end with, `"a cat | indoors"`, a control that is learned from labelled pictures.
    Samples are pictures in [0, 1], (batch, 3, height, width); x is latents, (batch, C, H, W), also where the network takes
    them packed. Without prompts a text model draws from its unconditional condition. ValueError, naming the key of the
    recipe, for a class that is not supported, a scheduler that cannot be read, a size or a LoRA target that does not fit.
    """
    kind = type(pipeline).__name__
    family = family_of(kind)
    core, vae = pipeline.components[family.component], pipeline.components.get("vae")
    form = geometry(kind, core.config, None if vae is None else vae.config, height, width)
    encode = _encoding(pipeline, kind, core)
    model = assemble(
        kind,
        core,
        pipeline.scheduler,
        form,
        Adaptation(lora_rank, lora_alpha, lora_targets, gradient_checkpointing, true_cfg, compile, labels),
        encode=encode,
        decoder=None if vae is None else Decoder(vae, tiny=tiny_decoder, offload=offload_vae),
    )
    if vae is None and (tiny_decoder is not None or offload_vae):
        raise ValueError(
            "model.path: the pipeline has no autoencoder to replace or to move; leave tiny_decoder and offload_vae out"
        )
    if model.project is not None and type(pipeline.scheduler).__name__.startswith("DDIM"):
        warnings.warn(
            "model.path: clip_sample clips x0, and eps goes with it: as DDPM does, and DDIM with use_clipped_model_output=True,"
            " which its pipeline leaves out",
            stacklevel=2,
        )
    model.export = lambda folder: export(model, pipeline, folder)
    null = None if encode is None else unconditional(pipeline, encode)
    for net in (model.net, model.reference_net):
        pipeline_net(net).null = null
    model.null = model.net.null(null) if isinstance(model.net, LabelAdapter) else null
    return model


def pipeline_net(net: nn.Module) -> PipelineNet:
    """The pipeline's own network, within what is told labels."""
    return next(module for module in net.modules() if isinstance(module, PipelineNet))


def assemble(
    kind: str,
    core: Any,
    scheduler: Any,
    form: Geometry,
    options: Adaptation,
    *,
    encode: Callable[[list[Any]], Conditions] | None = None,
    decoder: Decoder | None = None,
) -> Model:
    """The model of a pipeline's network and scheduler, of latents where it has a decoder."""
    distilled = bool(core.config.get("guidance_embeds", False))
    if options.true_cfg != 1.0 and not distilled:
        raise ValueError("model.true_cfg: only a network with guidance as an input takes it (FLUX.1 dev); set sampler.guidance")
    targets = list(options.lora_targets or FAMILIES[kind].targets)
    if options.lora_rank is not None:
        find_targets(core, targets, key="model.lora_targets")
    if any(getattr(module, "fused_projections", False) for module in core.modules()):
        raise ValueError(
            "net: its attention is fused, which neither LoRA nor a saved pipeline can hold; load the pipeline anew"
        )
    own, schedule = network(kind, core, scheduler, form)
    core.requires_grad_(options.lora_rank is None).eval()
    net: nn.Module = own
    if options.labels is not None:
        net = adapter = LabelAdapter(own, at=f"core.{FAMILIES[kind].time}", labels=options.labels)
        encode = adapter.encode(encode)
    model = Model(
        net,
        process=schedule.process,
        predicts=schedule.predicts,
        project=schedule.project,
        shape=form.shape,
        lora_rank=options.lora_rank,
        lora_alpha=options.lora_alpha,
        lora_targets=targets if options.lora_rank else None,
        encode=encode,
        decode=decoder or to_unit,
        invert=from_unit if decoder is None else decoder.invert,
        features=small_pictures,
        true_cfg=options.true_cfg if distilled else None,
    )
    model.max_rows = ROWS
    for each in [model.net] if options.lora_rank else [model.net, model.reference_net]:
        inner: Any = pipeline_net(each).core
        if options.gradient_checkpointing:
            inner.enable_gradient_checkpointing()
        if options.compile:
            inner.compile()
    return model


def family_of(kind: str) -> Any:
    """The family of a pipeline class; ValueError where it is not supported."""
    if kind not in FAMILIES:
        raise ValueError(f"model.path: a {kind} is not supported; take {', '.join(FAMILIES)}")
    return FAMILIES[kind]


def _encoding(pipeline: Any, kind: str, core: nn.Module) -> TextEncoding | None:
    family = FAMILIES[kind]
    encode = family.encode
    if encode is None:
        return None
    encoders = [pipeline.components[name] for name in family.encoders if pipeline.components.get(name) is not None]
    for encoder in encoders:
        encoder.requires_grad_(False).eval()
    clamp_tokenizers(kind, pipeline)
    return TextEncoding(
        encoders,
        lambda prompts, device: encode(pipeline, prompts, device),
        limits(kind, pipeline),
        lambda: next(core.parameters()).device,
    )


def export(model: Model, pipeline: Any, folder: Path) -> None:
    """Writes what plain diffusers loads: the LoRA with its rank and alpha, or the whole pipeline after full fine-tuning.

    Without the adapter's metadata diffusers would take alpha to be the rank, and draw other pictures. Unconditional pipelines
    load no LoRA: theirs is merged into the pipeline that is written. Labels have a file beside them: a vector by each one's
    name, and in its header the module to whose output it is added.
    """
    family = family_of(type(pipeline).__name__)
    if isinstance(model.net, LabelAdapter):
        _export_labels(model.net, f"{family.component}.{family.time}", folder)
    if model.reference_net is not model.net:
        pipeline.save_pretrained(folder, safe_serialization=True)
        return
    from safetensors.torch import save_file

    component = family.component
    if family.encode is None:
        core = merged(pipeline_net(model.net).core)
        type(pipeline)(**{**pipeline.components, component: core}).save_pretrained(folder, safe_serialization=True)
        return
    layers = {
        f"{component}.{name.partition('core.')[2].replace('.default.', '.')}": value.detach().cpu().contiguous().clone()
        for name, value in model.adapters.parameters("policy").items()
    }
    settings = {
        f"{component}.{key}": sorted(value) if isinstance(value, set) else value
        for key, value in cast(Any, model.net).peft_config["default"].to_dict().items()
    } | {f"{component}.target_modules": sorted(cast(LoraShape, model.lora).targets)}
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(settings, sort_keys=True)}
    save_file(layers, folder / LORA_FILE, metadata=metadata)


@torch.no_grad()
def _export_labels(net: LabelAdapter, module: str, folder: Path) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    vectors = (GAIN * net.table.vectors).cpu()
    tensors = {name: vector.clone() for name, vector in zip(net.labels.names, vectors, strict=True)}
    save_file(tensors, folder / LABEL_FILE, metadata={"format": "pt", "module": module})


def merged(core: nn.Module) -> nn.Module:
    """A copy of a network with its adapters added to its own weights, and no longer there."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    copied = copy.deepcopy(core)
    for name, module in list(copied.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(copied.get_submodule(parent), child, module.get_base_layer())
    return copied
