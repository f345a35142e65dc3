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

from scoreaction.models.pipelines.assemble import build_from_pipeline  # noqa: E402
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


@pytest.mark.slow
@pytest.mark.parametrize("gradient", [False, True])
def test_pictures_are_decoded_one_at_a_time(gradient):
    pipeline = tiny_pipelines.build("sd")
    model, sizes = build_from_pipeline(pipeline), []
    decode = pipeline.vae.decode
    pipeline.vae.decode = lambda z, **more: sizes.append(len(z)) or decode(z, **more)

    def rows(how):
        sizes.clear()
        x = noise_for(model, 3)[0].requires_grad_(gradient)
        samples = how(x)
        if gradient:
            torch.autograd.grad(samples.sum(), x)
        return list(sizes)

    whole = rows(lambda x: pipeline.vae.decode(x).sample)
    accepts(equals([1] * (6 if gradient else 3)), rows(model.decode), whole=whole)  # backward decodes each anew


@pytest.mark.slow
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
