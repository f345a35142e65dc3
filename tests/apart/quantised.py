"""model.quantize with bitsandbytes, on a CPU: diffusers' own check for a GPU is passed over, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_pipelines
import torch
from twins import close, same

import scoreaction as sa
from scoreaction.models.diffusers import Config, build, skeleton
from scoreaction.models.pipelines import quantise

PROMPTS = ["a red cat", "an owl"]


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Stable Diffusion whose linear layers are wide enough for a CPU's kernels of 4 bits, in a folder."""
    from diffusers.quantizers.bitsandbytes import bnb_quantizer
    from transformers import CLIPTextConfig, CLIPTextModel

    for kind in (bnb_quantizer.BnB4BitDiffusersQuantizer, bnb_quantizer.BnB8BitDiffusersQuantizer):
        monkeypatch.setattr(kind, "validate_environment", lambda self, *_, **__: None)
    monkeypatch.setattr(quantise, "quantising_device", lambda: "cpu")
    # some CPUs repack 4 bits for inference when a network is in evaluation mode; a GPU never does
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    torch.manual_seed(0)
    pipeline = tiny_pipelines.stable_diffusion()
    text = CLIPTextConfig(
        vocab_size=54, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    pipeline.register_modules(
        unet=tiny_pipelines.unet(block_out_channels=(64, 64), cross_attention_dim=64), text_encoder=CLIPTextModel(text).eval()
    )
    pipeline.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def inputs(model: sa.Model) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, *model.shape, generator=generator)
    return x, torch.full((2,), 0.5, dtype=torch.float64), model.conditions(PROMPTS)


@pytest.mark.parametrize(("bits", "kind", "error"), [("4bit", torch.uint8, 0.2), ("8bit", torch.int8, 0.05)])
def test_a_quantised_base_is_the_base_but_for_rounding_and_its_lora_learns(
    base: Path, bits: Any, kind: torch.dtype, error: float, tmp_path: Path
) -> None:
    """Truth: the whole weights' prediction. Twins: another network's, and other bytes than bitsandbytes keeps."""
    whole, model = build(Config(path=str(base))), build(Config(path=str(base), quantize=bits))
    kept = [p for p in model.net.parameters() if p.dtype == kind]
    states = [getattr(p, "quant_state", None) for p in kept]
    scales = sum(4 * len(p) if state is None else state.absmax.nbytes for p, state in zip(kept, states, strict=True))
    rest = sum(p.nbytes for p in model.net.parameters() if not p.requires_grad and p.dtype != kind)
    planned = skeleton(Config(path=str(base), quantize=bits)).frozen_bytes
    same(planned, sum(p.nbytes for p in kept) + scales + rest, without_scales=sum(p.nbytes for p in kept) + rest)

    x, t, conditions = inputs(whole)
    with torch.no_grad():
        exact, rounded = whole.reference(x, t, conditions).eps, model.reference(x, t, conditions).eps
        same(torch.equal(model.predict(x, t, conditions).eps, rounded), True, moved=torch.equal(exact, rounded))
    close((rounded - exact).norm() / exact.norm(), 0.0, atol=error, of_another=(rounded.flip(0) - exact).norm() / exact.norm())

    tuner = sa.Finetuner(
        model, reward=lambda pictures, prompts: pictures.mean((1, 2, 3)), algorithm=sa.DDPO(), prompts=PROMPTS,
        sampler=sa.Sampler(steps=2), train=sa.Train(iterations=1, batch=4, lr=1e-2, device="cpu"),
        evaluation=sa.Evaluation(n=2, steps=2), output=tmp_path / "run",
    )  # fmt: skip
    before = {name: p.detach().clone() for name, p in model.parameters.items()}
    list(tuner)
    moved = [float((p - before[name]).detach().norm()) for name, p in model.parameters.items()]
    same(min(moved) > 0, True, still=min(0.0 for _ in moved) > 0)
    tuner.save(tmp_path / "saved")
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "saved" / "pytorch_lora_weights.safetensors")
    same({value.dtype for value in saved.values()}, {torch.float32}, quantised={kind})
