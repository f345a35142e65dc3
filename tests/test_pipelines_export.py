"""Truth: plain diffusers, given the files a run leaves, draws what `scoreaction sample` draws."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import scoreaction as sa
from scoreaction.cli import main
from scoreaction.diffusion.noise import RowNoise
from scoreaction.models import diffusers
from scoreaction.sampling.sampler import Sampler

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


def train(
    folder: Path, name: str, *, off_below: float = 0.0, guidance: float = 3.0, prompts: list[str] = PROMPTS, **model: Any
) -> Path:
    """A run of two iterations through the command line, on a tiny pipeline in a folder."""
    tiny_pipelines.build(name).save_pretrained(folder / "base")
    size = {"height": 16, "width": 16} if name == "flux" else {}
    values = {
        "model": {"name": "diffusers", "path": str(folder / "base"), **size, **model},
        "reward": {"name": "jpeg"},
        "algorithm": {"name": "ddpo"},
        "prompts": None if name == "ddpm" else prompts,
        **SHORT,
        "sampler": {**SHORT["sampler"], "guidance": guidance, "off_below": off_below},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    assert main(["train", str(folder / "recipe.yaml"), "--output", str(folder / "run")]) == 0
    return folder / "run"


def streams() -> tuple[list[torch.Generator], torch.Tensor]:
    """The generators of three samples of seed 7, as diffusers takes them, and their latents."""
    generators = RowNoise(7, torch.arange(3)).streams
    return generators, torch.cat([torch.randn(1, 4, 8, 8, generator=generator) for generator in generators])


def plain_call(pipeline: Any, x: torch.Tensor, generator: list[torch.Generator], eta: float, **more: Any) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    call = {"guidance_scale": 3.0, "num_inference_steps": 4, "output_type": "np", "latents": x, **more}
    return torch.from_numpy(pipeline(PROMPTS, generator=generator, eta=eta, **call).images).permute(0, 3, 1, 2)


@pytest.mark.slow
def test_a_lora_run_draws_the_same_in_plain_diffusers(tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    run = train(tmp_path, "sd", lora_rank=2, lora_alpha=5.0)
    assert main(["sample", str(run), "--n", "3", "--seed", "7", "--steps", "4"]) == 0
    found = torch.from_numpy(np.load(run / "samples.npz")["samples"])

    def drawn(folder: Path | None) -> torch.Tensor:
        pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "base")
        if folder is not None:
            pipeline.load_lora_weights(folder)
        generator, x = streams()
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


@pytest.mark.slow
def test_the_model_card_switches_the_lora_off_below_a_time(tmp_path: Path) -> None:
    """Of the times 0.75, 0.5, 0.25 and 0 the last two are the base's, in plain diffusers too, and in a second call."""
    run = train(tmp_path, "sd", off_below=0.4)
    assert main(["sample", str(run), "--n", "3", "--seed", "7", "--steps", "4"]) == 0
    found = torch.from_numpy(np.load(run / "samples.npz")["samples"])
    card = (run / "model" / "README.md").read_text()
    assert "Below time 0.4" in card
    *lines, call = card.partition("```python\n")[2].partition("\n```")[0].splitlines()
    assert "callback_on_step_end=off_below" in call
    names: dict[str, Any] = {}
    exec("\n".join(lines).replace("this folder", str(run / "model")), names)

    def drawn(**more: Any) -> torch.Tensor:
        generator, x = streams()
        return plain_call(names["pipeline"], x, generator, 1.0, **more)

    accepts(equal_to(found), drawn(callback_on_step_end=names["off_below"]), policy_throughout=drawn())
    equal_to(found)(drawn(callback_on_step_end=names["off_below"]))


CONVOLUTIONS = ["to_q", "conv1", "conv_in"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rank", "targets"),
    [
        *(("sdxl", rank, None) for rank in (2, None)),
        *(("sd3", rank, None) for rank in (2, None)),
        *(("flux", rank, None) for rank in (2, None)),
        ("sd", 2, CONVOLUTIONS),
        ("sdxl", 2, CONVOLUTIONS),
    ],
)
def test_what_a_tuner_saves_draws_the_same_in_plain_diffusers(
    name: str, rank: int | None, targets: list[str] | None, tmp_path: Path
) -> None:
    from diffusers import DiffusionPipeline

    model = build(name, lora_rank=rank, lora_alpha=6.0, lora_targets=targets)
    tuner = sa.Finetuner(
        model, reward=differentiable, algorithm=sa.DDPO(), sampler=Sampler(steps=3, grid="scheduler", guidance=3.0),
        train=sa.Train(iterations=2, batch=4, lr=0.02 if rank else 0.003, ema=False), prompts=PROMPTS,
    )  # fmt: skip
    list(tuner)
    tuner.save(tmp_path)
    sampler = Sampler(steps=4, eta=0.0, grid="scheduler", guidance=3.0)

    def drawn(*, tuned: bool, without: str = "nothing") -> torch.Tensor:
        pipeline = tiny_pipelines.build(name)
        if tuned and rank is None:
            pipeline = DiffusionPipeline.from_pretrained(tmp_path)
        elif tuned:
            pipeline.load_lora_weights(tmp_path)
        core = pipeline.components.get("unet") or pipeline.components["transformer"]
        for key, value in core.named_parameters():
            if without in key and "lora_B" in key:
                value.data.zero_()
        pipeline.set_progress_bar_config(disable=True)
        x, _ = noise_for(model, 3)
        call = {"guidance_scale": 3.0, "num_inference_steps": 4, "output_type": "latent"}
        if name != "flux":
            return pipeline(PROMPTS, latents=x, **call).images
        packed = pipeline._pack_latents(x, 3, 4, 8, 8)
        return pipeline._unpack_latents(pipeline(PROMPTS, latents=packed, height=16, width=16, **call).images, 16, 16, 2)

    wrong = {"base": drawn(tuned=False)}
    if targets:
        wrong["attention_alone"] = drawn(tuned=True, without="conv")
    accepts(equal_to(ours(model, PROMPTS, sampler)), drawn(tuned=True), **wrong)


