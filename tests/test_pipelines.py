"""Truth: diffusers' own pipeline calls, from the same noise; the pretrained network itself; autograd without checkpoints."""

from __future__ import annotations

import importlib.machinery
import importlib.util
from typing import Any

import pytest
import torch
from twins import accepts, close

import scoreaction as sa
from scoreaction.networks.model import Model
from scoreaction.sampling.sampler import Sampler
from scoreaction.sampling.trajectory import trajectory

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("peft")

import tiny_pipelines  # noqa: E402

from scoreaction.models.pipelines.assemble import build_from_pipeline  # noqa: E402

ALL = list(tiny_pipelines.PIPELINES)
TEXT = [name for name in ALL if name != "ddpm"]
PROMPTS = tiny_pipelines.PROMPTS


def build(name: str, **options: Any) -> Model:
    size = {"height": 16, "width": 16} if name == "flux" else {}
    return build_from_pipeline(tiny_pipelines.build(name), **size, **options)


def differentiable(samples: torch.Tensor, conditions: Any) -> torch.Tensor:
    return samples[:, 0].mean((1, 2)) - samples[:, 1:].mean((1, 2, 3))


def noise_for(model: Model, n: int, seed: int = 3) -> tuple[torch.Tensor, torch.Generator]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, *model.shape, generator=generator), generator


@torch.no_grad()
def ours(model: Model, prompts: list[str] | None, sampler: Sampler) -> torch.Tensor:
    """Where our sampler ends, before decoding."""
    n = len(prompts) if prompts else 2
    x, generator = noise_for(model, n)
    conditions = model.conditions(prompts)

    def predict(x, t):
        return model.predict(x, t, conditions, guidance=sampler.guidance)

    times = sampler.times(model.process)
    for visit in trajectory(predict, model.process, x, times, solver=sampler.find(), eta=sampler.eta, generator=generator):
        x = visit.x_next
    return x


def equal_to(truth: torch.Tensor, tolerance: float = 1e-4):
    def check(found: torch.Tensor) -> None:
        assert found.shape == truth.shape
        apart = float((found - truth).abs().max())
        assert apart <= tolerance, f"{apart} apart"

    return check


# Our sampler with the pipeline's network is the pipeline's own call


@pytest.mark.slow
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("name", ["sd", "sd_v", "sdxl"])
def test_sampler_equals_the_pipelines_own_call(name, eta):
    model, pipeline = build(name), tiny_pipelines.build(name)
    x, generator = noise_for(model, 3)
    call = {"guidance_scale": 4.0, "num_inference_steps": 6, "output_type": "latent"}
    truth = pipeline(PROMPTS, latents=x, generator=generator, eta=eta, **call).images
    sampler = Sampler(steps=6, eta=eta, grid="scheduler", guidance=4.0)
    accepts(
        equal_to(truth),
        ours(model, PROMPTS, sampler),
        unguided=ours(model, PROMPTS, sampler.model_copy(update={"guidance": 1.0})),
        other_grid=ours(model, PROMPTS, sampler.model_copy(update={"grid": "uniform"})),
        other_eta=ours(model, PROMPTS, sampler.model_copy(update={"eta": 0.5})),
    )


@pytest.mark.slow
def test_zero_terminal_snr_with_trailing_steps_is_the_pipelines():
    def made():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return tiny_pipelines.stable_diffusion("v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing")

    pipeline, model = made(), build_from_pipeline(made())
    pipeline.set_progress_bar_config(disable=True)
    x, generator = noise_for(model, 3)
    call = {"guidance_scale": 1.0, "num_inference_steps": 5, "output_type": "latent", "eta": 1.0}
    truth = pipeline(PROMPTS, latents=x, generator=generator, **call).images
    found = ours(model, PROMPTS, Sampler(steps=5, eta=1.0, grid="scheduler"))
    accepts(equal_to(truth), found, from_t_below_1=ours(model, PROMPTS, Sampler(steps=5, eta=1.0, grid="karras")))


