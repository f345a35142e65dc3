"""Truth: who is where, and how many rows are in each call, written down as it happens; the network that is not compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from twins import accepts, close

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("peft")

import tiny_pipelines  # noqa: E402
from test_pipelines import PROMPTS, build, noise_for  # noqa: E402

from scoreaction.commands._live_memory import LiveMemory  # noqa: E402
from scoreaction.models.pipelines import decoding as decoding_module  # noqa: E402
from scoreaction.models.pipelines.assemble import Adaptation, build_from_pipeline  # noqa: E402
from scoreaction.models.pipelines.skeleton import pipeline_skeleton  # noqa: E402
from scoreaction.models.pipelines.text import AT_ONCE, TextEncoding  # noqa: E402


def equals(truth: Any):
    def check(found: Any) -> None:
        assert found == truth, found

    return check


class Encoder(nn.Module):
    """Writes down where it is sent."""

    def __init__(self, log: list[str]) -> None:
        super().__init__()
        self.log = log

    def to(self, device: torch.device) -> Encoder:
        self.log.append(f"to {device}")
        return self

    def cpu(self) -> Encoder:
        self.log.append("to cpu")
        return self


@pytest.mark.parametrize("fails", [False, True])
def test_encoders_are_on_the_device_only_while_they_work(fails):
    def story(*, handed_over: bool) -> list[str]:
        log: list[str] = []

        def encode(texts, device):
            log.append(f"encode {len(texts)} on {device}")
            if fails:
                raise RuntimeError("out of memory")
            return {"text": torch.zeros(len(texts), 2)}

        encoders = [Encoder(log)] if handed_over else []
        encoding = TextEncoding(encoders, encode, [], lambda: torch.device("cuda"))
        texts = [f"{i} cats" for i in range(AT_ONCE + 3)]
        if fails:
            with pytest.raises(RuntimeError):
                encoding(texts)
        else:
            encoding(texts)
            encoding(texts)
        return log

    calls = [f"encode {AT_ONCE} on cuda"] + ([] if fails else ["encode 3 on cuda"])
    accepts(equals(["to cuda", *calls, "to cpu"]), story(handed_over=True), never_moved=story(handed_over=False))


def decoding(model, x, monkeypatch, *, pixels=decoding_module.PIXELS):
    """The rows of each call of the decoder, the pictures, and their gradient, where a call has so many pixels."""
    monkeypatch.setattr(decoding_module, "PIXELS", pixels)
    vae, sizes = model.decode.vae, []
    decode = vae.decode
    with monkeypatch.context() as patch:
        patch.setattr(vae, "decode", lambda z, **more: sizes.append(len(z)) or decode(z, **more))
        samples = model.decode(x)
        slope = torch.autograd.grad((samples * torch.linspace(-1, 1, samples.numel()).view_as(samples)).sum(), x)[0]
    return sizes, samples.detach(), slope


def test_a_call_of_the_decoder_has_the_pixels_that_memory_holds(monkeypatch):
    """All in one where they fit; else the backward decodes again whatever was not decoded last. The pictures are the same."""
    model = build_from_pipeline(tiny_pipelines.build("sd"))
    x = noise_for(model, 5)[0].requires_grad_()
    picture = model.decode(x[:1])[0, 0].numel()
    whole = decoding(model, x, monkeypatch)
    two, one, none = (decoding(model, x, monkeypatch, pixels=n) for n in (2 * picture, picture, picture - 1))
    for calls, right in ((whole, [5]), (two, [2, 2, 1, 2, 2]), (one, [1] * 9), (none, [1] * 9)):
        accepts(equals(right), calls[0], all_again=[*calls[0], calls[0][0]])
        close(calls[1], whole[1], atol=1e-6, other=whole[1].flip(0))
        close(calls[2], whole[2], atol=1e-6, rtol=1e-5, other=whole[2].flip(0))


def test_the_blocks_of_a_decoder_are_computed_again_for_large_pictures_alone(monkeypatch):
    model = build_from_pipeline(tiny_pipelines.build("sd"))
    x = noise_for(model, 2)[0].requires_grad_()
    picture = model.decode(x[:1])[0, 0].numel()
    seen = {}
    for pixels in (picture, picture - 1):
        decoding(model, x, monkeypatch, pixels=pixels)
        seen[pixels] = model.decode.vae.is_gradient_checkpointing
    wrong = {"always": dict.fromkeys(seen, True), "never": dict.fromkeys(seen, False)}
    accepts(equals({picture: False, picture - 1: True}), seen, **wrong)


@pytest.mark.slow
def test_pictures_of_stable_diffusions_size_need_the_memory_of_one():
    """512 x 512 with a gradient, layers without weights: 3.1 GiB for three pictures as for one, whose whole graph is 5.6."""
    made = pipeline_skeleton(
        "stable-diffusion-v1-5/stable-diffusion-v1-5", Adaptation(4, None, None, True, 1.0), dtype=torch.float32,
        height=512, width=512,
    )  # fmt: skip
    decoder = made.model.decode

    def peak(rows, decode):
        with made.mode:
            x = torch.zeros(rows, 4, 64, 64, requires_grad=True)
        with made.mode, LiveMemory() as memory:
            torch.autograd.grad(decode(x).sum(), x)
        return memory.peak / 2**30

    def small(gibibytes):
        assert gibibytes < 3.2, gibibytes

    batch = peak(2, lambda x: decoder.vae.decode(x, return_dict=False)[0])  # before the decoder's own checkpoints are on
    accepts(small, peak(1, decoder), in_one_batch=batch)
    accepts(small, peak(3, decoder), with_all_graphs=peak(3, lambda x: torch.cat([decoder(part) for part in x.split(1)])))


@pytest.mark.long
def test_compiled_networks_have_the_same_outputs_and_gradients(monkeypatch):
    compiled, plain = [], nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self) or plain(self, backend="eager"))
    found: dict[Any, torch.Tensor] = {}
    for compile in (False, True):
        model = build("sd", compile=compile)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            for parameter in model.parameters.values():
                parameter.normal_(std=0.3)
        x, conditions = noise_for(model, 2)[0].requires_grad_(), model.conditions(PROMPTS[:2])
        for which in ("reference", "predict"):
            said = getattr(model, which)(x, torch.tensor(0.4, dtype=torch.float64), conditions, guidance=2.0).eps
            asked = [x, *model.parameters.values()] if which == "predict" else [x]
            slopes = torch.autograd.grad(said.square().sum(), asked)
            found[which, compile] = torch.cat([said.flatten(), *(slope.flatten() for slope in slopes[:1])]).detach()
            found[which, compile, "weights"] = torch.cat([torch.zeros(1), *(slope.flatten() for slope in slopes[1:])])
    assert len(compiled) == 1
    for which, other in (("reference", "predict"), ("predict", "reference")):
        close(found[which, True], found[which, False], atol=1e-5, rtol=1e-4, other=found[other, True])
    weights = found["predict", False, "weights"]
    close(found["predict", True, "weights"], weights, atol=1e-5, rtol=1e-4, shifted=weights.roll(1))