@pytest.mark.slow
def test_full_fine_tuning_leaves_a_pipeline(tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    run = train(tmp_path, "sd", lora_rank=None)
    assert main(["sample", str(run), "--n", "3", "--seed", "7", "--steps", "4"]) == 0
    found = torch.from_numpy(np.load(run / "samples.npz")["samples"])

    def drawn(folder: Path) -> torch.Tensor:
        generator, x = streams()
        return plain_call(StableDiffusionPipeline.from_pretrained(folder), x, generator, 1.0)

    accepts(equal_to(found), drawn(run / "model"), base=drawn(tmp_path / "base"))


@pytest.mark.slow
def test_an_unconditional_lora_is_merged_into_a_pipeline(tmp_path: Path) -> None:
    from diffusers import DDPMPipeline

    run = train(tmp_path, "ddpm", lora_rank=2, lora_alpha=5.0)
    model, x, t = sa.load(run), torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor(0.5)
    index = float(model.process.timestep(t.double()))
    with torch.no_grad(), model.averaged():
        merged, base = (DDPMPipeline.from_pretrained(path).unet for path in (run / "model", tmp_path / "base"))
        accepts(equal_to(merged(x, index).sample), model.predict(x, t).eps, base=base(x, index).sample)


@pytest.mark.slow
def test_the_model_card_says_what_was_trained_and_runs(tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    run = train(tmp_path, "sd")
    card = (run / "model" / "README.md").read_text()
    header, _, body = card.removeprefix("---\n").partition("---\n")
    summary = json.loads((run / "summary.json").read_text())
    said = yaml.safe_load(header)
    assert said["library_name"] == "diffusers"
    assert said["base_model"] == str(tmp_path / "base")
    assert "lora" in said["tags"]
    assert f"{summary['reward_tuned']:.4g}" in body
    assert yaml.safe_load(body.partition("```yaml\n")[2].partition("```")[0])["algorithm"]["name"] == "ddpo"
    for folder in (tmp_path / "base", run / "model"):  # its parts may be stored in different precisions
        assert f'"{folder}"' in body.replace("this folder", str(run / "model"))
    StableDiffusionPipeline.from_pretrained(tmp_path / "base").text_encoder.half().save_pretrained(
        tmp_path / "base/text_encoder"
    )
    printed = body.partition("```python\n")[2].partition("```")[0].replace("this folder", str(run / "model"))

    def follow(text: str) -> None:
        names: dict[str, Any] = {}
        exec(text, names)
        names["pipeline"]("a cat", num_inference_steps=1, guidance_scale=1.0, output_type="np")

    follow(printed)
    with pytest.raises(RuntimeError):
        follow(printed.replace(", torch_dtype=torch.float32", ""))
    assert (run / "model" / "samples.png").is_file()
    assert "samples.png" in body


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_tuner_of_a_pipeline_in_memory_is_loaded_into_its_model(tmp_path: Path) -> None:
    tuner = sa.Finetuner(
        build("sd"), reward=differentiable, algorithm=sa.DDPO(), sampler=Sampler(steps=3, grid="scheduler", guidance=3.0),
        train=sa.Train(iterations=2, batch=4, lr=0.02), prompts=PROMPTS,
    )  # fmt: skip
    list(tuner)
    tuner.save(tmp_path)
    with pytest.raises(ValueError, match=r"give the Model as it was before training: load\(path, net=\.\.\.\)"):
        sa.load(tmp_path)
    with pytest.raises(ValueError, match="net is another model than the one that was saved"):
        sa.load(tmp_path, net=build("sd_v"))

    def drawn(model: Any) -> torch.Tensor:
        call = {"n": 3, "steps": 4, "seed": 7, "guidance": 3.0, "prompts": PROMPTS, "grid": "scheduler"}
        return torch.as_tensor(sa.sample(model, **call))

    accepts(equal_to(drawn(tuner.model), 1e-6), drawn(sa.load(tmp_path, net=build("sd"))), untrained=drawn(build("sd")))