@pytest.mark.slow
def test_negative_prompts_are_the_pipelines():
    for name in ("sd", "sdxl"):
        model, pipeline = build(name), tiny_pipelines.build(name)
        x, _ = noise_for(model, 3)
        call = {"guidance_scale": 4.0, "num_inference_steps": 4, "output_type": "latent"}
        truth = pipeline(PROMPTS, negative_prompt=["a frog"] * 3, latents=x, **call).images
        sampler = Sampler(steps=4, eta=0.0, grid="scheduler", guidance=4.0)
        plain = ours(model, PROMPTS, sampler)
        model.null = model.conditions(["a frog"])
        accepts(equal_to(truth), ours(model, PROMPTS, sampler), without=plain)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_negative_prompts_of_the_sampler_are_the_pipelines(name):
    pipeline, true_cfg = tiny_pipelines.build(name), 2.5
    call = {"num_inference_steps": 4, "output_type": "latent", "negative_prompt": ["a frog"] * 3, "guidance_scale": 4.0}
    model = build(name, **({"true_cfg": true_cfg} if name == "flux" else {}))
    x, _ = noise_for(model, 3)
    if name == "flux":
        size = {"height": 16, "width": 16, "true_cfg_scale": true_cfg}
        truth = pipeline(PROMPTS, latents=pipeline._pack_latents(x, 3, 4, 8, 8), **size, **call).images
        truth = pipeline._unpack_latents(truth, 16, 16, 2)
    else:
        truth = pipeline(PROMPTS, latents=x, **call).images

    def drawn(negative_prompt):
        sampler = Sampler(steps=4, eta=0.0, grid="scheduler", guidance=4.0, negative_prompt=negative_prompt)
        noisy = sampler.model_copy(update={"eta": 1.0})
        sa.Finetuner(model, reward=differentiable, algorithm=sa.DDPO(), sampler=noisy, prompts=PROMPTS)
        return ours(model, PROMPTS, sampler)

    without = drawn(None)
    accepts(equal_to(truth), drawn("a frog"), without=without, other=drawn("a dog"))


@pytest.mark.slow
def test_stable_diffusion_3_is_the_pipelines_euler():
    for scheduler in ({}, {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.16}):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            pipeline = tiny_pipelines.stable_diffusion_3(**scheduler)
            torch.manual_seed(0)
            model = build_from_pipeline(tiny_pipelines.stable_diffusion_3(**scheduler))
        pipeline.set_progress_bar_config(disable=True)
        x, _ = noise_for(model, 3)
        truth = pipeline(PROMPTS, latents=x, guidance_scale=4.0, num_inference_steps=6, output_type="latent").images
        sampler = Sampler(steps=6, eta=0.0, grid="scheduler", guidance=4.0)
        uniform = ours(model, PROMPTS, sampler.model_copy(update={"grid": "uniform"}))
        unguided = ours(model, PROMPTS, sampler.model_copy(update={"guidance": 1.0}))
        accepts(equal_to(truth), ours(model, PROMPTS, sampler), uniform=uniform, unguided=unguided)


@pytest.mark.slow
@pytest.mark.parametrize("true_cfg", [1.0, 2.5])
def test_flux_is_the_pipelines_euler(true_cfg):
    model, pipeline = build("flux", true_cfg=true_cfg), tiny_pipelines.build("flux")
    x, _ = noise_for(model, 3)
    packed = pipeline._pack_latents(x, 3, 4, 8, 8)
    call = {"guidance_scale": 3.5, "num_inference_steps": 6, "output_type": "latent", "height": 16, "width": 16}
    found = pipeline(PROMPTS, negative_prompt=[""] * 3, true_cfg_scale=true_cfg, latents=packed, **call).images
    truth = pipeline._unpack_latents(found, 16, 16, 2)
    sampler = Sampler(steps=6, eta=0.0, grid="scheduler", guidance=3.5)
    accepts(
        equal_to(truth),
        ours(model, PROMPTS, sampler),
        other_guidance=ours(model, PROMPTS, sampler.model_copy(update={"guidance": 1.0})),
        unshifted=ours(model, PROMPTS, sampler.model_copy(update={"grid": "uniform"})),
        other_true_cfg=ours(build("flux", true_cfg=1.7), PROMPTS, sampler),
    )


@pytest.mark.slow
def test_flux_without_embedded_guidance_is_guided_by_both_halves():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = tiny_pipelines.flux(distilled=False)
        torch.manual_seed(0)
        model = build_from_pipeline(tiny_pipelines.flux(distilled=False), height=16, width=16)
    pipeline.set_progress_bar_config(disable=True)
    x, _ = noise_for(model, 3)
    call = {"num_inference_steps": 4, "output_type": "latent", "height": 16, "width": 16, "true_cfg_scale": 2.0}
    packed = pipeline._pack_latents(x, 3, 4, 8, 8)
    truth = pipeline._unpack_latents(pipeline(PROMPTS, negative_prompt=[""] * 3, latents=packed, **call).images, 16, 16, 2)
    found = ours(model, PROMPTS, Sampler(steps=4, eta=0.0, grid="scheduler", guidance=2.0))
    accepts(equal_to(truth), found, unguided=ours(model, PROMPTS, Sampler(steps=4, eta=0.0, grid="scheduler")))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "eta"), [("DDPMScheduler", 1.0), ("DDIMScheduler", 0.0), ("DDIMScheduler", 1.0)])
