"""Truth: diffusers' own pictures where a configuration is followed; one line that names the key where it is not."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from twins import accepts, close

import scoreaction as sa
from scoreaction.diffusion.predictions import projected
from scoreaction.types import Prediction

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("peft")

import diffusers  # noqa: E402
import tiny_pipelines  # noqa: E402
from test_pipelines import PROMPTS, equal_to, ours  # noqa: E402

from scoreaction.models.pipelines import config_keys  # noqa: E402
from scoreaction.models.pipelines.assemble import build_from_pipeline  # noqa: E402
from scoreaction.sampling.rollout import Sampler  # noqa: E402

COSINE = {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "trailing"}


def pixels(scheduler: str, core: dict[str, Any] | None = None, **settings: Any) -> Any:
    """A tiny unconditional pipeline with this scheduler."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = tiny_pipelines.unconditional("DDIMScheduler" if scheduler == "DDIMScheduler" else "DDPMScheduler")
        unet = diffusers.UNet2DModel(**{**pipeline.unet.config, **(core or {})}).eval()
    made = type(pipeline)(unet=unet, scheduler=getattr(diffusers, scheduler)(**settings))
    made.set_progress_bar_config(disable=True)
    return made


def latents(scheduler: Any = None, **unet: Any) -> Any:
    """A tiny Stable Diffusion with this UNet and scheduler."""
    pipeline = tiny_pipelines.build("sd")
    if unet:
        pipeline.register_modules(unet=tiny_pipelines.unet(**unet))
    if scheduler is not None:
        pipeline.register_modules(scheduler=scheduler)
    return pipeline


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, COSINE, {**COSINE, "clip_sample_range": 0.3}], ids=["linear", "cosine", "range"])
@pytest.mark.parametrize("kind", ["DDPMScheduler", "DDIMScheduler"])
@pytest.mark.filterwarnings("ignore:model.path. clip_sample")
def test_clip_sample_is_applied_as_diffusers_does(kind: str, settings: dict[str, Any]) -> None:
    """Twins: not applied, applied to x0 alone."""
    pipeline, model = pixels(kind, **settings), build_from_pipeline(pixels(kind, **settings))
    more = {"eta": 0.0, "use_clipped_model_output": True} if kind == "DDIMScheduler" else {}
    call = {"num_inference_steps": 5, "output_type": "np", "generator": torch.Generator().manual_seed(3), **more}
    truth = torch.from_numpy(pipeline(batch_size=2, **call).images).permute(0, 3, 1, 2)
    sampler = Sampler(steps=5, eta=0.0 if more else 1.0, grid="scheduler")

    def drawn(project: Any) -> torch.Tensor:
        model.project = project
        return model.decode(ours(model, None, sampler))

    own, bound = model.project, 0.6 * settings.get("clip_sample_range", 1.0)
    accepts(equal_to(truth), drawn(own), unclipped=drawn(None), other_range=drawn(lambda x0: x0.clamp(-bound, bound)))
    if more:  # diffusers' own twin: x0 alone is clipped
        call |= {"use_clipped_model_output": False, "generator": torch.Generator().manual_seed(3)}
        alone = torch.from_numpy(pipeline(batch_size=2, **call).images).permute(0, 3, 1, 2)
        accepts(equal_to(truth), drawn(own), x0_alone=alone)


def test_a_projected_prediction_is_still_one_of_its_x() -> None:
    """`x = alpha x0 + sigma eps` holds, in every process, also where alpha or sigma is 0. Twin: x0 clipped alone."""
    generator = torch.Generator().manual_seed(0)
    for process in (sa.VP(), sa.CosineVP(), sa.Flow()):
        t = torch.tensor([0.0, 0.1, 0.7, 1.0], dtype=torch.float64)
        x0, eps = (3 * torch.randn(4, 5, generator=generator, dtype=torch.float64) for _ in range(2))
        eps[0], alpha, sigma = 0.0, process.alpha(t)[:, None], process.sigma(t)[:, None]
        x = (alpha * x0 + sigma * eps)[1:]
        found = projected(process, t, Prediction(x0, eps), lambda x: x.clamp(-1, 1))
        close(found.x0.abs().amax(), 1.0, atol=1e-12, unclipped=x0.abs().amax())
        close((alpha * found.x0 + sigma * found.eps)[1:], x, atol=1e-9, x0_alone=(alpha * found.x0 + sigma * eps)[1:])


