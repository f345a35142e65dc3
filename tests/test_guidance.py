"""Truth: classifier-free guidance by its equation, on a network that says what it was told."""

import pytest
import torch
from torch import nn
from twins import close

import scoreaction as sa
from scoreaction.diffusion.predictions import from_prediction


class Told(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x, t, cond):
        return self.scale * cond[:, None].to(x).expand_as(x)


def guided(negative, prompts=("2",), guidance=3.0, **options):
    made = sa.Model(
        Told(),
        process=sa.VP(),
        predicts="v",
        shape=(2,),
        encode=lambda texts: torch.tensor([float(text) for text in texts]),
        null=torch.tensor([0.0]),
        **options,
    )
    sampler = sa.Sampler(steps=3, guidance=guidance, negative_prompt=negative)
    sa.Finetuner(made, reward=lambda x, c: x[:, 0], algorithm=sa.DDPO(), sampler=sampler, prompts=prompts)
    t = torch.tensor(0.5, dtype=torch.float64)
    said = made.reference(torch.zeros(1, 2), t, made.conditions(["2"]), guidance=3.0)
    return from_prediction(sa.VP(), "v", t, said)[0]


def test_guidance_leads_away_from_the_negative_prompt():
    """`y_negative + w (y_prompt - y_negative)`; the twin leads away from the unconditional prediction instead."""
    close(guided("5"), torch.full((2,), 5 + 3.0 * (2 - 5)), atol=1e-4, unconditional=guided(None))


def test_a_negative_prompt_without_prompts_is_refused():
    with pytest.raises(ValueError, match=r"sampler\.negative_prompt"):
        guided("5", prompts=None)


def test_a_negative_prompt_without_guidance_is_refused():
    with pytest.raises(ValueError, match=r"sampler\.negative_prompt: .*; set sampler\.guidance above 1"):
        guided("5", guidance=1.0)
    with pytest.raises(ValueError, match=r"sampler\.negative_prompt: .*; set model\.true_cfg above 1"):
        guided("5", true_cfg=1.0)


@pytest.mark.parametrize("options", [{"guidance": 0.0}, {"guidance": 0.5}, {"guidance": 3.0, "true_cfg": 0.5}], ids=str)
def test_guidance_of_1_and_below_is_off(options):
    """Diffusers' guidance_scale: the prediction is the prompt's, 2. Twin: the equation, which leads to the null's 0."""
    made = sa.Model(
        Told(), process=sa.VP(), predicts="v", shape=(2,), null=torch.tensor([0.0]), true_cfg=options.get("true_cfg"),
        encode=lambda texts: torch.tensor([float(text) for text in texts]),
    )  # fmt: skip
    if made.true_cfg is not None:
        made.net.forward = lambda x, t, cond: made.net.scale * cond["text"][:, None].to(x).expand_as(x)
        made.null = {"text": torch.tensor([0.0])}
    conditions = torch.tensor([2.0]) if made.true_cfg is None else {"text": torch.tensor([2.0])}
    t = torch.tensor(0.5, dtype=torch.float64)

    def prediction():
        said = made.predict(torch.zeros(1, 2), t, conditions, guidance=options["guidance"])
        return from_prediction(sa.VP(), "v", t, said)[0].detach()

    off = prediction()
    assert made.evaluations.forward == 1, "no unconditional half is evaluated"
    weight = options.get("true_cfg", options["guidance"])
    made.guidance_weight = lambda guidance: weight
    close(off, torch.full((2,), 2.0), atol=1e-6, by_the_equation=prediction())
