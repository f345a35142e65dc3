"""Truth: the pretrained pipeline, its network with a vector added by hand, and plain diffusers with what a run leaves."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from twins import accepts, close, same

import scoreaction as sa

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("peft")

import tiny_pipelines  # noqa: E402
from test_pipelines import ALL, PROMPTS, build, equal_to, noise_for  # noqa: E402
from test_pipelines_export import plain_call, streams, train  # noqa: E402

from scoreaction.cli import main  # noqa: E402
from scoreaction.models import diffusers, shapes  # noqa: E402
from scoreaction.models.pipelines.assemble import pipeline_net  # noqa: E402
from scoreaction.networks.adapters import without_adapters  # noqa: E402
from scoreaction.networks.labels import GAIN  # noqa: E402

LABELS = ["small", "large"]
T = torch.tensor(0.5, dtype=torch.float64)


def of(text: str | None, label: str | None) -> str:
    """A prompt with its label, or only one of them."""
    return " | ".join(part for part in (text, label) if part)


def learned(model: Any, *, lora: bool) -> None:
    """The policy's weights as after training: the table of labels, and the LoRA where it is said."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        for name, parameter in model.parameters.items():
            if lora or "lora" not in name:
                parameter.normal_(std=0.3 / (1 if "lora" in name else GAIN))


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_every_family_is_told_labels_where_its_time_is_embedded(name):
    """To the bit the pretrained one at first, and for the reference and without a label ever; else a vector is added there."""
    text = None if name == "ddpm" else PROMPTS[0]
    model, plain = build(name, lora_rank=2, labels=LABELS), build(name, lora_rank=2)
    x = noise_for(model, 2)[0]
    large, none = model.conditions([of(text, "large")] * 2), model.conditions([text or ""] * 2)
    unlabelled = plain.conditions(None if text is None else [text] * 2)

    @torch.no_grad()
    def eps(model, conditions, *, role="predict", guidance=1.0):
        return getattr(model, role)(x, T, conditions, guidance=guidance).eps

    base = eps(plain, unlabelled)
    first = eps(model, large), eps(model, None)
    learned(model, lora=False)
    tuned = eps(model, large)
    same(first[0], base, tuned=tuned)
    same(first[1], eps(plain, None), tuned=tuned)
    same(eps(model, large, role="reference"), base, of_the_policy=tuned)
    same(eps(model, none), base, with_a_label=tuned)
    guided = eps(plain, unlabelled, guidance=3.0)
    close(eps(model, none, guidance=3.0), guided, atol=1e-5, with_a_label=eps(model, large, guidance=3.0))
    module = pipeline_net(plain.net).core.get_submodule("time_text_embed" if name in ("sd3", "flux") else "time_embedding")

    def by_hand(vector):
        hook = module.register_forward_hook(lambda module, inputs, output: output + vector)
        found = eps(plain, unlabelled)
        hook.remove()
        return found

    small, added = GAIN * model.net.table.vectors.detach()
    close(tuned, by_hand(added), atol=1e-5, of_another_label=by_hand(small), of_no_label=base)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [2, None])
def test_checkpointed_gradients_of_a_guided_control_are_those_without(rank):
    """The unconditional half is another role's call, whose adapters are off when backward computes it anew."""
    slopes: dict[tuple[bool, float], Any] = {}
    for guidance in (1.0, 3.0):
        for checkpointing in (False, True):
            model = build("sd", lora_rank=rank, labels=LABELS, gradient_checkpointing=checkpointing)
            learned(model, lora=rank is not None)
            x = noise_for(model, 2)[0].requires_grad_()
            conditions = model.conditions([of(PROMPTS[0], "small"), of(PROMPTS[1], "large")])
            loss = model.predict(x, T, conditions, guidance=guidance).eps.square().sum()
            wanted = [x, *(p for name, p in model.parameters.items() if name.startswith("table") or "attn2.to_q" in name)]
            slopes[checkpointing, guidance] = torch.cat([part.flatten() for part in torch.autograd.grad(loss, wanted)])
    close(slopes[True, 3.0], slopes[False, 3.0], atol=1e-4, rtol=1e-3, unguided=slopes[True, 1.0])


