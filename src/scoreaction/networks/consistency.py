"""Loading and saving of consistency models: a folder of `scoreaction distill`, or an LCM-LoRA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from scoreaction.networks.adapters import base_modules, base_tensors
from scoreaction.networks.lora_files import LoraWeights, copy_into, parse_lora, read_tensors, refuse_different
from scoreaction.networks.model import Model

WEIGHTS, DESCRIPTION, LCM = "consistency.safetensors", "consistency.json", "pytorch_lora_weights.safetensors"
TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Times at which two processes are compared."""


def load_consistency(model: Model, path: str | Path) -> Model:
    """Loads a consistency model into a model, which it returns: a folder of `scoreaction distill`, or an LCM-LoRA.

    An LCM-LoRA (Luo et al. 2023, arXiv 2311.05556) is a safetensors file of LoRA weights, or the folder that holds it as
    pytorch_lora_weights.safetensors. ValueError if the path holds neither, or if it belongs to another process, kind of
    prediction, shape or network.

    >>> import scoreaction as sa
    >>> model = sa.gaussian_mixture.build(sa.gaussian_mixture.Config())
    >>> load_consistency(model, "nowhere")
    Traceback (most recent call last):
    ValueError: model.consistency: nowhere holds no consistency model; make one with scoreaction distill, or name an LCM-LoRA
    """
    folder = Path(path)
    if (folder / DESCRIPTION).is_file():
        return _load_distilled(model, folder)
    file = folder / LCM if folder.is_dir() else folder
    if file.suffix != ".safetensors" or not file.is_file():
        raise ValueError(
            f"model.consistency: {path} holds no consistency model; make one with scoreaction distill, or name an LCM-LoRA"
        )
    _put_lora(model, parse_lora(*read_tensors(file), file), file)
    return model


def save_consistency(model: Model, path: str | Path, *, described: dict[str, Any] | None = None) -> Path:
    """Saves a model's consistency model and its description, to which `described` adds entries; returns the folder.

    An adapter's weights have peft's names, those of a copied network its own. The description, consistency.json, is written
    last: a folder that has one is complete.
    """
    folder = Path(path)
    lora = model.consistency_net is model.reference_net
    tensors = {
        name.replace(".consistency.weight", ".weight") if lora else name: p.detach().cpu().contiguous().clone()
        for name, p in model.consistency_parameters.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DESCRIPTION).unlink(missing_ok=True)
    save_file(tensors, folder / WEIGHTS)
    text = json.dumps(
        {"form": "adapter" if lora else "copy", **belongs(model), "guidance": model.consistency_guidance, **(described or {})},
        indent=2,
    )
    part = folder / f"{DESCRIPTION}.part"
    part.write_text(text + "\n", encoding="utf-8")
    part.replace(folder / DESCRIPTION)
    return folder


def belongs(model: Model) -> dict[str, Any]:
    """Description of a model that its consistency model must match: process, kind of prediction, shape and some outputs."""
    process, t = model.process, torch.tensor(TIMES, dtype=torch.float64)
    curves = {"t": list(TIMES), "alpha": process.alpha(t).tolist(), "sigma": process.sigma(t).tolist()}
    about = {"process": {"name": type(process).__name__, **curves}, "predicts": model.predicts, "shape": list(model.shape)}
    return {**about, "says": _fingerprint(model)}


@torch.no_grad()
def _fingerprint(model: Model) -> list[float] | None:
    """Some values of the reference's x0 at one fixed (x, t) without a prompt; None if the model needs prompts."""
    if model.encode is not None and model.null is None:
        return None
    x = model.process.prior_std * torch.randn(1, *model.shape, generator=torch.Generator().manual_seed(0))
    with model.uncounted():
        x0 = model.reference(x.to(model.device), torch.tensor(0.5, dtype=torch.float64), model.null).x0
    return x0.flatten()[:16].tolist()


def _load_distilled(model: Model, folder: Path) -> Model:
    try:
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        stored = {key: description[key] for key in ("process", "predicts", "shape", "says")}
        form, guidance = description["form"], description["guidance"]
        curves = torch.tensor([stored["process"]["alpha"], stored["process"]["sigma"]], dtype=torch.float64)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"model.consistency: {folder / DESCRIPTION} is damaged; distill again") from error
    expected = belongs(model)
    own_curves = torch.tensor([expected["process"]["alpha"], expected["process"]["sigma"]], dtype=torch.float64)
    if curves.shape != own_curves.shape or not torch.allclose(curves, own_curves, rtol=0, atol=1e-6):
        raise ValueError(
            f"model.consistency: {folder} was made for another process ({stored['process']['name']}), and this model's is"
            f" {expected['process']['name']}; distill this model"
        )
    for key in ("predicts", "shape"):
        if stored[key] != expected[key]:
            raise ValueError(
                f"model.consistency: {folder} was made for a model of {key} {stored[key]}, and this model's is {expected[key]};"
                " distill this model"
            )
    if stored["says"] is not None and not _alike(stored["says"], expected["says"]):
        raise ValueError(f"model.consistency: {folder} was made of another model, whose predictions differ; distill this model")
    tensors, metadata = read_tensors(folder / WEIGHTS)
    if form == "adapter":
        _put_lora(model, parse_lora(tensors, metadata, folder), folder)
    else:
        refuse_different(base_tensors(dict(model.reference_net.named_parameters())), tensors, f"model.consistency: {folder}")
        copy_into(model.add_consistency(), tensors)
    model.consistency_guidance = guidance
    return model


def _alike(stored: list[float], expected: list[float] | None) -> bool:
    """Tells whether two fingerprints are equal but for the rounding of half precision."""
    if expected is None or len(expected) != len(stored):
        return False
    a, b = torch.tensor(stored), torch.tensor(expected)
    return float((a - b).square().mean()) <= 0.02**2 * float(a.square().mean())


def _put_lora(model: Model, weights: LoraWeights, path: Path) -> None:
    modules = base_modules(model.reference_net)
    placed = weights.onto(modules, path)
    tensors = {f"{m}.lora_A.consistency.weight": a for m, a in placed.A.items()}
    tensors |= {f"{m}.lora_B.consistency.weight": b for m, b in placed.B.items()}
    expected = {}
    for name, a in placed.A.items():
        weight = modules[name].get_parameter("weight")
        expected[f"{name}.lora_A.consistency.weight"] = weight.new_empty(a.shape[0], *weight.shape[1:])
        expected[f"{name}.lora_B.consistency.weight"] = weight.new_empty(len(weight), a.shape[0], *[1] * (weight.ndim - 2))
    refuse_different(expected, tensors, f"model.consistency: {path}")
    copy_into(model.add_consistency(placed.shape()), tensors)