def test_ddim_says_how_it_clips_and_nothing_else_does() -> None:
    def warns(pipeline: Any) -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            build_from_pipeline(pipeline)
        assert [
            str(each.message) for each in caught if str(each.message).startswith("model.path: clip_sample clips x0, and eps")
        ]

    accepts(warns, pixels("DDIMScheduler"), ddpm=pixels("DDPMScheduler"), off=pixels("DDIMScheduler", clip_sample=False))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: latents(time_cond_proj_dim=32), "the unet's time_cond_proj_dim 32 is not supported; guidance is its input"),
        (lambda: latents(num_class_embeds=3), "the unet's num_class_embeds 3 is not supported; it asks for class labels"),
        (lambda: latents(attention_type="gated"), "the unet's attention_type 'gated' is not supported; take one with"),
        (lambda: pixels("DDPMScheduler", {"class_embed_type": "timestep"}), "the unet's class_embed_type 'timestep' is not"),
        (
            lambda: pixels("DDPMScheduler", {"time_embedding_type": "learned", "num_train_timesteps": 1000}),
            "the unet's time_embedding_type 'learned' is not supported; it does not take every time",
        ),
        (
            lambda: latents(diffusers.EulerDiscreteScheduler(use_karras_sigmas=True)),
            "the scheduler's use_karras_sigmas True is not supported; set it to false in scheduler_config.json",
        ),
        (
            lambda: latents(diffusers.DPMSolverMultistepScheduler(final_sigmas_type="sigma_min", algorithm_type="dpmsolver")),
            "the scheduler's final_sigmas_type 'sigma_min' is not supported; set it to \"zero\"",
        ),
        (lambda: pixels("DDPMScheduler", thresholding=True), "the scheduler's thresholding True is not supported"),
    ],
    ids=["lcm", "classes", "gligen", "class_type", "learned_time", "karras", "last_sigma", "thresholding"],
)  # fmt: skip
def test_what_changes_the_mathematics_and_is_not_followed_is_refused(make: Any, says: str) -> None:
    def check(lines: str) -> None:
        assert lines.startswith(f"model.path: {says}"), lines

    def refusal(pipeline: Any) -> str:
        with pytest.raises(ValueError, match="not supported") as caught:
            build_from_pipeline(pipeline)
        return str(caught.value)

    accepts(check, refusal(make()), another=refusal(latents(dual_scheduler())))


def dual_scheduler() -> Any:
    return diffusers.EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction")


class Later:
    """A network of a later diffusers, with a key that nobody knows yet."""

    def __init__(self, sample_size: int = 8, twist: float = 0.0) -> None:
        self.config = {"sample_size": sample_size, "twist": twist}


def test_a_key_that_is_not_known_passes_with_its_default_alone() -> None:
    def passes(twist: float) -> None:
        try:
            config_keys.check_keys("unet", Later(16, twist), config_keys.NETWORKS["UNet2DModel"])
        except ValueError as error:
            raise AssertionError from error

    accepts(passes, 0.0, changed=0.5)
    with pytest.raises(ValueError, match=r"^model\.path: the unet's twist 0\.5 is not supported; take one with 0\.0$"):
        config_keys.check_keys("unet", Later(16, 0.5), config_keys.NETWORKS["UNet2DModel"])


@pytest.mark.parametrize(("size", "multiple"), [(8, 2), (9, 2), (28, 2)])
def test_a_unet_of_pixels_takes_the_sizes_that_it_halves_and_doubles(size: int, multiple: int) -> None:
    """Truth: the network itself, which fails in its up blocks at other sizes."""
    pipeline = pixels("DDPMScheduler", {"sample_size": size}, clip_sample=False)
    try:
        pipeline.unet(torch.zeros(1, 3, size, size), 0)
    except RuntimeError:
        with pytest.raises(ValueError, match=rf"^model\.height: must be a multiple of 2 \(the network's own is {size}\)"):
            build_from_pipeline(pipeline)
    else:
        assert size % multiple == 0
        assert build_from_pipeline(pipeline).shape == (3, size, size)
    with pytest.raises(ValueError, match=r"^model\.width: must be a multiple of 2 \(got 11\)"):
        build_from_pipeline(pixels("DDPMScheduler"), width=11)


def test_a_vae_without_checkpointing_decodes_too() -> None:
    """Truth: its own pipeline. Twin: the vae that the pipeline had."""
    vae = diffusers.AsymmetricAutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, down_block_out_channels=(8, 8), up_block_types=("UpDecoderBlock2D",) * 2,
        up_block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, sample_size=16,
    ).eval()  # fmt: skip
    pipeline = latents()
    pipeline.register_modules(vae=vae)
    model, other = build_from_pipeline(pipeline), build_from_pipeline(latents())
    x = torch.randn(2, *model.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        truth = pipeline.image_processor.postprocess(vae.decode(x / vae.config.scaling_factor).sample, output_type="pt")
        accepts(equal_to(truth, 1e-5), model.decode(x), other_vae=other.decode(x))


def test_encoded_texts_are_kept_once() -> None:
    """Twin: a copy in the cache beside what was handed out."""
    model = build_from_pipeline(latents())
    found = model.conditions(PROMPTS)["text"]
    known = [model.encode.known[prompt]["text"] for prompt in PROMPTS]  # type: ignore[union-attr]

    def shares(rows: list[torch.Tensor]) -> None:
        assert {row.untyped_storage().data_ptr() for row in rows} == {found.untyped_storage().data_ptr()}

    accepts(shares, known, copies=[row.clone() for row in known])
