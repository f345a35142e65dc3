"""Truth: classifier-free guidance by its equation, on a network that says what it was told."""

import pytest
import torch
from torch import nn
from twins import close, same

import scoreaction as sa
from scoreaction.diffusion.predictions import from_prediction
from scoreaction.networks.conditions import map_conditions


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


class Labelled(nn.Module):
    """Says `scale * cond`, and what it is told beside it at `base`."""

    def __init__(self):
        super().__init__()
        self.base, self.scale = nn.Linear(1, 2, bias=False), nn.Parameter(torch.ones(()))
        nn.init.ones_(self.base.weight)

    def forward(self, x, t, cond):
        return self.scale * self.base(cond[:, None].to(x))


@pytest.mark.parametrize("rank", [None, 1])
@pytest.mark.parametrize("labels", [["small", "large"], None])
def test_guidance_of_a_model_with_labels_leads_away_from_the_pretrained_model(labels, rank):
    """`y_null + w (y_cond - y_null)` with y 2 and null 5 of the base, y 6 of the policy. Twin: the policy's null, 15."""
    net = sa.LabelAdapter(Labelled(), at="base", labels=labels) if labels else Labelled()
    texts = lambda prompts: torch.tensor([float(prompt) for prompt in prompts])  # noqa: E731
    more = {"encode": net.encode(texts), "null": net.null(torch.tensor([5.0]))} if labels else {}
    plain = {"encode": texts, "null": torch.tensor([5.0])}
    made = sa.Model(net, process=sa.VP(), predicts="v", shape=(2,), lora_rank=rank, **(more or plain))
    t, x = torch.tensor(0.5, dtype=torch.float64), torch.zeros(1, 2)
    with torch.no_grad():
        tripled(made)

    def guided(role, prompt):
        found = getattr(made, role)(x, t, made.conditions([prompt]), guidance=3.0)
        return from_prediction(sa.VP(), "v", t, found)[0].detach()

    own, others = (5.0, 15.0) if labels else (15.0, 5.0)
    close(guided("predict", "2"), torch.full((2,), own + 3 * (6 - own)), atol=1e-4, other=others + 3 * (6 - others))
    close(guided("reference", "2"), torch.full((2,), 5.0 + 3 * (2 - 5)), atol=1e-4, of_the_policy=guided("predict", "2"))
    assert made.evaluations.forward == 2 * 3, "two evaluations a row"


def tripled(made):
    """The policy's output is three times what it was, by its LoRA or its own weight."""
    if made.lora is None:
        next(p for name, p in made.parameters.items() if name.endswith("scale")).mul_(3)
    else:
        for name, p in made.parameters.items():
            p.fill_(2.0 if "lora_B" in name else 1.0)


def test_the_unconditional_half_of_a_control_is_the_pretrained_model_to_the_bit():
    """After training. Twin: the policy's own."""
    net = sa.LabelAdapter(Labelled(), at="base", labels=["small", "large"])
    made = sa.Model(
        net, process=sa.VP(), predicts="v", shape=(2,), null=net.null(torch.tensor([0.3])),
        encode=net.encode(lambda prompts: torch.tensor([float(prompt) for prompt in prompts])),
    )  # fmt: skip
    tuner = sa.Finetuner(
        made, reward=lambda x, c: x[:, 0], algorithm=sa.DDPO(), sampler=sa.Sampler(steps=3, guidance=2.0),
        train=sa.Train(iterations=2, batch=8, lr=0.05), prompts=["1 | small", "2 | large"],
    )  # fmt: skip
    list(tuner)
    t, null, halves = torch.full((4,), 0.5, dtype=torch.float64), map_conditions(lambda c: c.expand(4), made.null), []
    x, told = torch.randn(4, 2), made.conditions(["1 | small"] * 4)
    half = made._halves
    made._halves = lambda *args: halves.append(half(*args)) or halves[-1]
    with torch.no_grad():
        made.predict(x, t, told, guidance=2.0)
        same(halves[0][0], made.reference_net(x, t, null), of_the_policy=made.net(x, t, null))
        same(torch.equal(halves[0][1], made.net(x, t, told)), True)