def test_a_network_made_of_a_labelled_one_has_forgotten_the_labels():
    """A consistency model learns the pretrained model's ODE. Twin: a copy that keeps what the policy has learned."""
    model = build("sd", lora_rank=2, labels=LABELS)
    learned(model, lora=False)
    x, told = noise_for(model, 2)[0], model.conditions([of(PROMPTS[0], "large")] * 2)
    t = T.expand(2)
    with torch.no_grad():
        found, truth = (net(x, t, told) for net in (without_adapters(model.net), build("sd").net))
        same(found, truth, kept=model.net(x, t, told))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd", "sdxl", "ddpm"])
def test_a_skeleton_has_the_trained_parameters_of_the_model(name, tmp_path):
    tiny_pipelines.build(name).save_pretrained(tmp_path)
    config = diffusers.Config(path=str(tmp_path), labels=LABELS)
    planned, model = diffusers.skeleton(config), diffusers.build(config)
    unlabelled = diffusers.skeleton(diffusers.Config(path=str(tmp_path)))

    def sizes(parameters):
        return {key: tuple(value.shape) for key, value in parameters.items()}

    same(sizes(planned.model.parameters), sizes(model.parameters), without=sizes(unlabelled.model.parameters))
    with planned.mode:
        x = torch.zeros(1, *model.shape)
        assert planned.model.predict(x, T, planned.conditions, guidance=3.0).eps.shape == x.shape


@pytest.mark.slow
@pytest.mark.parametrize("rank", [2, None])
def test_a_control_is_saved_resumed_loaded_and_drawn_by_plain_diffusers(rank, tmp_path):
    """Diffusers, with the LoRA or the whole weights and the label's vector added as the model card says."""
    prompts = [of(text, label) for text in PROMPTS[:2] for label in LABELS]
    run = train(tmp_path, "sd", guidance=1.0, prompts=prompts, lora_rank=rank, labels=LABELS)
    before = {key: value.clone() for key, value in sa.load(run).parameters.items()}
    assert float(before["table.vectors"].abs().min()) > 0
    wanted = [of(PROMPTS[i], "large") for i in range(3)]
    call = ["sample", str(run), "--n", "3", "--seed", "7", "--steps", "4"]
    assert main([*call, *(part for prompt in wanted for part in ("--prompt", prompt))]) == 0
    found = torch.from_numpy(np.load(run / "samples.npz")["samples"])
    code = (run / "model" / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    code = code.replace("this folder", str(run / "model"))

    def drawn(code: str) -> torch.Tensor:
        names: dict[str, Any] = {}
        exec(code, names)
        generator, x = streams()
        return plain_call(names["pipeline"], x, generator, 1.0, guidance_scale=1.0)

    accepts(equal_to(found), drawn(code.replace('["small"]', '["large"]')), small=drawn(code))
    summary = json.loads((run / "summary.json").read_text())
    assert main(["train", str(tmp_path / "recipe.yaml"), "train.iterations=3", "--output", str(run), "--resume"]) == 0
    longer = json.loads((run / "summary.json").read_text())
    same(longer["iterations"], 3, not_resumed=summary["iterations"])
    same(torch.equal(sa.load(run).parameters["table.vectors"], before["table.vectors"]), False)


def test_shapes_take_labels():
    """The shipped pipeline to the bit at first, guided and for each label. Twin: once the labels are learned."""
    model, plain = (shapes.build(shapes.Config(labels=labels)) for labels in (LABELS, None))
    x, text = noise_for(model, 2)[0], "two green triangles"
    told, unlabelled = model.conditions([of(text, "large"), of(text, "small")]), plain.conditions([text] * 2)

    @torch.no_grad()
    def eps(model, conditions):
        return model.predict(x, T, conditions, guidance=3.0).eps

    first = eps(model, told)
    learned(model, lora=False)
    close(first, eps(plain, unlabelled), atol=1e-5, learned=eps(model, told))
    with pytest.raises(ValueError, match="'medium' is no label"):
        model.conditions([of(text, "medium")])
    with pytest.raises(ValueError, match="labels: must be two or more different names"):
        shapes.build(shapes.Config(labels=["large"]))
