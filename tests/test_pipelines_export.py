"""Truth: plain diffusers, given the files a run leaves, draws what `scoreaction sample` draws; and one line for bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import scoreaction as sa
from scoreaction.cli import main
from scoreaction.models import diffusers
from scoreaction.rollout import Sampler

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("peft")

import tiny_pipelines  # noqa: E402
from test_pipelines import PROMPTS, build, differentiable, equal_to, noise_for, ours  # noqa: E402
from twins import accepts  # noqa: E402

SHORT = {
    "sampler": {"steps": 3, "guidance": 3.0},
    "train": {"iterations": 2, "batch": 4, "lr": 0.02, "held_out_rows": 2},
    "evaluation": {"n": 3, "steps": 4},
}


def brightness(samples: torch.Tensor, conditions: Any) -> torch.Tensor:
    return samples.mean((1, 2, 3))


def train(folder: Path, name: str, **model: Any) -> Path:
    """A run of two iterations through the command line, on a tiny pipeline in a folder."""
    tiny_pipelines.build(name).save_pretrained(folder / "base")
    size = {"height": 16, "width": 16} if name == "flux" else {}
    values = {
        "model": {"name": "diffusers", "path": str(folder / "base"), **size, **model},
        "reward": {"name": "jpeg"},
        "algorithm": {"name": "ddpo"},
        "prompts": None if name == "ddpm" else PROMPTS,
        **SHORT,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    assert main(["train", str(folder / "recipe.yaml"), "--output", str(folder / "run")]) == 0
    return folder / "run"


def plain_call(pipeline: Any, x: torch.Tensor, generator: torch.Generator, eta: float) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    call = {"guidance_scale": 3.0, "num_inference_steps": 4, "output_type": "np", "latents": x}
    return torch.from_numpy(pipeline(PROMPTS, generator=generator, eta=eta, **call).images).permute(0, 3, 1, 2)


def test_a_lora_run_draws_the_same_in_plain_diffusers(tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    run = train(tmp_path, "sd", lora_rank=2, lora_alpha=5.0)
    assert main(["sample", str(run), "--n", "3", "--seed", "7", "--steps", "4"]) == 0
    found = torch.from_numpy(np.load(run / "samples.npz")["samples"])

    def drawn(folder: Path | None) -> torch.Tensor:
        pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "base")
        if folder is not None:
            pipeline.load_lora_weights(folder)
        generator = torch.Generator().manual_seed(7)
        x = torch.randn(3, 4, 8, 8, generator=generator)
        return plain_call(pipeline, x, generator, 1.0)

    weights = load_file(run / "model" / "pytorch_lora_weights.safetensors")
    (tmp_path / "bare").mkdir()
    save_file(weights, tmp_path / "bare" / "pytorch_lora_weights.safetensors")  # alpha is then taken to be the rank
    accepts(equal_to(found), drawn(run / "model"), base=drawn(None), without_metadata=drawn(tmp_path / "bare"))
    again = sa.load(run)
    drawn_again = sa.sample(again, n=3, steps=4, seed=7, guidance=3.0, prompts=PROMPTS, grid="scheduler")
    base_again = sa.sample(again, n=3, steps=4, seed=7, guidance=3.0, prompts=PROMPTS, grid="scheduler", reference=True)
    accepts(equal_to(found, 1e-5), drawn_again, base=base_again)
    assert not [path for path in run.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")]


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux"])
def test_the_loras_of_the_other_families_load_too(name: str, tmp_path: Path) -> None:
    model = build(name, lora_rank=2, lora_alpha=6.0)
    tuner = sa.Finetuner(
        model, reward=differentiable, algorithm=sa.DDPO(), sampler=Sampler(steps=3, grid="scheduler", guidance=3.0),
        train=sa.Train(iterations=2, batch=4, lr=0.02, ema=False), prompts=PROMPTS,
    )  # fmt: skip
    list(tuner)
    tuner.save(tmp_path)
    sampler = Sampler(steps=4, eta=0.0, grid="scheduler", guidance=3.0)

    def drawn(*, lora: bool) -> torch.Tensor:
        pipeline = tiny_pipelines.build(name)
        if lora:
            pipeline.load_lora_weights(tmp_path)
        x, _ = noise_for(model, 3)
        call = {"guidance_scale": 3.0, "num_inference_steps": 4, "output_type": "latent"}
        if name != "flux":
            return pipeline(PROMPTS, latents=x, **call).images
        packed = pipeline._pack_latents(x, 3, 4, 8, 8)
        return pipeline._unpack_latents(pipeline(PROMPTS, latents=packed, height=16, width=16, **call).images, 16, 16, 2)

    accepts(equal_to(ours(model, PROMPTS, sampler)), drawn(lora=True), base=drawn(lora=False))


def test_full_fine_tuning_leaves_a_pipeline(tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    run = train(tmp_path, "sd", lora_rank=None)
    assert main(["sample", str(run), "--n", "3", "--seed", "7", "--steps", "4"]) == 0
    found = torch.from_numpy(np.load(run / "samples.npz")["samples"])

    def drawn(folder: Path) -> torch.Tensor:
        generator = torch.Generator().manual_seed(7)
        x = torch.randn(3, 4, 8, 8, generator=generator)
        return plain_call(StableDiffusionPipeline.from_pretrained(folder), x, generator, 1.0)

    accepts(equal_to(found), drawn(run / "model"), base=drawn(tmp_path / "base"))


def test_an_unconditional_lora_is_merged_into_a_pipeline(tmp_path: Path) -> None:
    from diffusers import DDPMPipeline

    run = train(tmp_path, "ddpm", lora_rank=2, lora_alpha=5.0)
    model, x, t = sa.load(run), torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor(0.5)
    index = float(model.process.timestep(t.double()))
    with torch.no_grad(), model.averaged():
        merged, base = (DDPMPipeline.from_pretrained(path).unet for path in (run / "model", tmp_path / "base"))
        accepts(equal_to(merged(x, index).sample), model.predict(x, t).eps, base=base(x, index).sample)


def test_the_model_card_says_what_was_trained(tmp_path: Path) -> None:
    run = train(tmp_path, "sd")
    card = (run / "model" / "README.md").read_text()
    header, _, body = card.removeprefix("---\n").partition("---\n")
    summary = json.loads((run / "summary.json").read_text())
    said = yaml.safe_load(header)
    assert said["library_name"] == "diffusers"
    assert said["base_model"] == str(tmp_path / "base")
    assert "lora" in said["tags"]
    assert f"{summary['reward_tuned']:.4g}" in body
    assert "algorithm: {name: ddpo" in body
    assert "load_lora_weights" in body
    assert (run / "model" / "samples.png").is_file()
    assert "samples.png" in body


# Bad input


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Trains on a changed copy of the tiny Stable Diffusion, which must exit 2 with one line."""

    def attempt(break_it: Callable[[Path], None] = lambda folder: None, **values: Any) -> str:
        folder = tmp_path / "base"
        tiny_pipelines.build("sd").save_pretrained(folder)
        break_it(folder)
        recipe = {
            "model": {"name": "diffusers", "path": str(folder), **values.pop("model", {})},
            "reward": {"name": "jpeg"},
            "algorithm": {"name": "ddpo"},
            "prompts": PROMPTS,
            **SHORT,
            **values,
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        capsys.readouterr()
        assert main(["train", str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "run")]) == 2
        said = capsys.readouterr().err.strip()
        assert said.count("\n") == 0, said
        return said

    return attempt