def test_unconditional_pipelines(kind, eta):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = tiny_pipelines.unconditional(kind)
        torch.manual_seed(0)
        model = build_from_pipeline(tiny_pipelines.unconditional(kind))
    pipeline.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 5, "output_type": "np", **({"eta": eta} if kind == "DDIMScheduler" else {})}
    found = pipeline(batch_size=2, generator=torch.Generator().manual_seed(3), **call).images
    truth = torch.from_numpy(found).permute(0, 3, 1, 2)
    decoded = model.decode(ours(model, None, Sampler(steps=5, eta=eta, grid="scheduler")))
    accepts(equal_to(truth), decoded, other_eta=model.decode(ours(model, None, Sampler(steps=5, eta=0.4, grid="scheduler"))))


@pytest.mark.slow
def test_without_prompts_a_text_model_draws_unconditionally():
    model, pipeline = build("sd"), tiny_pipelines.build("sd")
    x, _ = noise_for(model, 2)
    truth = pipeline(["", ""], latents=x, guidance_scale=1.0, num_inference_steps=4, output_type="latent").images
    found = ours(model, None, Sampler(steps=4, eta=0.0, grid="scheduler"))
    prompted = ours(model, PROMPTS[:2], Sampler(steps=4, eta=0.0, grid="scheduler"))
    accepts(equal_to(truth), found, prompted=prompted)


# Decoding and text


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux"])
def test_decoding_is_the_pipelines_and_carries_the_gradient(name):
    model, pipeline = build(name), tiny_pipelines.build(name)
    latents = noise_for(model, 3)[0] * 0.3
    config = pipeline.vae.config
    plain = latents / config.scaling_factor + (config.get("shift_factor") or 0.0)
    with torch.no_grad():
        truth = pipeline.image_processor.postprocess(pipeline.vae.decode(plain).sample, output_type="pt")
        unscaled = pipeline.image_processor.postprocess(pipeline.vae.decode(latents).sample, output_type="pt")
        accepts(equal_to(truth, 1e-5), model.decode(latents), unscaled=unscaled)

    def slope(decode):
        x = latents.clone().requires_grad_()
        return torch.autograd.grad((decode(x) * torch.linspace(-1, 1, 16)).sum(), x)[0]

    def whole(x):
        return (pipeline.vae.decode(x / config.scaling_factor + (config.get("shift_factor") or 0.0)).sample / 2 + 0.5).clamp(
            0, 1
        )

    close(slope(model.decode), slope(whole), atol=1e-5, unclamped=slope(lambda x: whole(x / 2)))


def test_texts_are_encoded_once_as_the_pipeline_does():
    pipeline = tiny_pipelines.build("sdxl")
    model, calls = build_from_pipeline(pipeline), []
    encode = pipeline.text_encoder.forward
    pipeline.text_encoder.forward = lambda *args, **more: calls.append(len(args[0])) or encode(*args, **more)
    found = model.conditions([PROMPTS[1], PROMPTS[0], PROMPTS[1]])
    again = model.conditions(PROMPTS[:2])
    assert calls == [2]
    with torch.no_grad():
        text, _, pooled, _ = tiny_pipelines.build("sdxl").encode_prompt(PROMPTS[:2], do_classifier_free_guidance=False)
    accepts(equal_to(text, 1e-6), again["text"], other_order=found["text"][:2])
    accepts(equal_to(pooled, 1e-6), again["pooled"], other_order=found["pooled"][:2])
    assert torch.equal(found["text"][2], again["text"][1])


# Training


def algorithms() -> dict[str, Any]:
    """What must train on every family, at its smallest."""
    small = {"updates": 2, "rows": 4, "critic_updates": 2, "surrogate_updates": 2}
    return {"score_action": sa.ScoreAction(**small), "sqdf": sa.SQDF(updates=2, rows=4), "ddpo": sa.DDPO()}


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", algorithms())
@pytest.mark.parametrize("name", ALL)
def test_only_the_lora_learns_and_off_is_the_base_to_the_bit(name, algorithm):
    model, base = build(name, gradient_checkpointing=True), tiny_pipelines.build(name)
    core = base.components.get("unet") or base.components["transformer"]
    before = {key: value.clone() for key, value in model.net.state_dict().items()}
    x, t = noise_for(model, 2)[0], torch.tensor(0.5, dtype=torch.float64)
    conditions = model.conditions(None if name == "ddpm" else PROMPTS[:2])
    with torch.no_grad():
        truth = model.reference(x, t, conditions, guidance=3.0).eps
    tuner = sa.Finetuner(
        model,
        reward=sa.Reward(differentiable, differentiable=algorithm != "ddpo"),
        algorithm=algorithms()[algorithm],
        sampler=Sampler(steps=3, grid="scheduler", guidance=3.0),
        train=sa.Train(iterations=2, batch=4, lr=1e-2, max_rows=4),
        prompts=None if name == "ddpm" else PROMPTS,
    )
    assert all(metrics["grad_norm"] > 0 for metrics in tuner)
    after = model.net.state_dict()
    moved = {key for key in after if not torch.equal(after[key], before[key])}
    idle = {key for key in model.parameters if name == "sd3" and "transformer_blocks.1.attn.add_q_proj" in key}
    assert moved == set(model.parameters) - idle  # nothing comes of what the last block's text asks
    assert all("lora" in key for key in moved)
    frozen = {key.removeprefix("core.").replace(".base_layer", ""): v for key, v in after.items() if "lora" not in key}
    assert set(frozen) == set(core.state_dict())
    assert all(torch.equal(value, frozen[key]) for key, value in core.state_dict().items())
    with torch.no_grad():
        policy = model.predict(x, t, conditions, guidance=3.0).eps
        accepts(equal_to(truth, 0.0), model.reference(x, t, conditions, guidance=3.0).eps, policy=policy)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd", "flux"])
