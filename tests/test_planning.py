"""Truth: PyTorch's own profiler of a run that happens, the counters of a real run, published numbers of parameters."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from twins import accepts, close

import scoreaction as sa
from scoreaction.cli import main
from scoreaction.config import Recipe, load_recipe
from scoreaction.live_memory import LiveMemory
from scoreaction.planning import plan

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("peft")

import tiny_pipelines  # noqa: E402

from scoreaction.models._pipelines import build_from_pipeline  # noqa: E402
from scoreaction.models._skeleton import SHIPPED, skeleton  # noqa: E402
from scoreaction.models.diffusers import Config  # noqa: E402


def profiled_peak(run: Any) -> int:
    """The most bytes that the CPU allocator had given out at once, above what there was before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def recipe_for(folder: Path, name: str, *, weights: bool = False, **values: Any) -> Recipe:
    pipeline = tiny_pipelines.build(name)
    pipeline.save_pretrained(folder / "base")
    if not weights:
        for file in (folder / "base").rglob("*.safetensors"):
            file.unlink()
    model = {"name": "diffusers", "path": str(folder / "base"), **values.pop("model", {})}
    recipe = {"model": model, "reward": {"name": "jpeg"}, "algorithm": {"name": "ddpo"}, **values}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return load_recipe(str(folder / "recipe.yaml"))


def within(truth: float, share: float):
    def check(found: float) -> None:
        assert abs(found - truth) <= share * truth, f"{found} is not within {share:.0%} of {truth}"

    return check


@pytest.mark.parametrize("checkpointing", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_planned_peak_of_an_update_is_the_profilers(tmp_path, checkpointing):
    """Pictures of 128 pixels, so that activations outweigh the odd tensor: within 10 % of what the allocator gave out."""
    model = {"height": 128, "width": 128, "gradient_checkpointing": checkpointing}
    recipe = recipe_for(
        tmp_path, "sd", model=model, prompts=["a cat"], train={"max_rows": 2}, sampler={"guidance": 3.0, "steps": 2}
    )
    planned = plan(recipe)["passes"]["an update"]
    real = build_from_pipeline(tiny_pipelines.build("sd"), **model)
    x, conditions = torch.randn(2, *real.shape), real.conditions(["a cat", "a cat"])

    def update():
        t = torch.tensor(0.5, dtype=torch.float64)
        real.predict(x, t, conditions, guidance=3.0).eps.square().sum().backward()

    update()  # what is made once, on the first call, is not the update's
    found = profiled_peak(update)
    other = skeleton(recipe.model.config.model_copy(update={"gradient_checkpointing": not checkpointing}))
    with other.mode, LiveMemory() as memory:
        rows = {name: torch.cat([value] * 2) for name, value in other.conditions.items()}
        y = other.model.predict(torch.zeros(2, *other.model.shape), torch.full((2,), 0.5).double(), rows, guidance=3.0)
        y.eps.square().sum().backward()
    accepts(within(found, 0.1), planned, other_checkpointing=memory.peak, one_row=planned / 2)


@pytest.mark.parametrize(
    ("algorithm", "gradient"), [("ddpo", False), pytest.param("score_action", True, marks=pytest.mark.slow)]
)
def test_the_planned_counts_are_those_of_a_run(tmp_path, algorithm, gradient):
    small = {"updates": 2, "rows": 3, "critic_updates": 1} if algorithm == "score_action" else {}
    recipe = recipe_for(
        tmp_path, "sd", weights=True, prompts=["a cat", "a dog"], train={"batch": 3, "max_rows": 2},
        sampler={"guidance": 3.0, "steps": 3}, algorithm={"name": algorithm, **small},
        reward={"name": "ink"} if gradient else {"name": "jpeg"},
    )  # fmt: skip
    counted = plan(recipe)["iteration"]
    tuner = sa.Finetuner(
        recipe.model.module.build(recipe.model.config),
        reward=sa.Reward(lambda samples, prompts: samples.mean((1, 2, 3)), differentiable=gradient),
        algorithm=recipe.algorithm.config, sampler=recipe.sampler, train=recipe.train, prompts=["a cat", "a dog"],
    )  # fmt: skip
    metrics = next(iter(tuner))

    def check(found: dict[str, int]) -> None:
        assert found == {key: metrics[key] for key in found}

    accepts(check, counted, unguided={**counted, "model_evaluations": counted["model_evaluations"] // 2})


@pytest.mark.parametrize(
    "name",
    [name if name in ("sd", "flux") else pytest.param(name, marks=pytest.mark.slow) for name in tiny_pipelines.PIPELINES],
)
def test_every_family_is_planned_without_weights(tmp_path, name):
    size = {"height": 16, "width": 16} if name == "flux" else {}
    prompts = None if name == "ddpm" else ["a cat"]
    small = {"batch": 2, "max_rows": 2}
    found = plan(recipe_for(tmp_path, name, model=size, prompts=prompts, train=small, sampler={"steps": 2}))
    pipeline = tiny_pipelines.build(name)
    core = pipeline.components.get("unet") or pipeline.components["transformer"]
    exact = sum(p.numel() for p in core.parameters())
    trained = sum(p.numel() for p in build_from_pipeline(pipeline, **size).parameters.values())
    component = "transformer" if name in ("sd3", "flux") else "unet"
    close(found["parameters"][component], exact, atol=0, with_the_lora=exact + trained)
    close(found["trained"], trained, atol=0, other_rank=2 * trained)
    assert found["flops"] > 0


PUBLISHED = {
    "sd15": {"unet": 859.5, "vae": 83.7, "text_encoder": 123.1},
    "sdxl": {"unet": 2567.5, "text_encoder_2": 694.7},
    "sd3": {"transformer": 2028.3, "text_encoder_3": 4762.3},
    "flux": {"transformer": 11901.4, "text_encoder_2": 4762.3},
}
"""Millions of parameters."""


@pytest.mark.slow
@pytest.mark.parametrize("path", SHIPPED)
def test_the_shipped_skeletons_have_the_published_sizes(path):
    found = skeleton(Config(path=path, dtype="bf16")).parameters
    for name, millions in PUBLISHED[SHIPPED[path]].items():
        close(found[name] / 1e6, millions, atol=0.06, other_part=found["vae"] / 1e6 + 1)


def test_a_small_model_and_the_command(tmp_path, capsys):
    assert main(["plan", "mixture"]) == 0
    said = capsys.readouterr().out
    recipe_for(tmp_path, "sd", prompts=["a cat"], train={"batch": 2}, sampler={"steps": 2})
    assert main(["plan", str(tmp_path / "recipe.yaml"), "train.iterations=7"]) == 0
    said += capsys.readouterr().out
    for part in ("fits 24 GiB: yes", "unet 64,796", "in all: 7 iterations", "how: "):
        assert part in said
    capsys.readouterr()
    shutil.rmtree(tmp_path / "base" / "vae")
    assert main(["plan", str(tmp_path / "recipe.yaml")]) == 2
    assert capsys.readouterr().err.startswith("model.path: ")
