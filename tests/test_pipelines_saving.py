"""Settings that save a pipeline's memory. Truth: each decoder asked by itself, the moves written down as they happen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from twins import close, same

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("peft")

import tiny_pipelines  # noqa: E402
from test_pipelines import noise_for  # noqa: E402

from scoreaction.models.diffusers import Config, build, skeleton  # noqa: E402
from scoreaction.models.pipelines.assemble import build_from_pipeline  # noqa: E402


def tiny_decoder(channels: int = 4, blocks: int = 2) -> Any:
    """A small autoencoder of TAESD's kind, by 2 where it has two blocks."""
    from diffusers import AutoencoderTiny

    torch.manual_seed(1)
    wide = {"encoder_block_out_channels": (8,) * blocks, "decoder_block_out_channels": (8,) * blocks}
    each = {"num_encoder_blocks": (1,) * blocks, "num_decoder_blocks": (1,) * blocks}
    return AutoencoderTiny(latent_channels=channels, **wide, **each).eval()


@pytest.mark.slow
def test_a_tiny_decoder_takes_the_gradient_and_the_pipelines_own_all_else(tmp_path):
    """Truth: both decoders, asked by themselves. Twins: each in the other's place."""
    pipeline, small = tiny_pipelines.build("sd"), tiny_decoder()
    pipeline.save_pretrained(tmp_path / "base")
    small.save_pretrained(tmp_path / "tiny")
    model = build(Config(path=str(tmp_path / "base"), tiny_decoder=str(tmp_path / "tiny")))
    plain = build_from_pipeline(pipeline)
    x = noise_for(plain, 2)[0].requires_grad_()
    with torch.no_grad():
        own, theirs = plain.decode(x), (small.decode(x).sample + 1) / 2
        close(model.decode(x), own, atol=1e-6, the_other=theirs)
    pictures = model.decode(x)
    close(pictures.detach(), theirs.clamp(0, 1), atol=1e-6, the_other=own)
    (slope,) = torch.autograd.grad(pictures.sum(), x)
    (right,) = torch.autograd.grad(((small.decode(x).sample + 1) / 2).clamp(0, 1).sum(), x)
    close(slope, right, atol=1e-5, the_other=torch.autograd.grad(plain.decode(x).sum(), x)[0])
    planned = skeleton(Config(path=str(tmp_path / "base"), tiny_decoder=str(tmp_path / "tiny")))
    both = sum(p.nbytes for part in (pipeline.vae, small) for p in part.parameters())
    same(planned.vae_bytes, both, without=skeleton(Config(path=str(tmp_path / "base"))).vae_bytes)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"tiny_decoder": "base"}, r"^tiny_decoder: .*base cannot be loaded as an AutoencoderTiny"),
        ({"tiny_decoder": "other"}, r"^model\.tiny_decoder: decodes 8 channels by 4, and the pipeline has 4 by 2"),
        ({"quantize": "4bit", "lora_rank": None}, r"^quantize: whole numbers cannot be trained, .*; set lora_rank"),
        ({"quantize": "4bit"}, r"^quantize: (needs the package bitsandbytes|.* GPU, and there is none here; leave it out)"),
    ],
)
def test_what_saves_memory_and_cannot_be_is_refused(settings, says, tmp_path):
    """Twin: the same folder without the setting."""
    tiny_pipelines.build("sd").save_pretrained(tmp_path / "base")
    tiny_decoder(8, 3).save_pretrained(tmp_path / "other")
    named = {key: str(tmp_path / value) if key == "tiny_decoder" else value for key, value in settings.items()}
    with pytest.raises(ValueError, match=says):
        build(Config(path=str(tmp_path / "base"), **named))
    assert build(Config(path=str(tmp_path / "base"))).lora is not None


@pytest.mark.slow
def test_an_offloaded_autoencoder_leaves_once_it_has_decoded(monkeypatch, tmp_path):
    """Twins: one that stays, and a picture whose backward is still to come."""

    def moves(*, offload: bool, learns: bool = False) -> int:
        pipeline, log = tiny_pipelines.build("sd"), []
        model = build_from_pipeline(pipeline, offload_vae=offload)
        monkeypatch.setattr(pipeline.vae, "cpu", lambda: log.append("cpu"))
        x = noise_for(model, 1)[0].requires_grad_(learns)
        model.decode(x)
        return len(log)

    same(moves(offload=True), 1, stays=moves(offload=False), in_use=moves(offload=True, learns=True))
    tiny_pipelines.build("sd").save_pretrained(tmp_path)
    planned = skeleton(Config(path=str(tmp_path), offload_vae=True))
    same(
        (planned.vae_bytes, planned.offloaded_bytes > 0),
        (0, True),
        stays=(1, skeleton(Config(path=str(tmp_path))).offloaded_bytes > 0),
    )