def test_checkpointed_gradients_are_those_without(name):
    """Backward computes activations anew, after the adapters were switched on again."""
    slopes = {}
    for checkpointing in (False, True):
        model = build(name, gradient_checkpointing=checkpointing)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            for parameter in model.parameters.values():
                parameter.normal_(std=0.3)
        x = noise_for(model, 2)[0].requires_grad_()
        conditions = model.conditions(PROMPTS[:2])
        for which in ("reference", "predict"):
            said = getattr(model, which)(x, torch.tensor(0.4, dtype=torch.float64), conditions, guidance=2.0).eps
            slopes[which, checkpointing] = torch.autograd.grad(said.square().sum(), x)[0]
    for which, other in (("reference", "predict"), ("predict", "reference")):
        close(slopes[which, True], slopes[which, False], atol=1e-5, rtol=1e-4, other=slopes[other, True])


@pytest.mark.slow
def test_rows_are_asked_a_few_at_a_time_without_a_graph():
    model = build("sd")
    x, conditions, t = noise_for(model, 3)[0], model.conditions(PROMPTS), torch.tensor(0.4, dtype=torch.float64)
    sizes: list[int] = []
    ask = model.net.core.forward
    model.net.core.forward = lambda x, *args, **more: sizes.append(len(x)) or ask(x, *args, **more)
    found = {}
    with torch.no_grad():
        for most in (None, 2):
            model.max_rows = most
            found[most] = model.predict(x, t, conditions, guidance=2.0).eps
    assert sizes == [6, 4, 2]
    close(found[2], found[None], atol=1e-5, shuffled=found[None].flip(0))


@pytest.mark.slow
def test_narrow_frozen_weights_with_a_wide_lora():
    model = build("sd")
    narrow = build_from_pipeline(tiny_pipelines.build("sd").to(torch.bfloat16))
    assert {p.dtype for p in narrow.net.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert {p.dtype for p in narrow.parameters.values()} == {torch.float32}
    tuner = sa.Finetuner(
        narrow, reward=differentiable, algorithm=sa.DDPO(), sampler=Sampler(steps=3, grid="scheduler", guidance=2.0),
        train=sa.Train(iterations=2, batch=4, max_rows=4), prompts=PROMPTS,
    )  # fmt: skip
    assert all(metrics["grad_norm"] > 0 for metrics in tuner)
    x, t, conditions = noise_for(model, 2)[0], torch.tensor(0.4, dtype=torch.float64), model.conditions(PROMPTS[:2])
    with torch.no_grad():
        wide = model.reference(x, t, conditions).eps
        found = narrow.reference(x, t, conditions).eps
        other_text = narrow.reference(x, t, narrow.conditions(PROMPTS[1:])).eps
        close(found, wide, atol=0.04, other_time=narrow.reference(x, t / 4, conditions).eps, other_text=other_text)
    half = build_from_pipeline(tiny_pipelines.build("sd").to(torch.float16))
    with pytest.raises(ValueError, match=r"train\.precision: .*bf16"):
        sa.Finetuner(half, reward=differentiable, algorithm=sa.DDPO(), prompts=PROMPTS)


def test_adam_in_8_bits_says_what_to_install(monkeypatch):
    """With the package: tests/apart/adam8bit.py."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    train = sa.Train(optimizer="adam8bit", device="cpu")
    with pytest.raises(ValueError, match=r"^train\.optimizer: adam8bit needs .*pip install bitsandbytes$"):
        sa.Finetuner(build("ddpm"), reward=differentiable, algorithm=sa.DDPO(), train=train)