def removed(name: str) -> Callable[[Path], None]:
    import shutil

    def act(folder: Path) -> None:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return act


def rewritten(name: str, **changes: Any) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        found = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**found, **changes}))

    return act


def cut(name: str) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:100])

    return act


VAE = "vae/diffusion_pytorch_model.safetensors"
BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "no_index": (removed("model_index.json"), "model.path: .*base holds no pipeline"),
    "no_component": (removed("vae"), "model.path: .*lacks the component vae: there is no folder"),
    "unnamed_component": (rewritten("model_index.json", unet=[None, None]), "model.path: .*lacks the component unet"),
    "no_weights": (removed(VAE), r"model.path: .*vae holds no weights \(\*.safetensors"),
    "damaged": (cut("unet/diffusion_pytorch_model.safetensors"), "model.path: .*cannot be loaded"),
    "other_pipeline": (
        rewritten("model_index.json", _class_name="AudioLDMPipeline"),
        "model.path: a AudioLDMPipeline is not supported; take StableDiffusionPipeline",
    ),
    "inpainting": (rewritten("unet/config.json", in_channels=9), "model.path: .*(cannot be loaded|inpainting)"),
    "rising_table": (
        rewritten("scheduler/scheduler_config.json", trained_betas=[0.1, -0.2, 0.1, 0.1], num_train_timesteps=4),
        "model.path: the alphas of the scheduler DDIMScheduler do not fall from 1 towards 0; take",
    ),
    "flow_scheduler": (
        lambda folder: (
            rewritten("model_index.json", scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"])(folder),
            (folder / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "FlowMatchEulerDiscreteScheduler"}'),
        )[0],
        "model.path: the scheduler FlowMatchEulerDiscreteScheduler holds no table of alphas; take a DDIM",
    ),
    "prediction": (
        rewritten("scheduler/scheduler_config.json", prediction_type="flow"),
        "model.path: the scheduler's prediction_type 'flow' is not known; it must be epsilon, v_prediction, sample",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_folder_that_cannot_be_used_is_refused_in_one_line(what: str, refused: Callable[..., str]) -> None:
    import re

    break_it, pattern = BROKEN[what]
    said = refused(break_it)
    assert re.match(pattern, said), said


def test_settings_that_do_not_fit_are_refused_in_one_line(refused: Callable[..., str]) -> None:
    assert refused(model={"path": "/no/such/folder"}).startswith("model.path: /no/such/folder: no such folder")
    said = refused(model={"lora_targets": ["to_q", "to_w"]})
    assert said == "model.lora_targets: 'to_w' names no layer of the network; did you mean to_v?", said
    assert refused(model={"height": 17}) == "model.height: must be a multiple of 2 (got 17)"
    assert refused(model={"true_cfg": 2.0}).startswith("model.true_cfg: only a network with guidance as an input")
    assert refused(model={"dtype": "fp16"}).startswith("train.precision: gradients through fp16 weights vanish")
    said = refused(prompts=["a cat", "a very long prompt about a cat"])
    assert said == "prompts: 'a very long prompt about a cat' has 26 tokens and the model reads 16; shorten it", said
    assert refused(sampler={"steps": 2000}).startswith("sampler.steps: the scheduler's table has 1000 steps, got 2000")


def test_a_lora_file_is_a_consistency_model_too(tmp_path: Path) -> None:
    """The same LoRA as the policy's adapter and, read from its file as an LCM-LoRA is, in the consistency slot."""
    run = train(tmp_path, "sd", lora_rank=2, lora_alpha=3.0)
    tuned = sa.load(run / "model")
    model = diffusers.build(diffusers.Config(path=str(tmp_path / "base"), consistency=run / "model"))
    x = torch.randn(3, *model.shape, generator=torch.Generator().manual_seed(0))
    t, conditions = torch.tensor(0.6, dtype=torch.float64), model.conditions(["a dog"] * 3)
    with torch.no_grad(), tuned.averaged():
        truth, base = tuned.predict(x, t, conditions).x0, model.reference(x, t, conditions).x0
        found = model.consistency(x, t, conditions)
    accepts(lambda value: torch.testing.assert_close(value, truth, rtol=0, atol=1e-4), found, base=base)
