"""Truth: what cannot be trained ends with exit code 2 and one line that names the key, the file and the remedy."""

from __future__ import annotations

import json
import logging
import re
import shutil
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from twins import accepts

from scoreaction.cli import main
from scoreaction.models import diffusers
from scoreaction.models.pipelines import folders

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("peft")

import tiny_pipelines  # noqa: E402
from test_pipelines_export import PROMPTS, SHORT  # noqa: E402

from scoreaction.models.pipelines.assemble import build_from_pipeline  # noqa: E402


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
    def act(folder: Path) -> None:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return act


def emptied(name: str) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        for path in (folder / name).iterdir():
            path.unlink()

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


def other_unet(**settings: Any) -> Callable[[Path], None]:
    return lambda folder: tiny_pipelines.unet(**settings).save_pretrained(folder / "unet")


def variants(**of: str) -> Callable[[Path], None]:
    """Weights of these components are there as a variant only."""

    def act(folder: Path) -> None:
        for name, variant in of.items():
            for path in (folder / name).glob("*.safetensors"):
                path.rename(path.with_suffix(f".{variant}.safetensors"))

    return act


VAE = "vae/diffusion_pytorch_model.safetensors"
BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "no_index": (removed("model_index.json"), "model.path: .*base holds no pipeline"),
    "no_component": (removed("vae"), "model.path: .*lacks the component vae: there is no folder"),
    "unnamed_component": (rewritten("model_index.json", unet=[None, None]), "model.path: .*lacks the component unet"),
    "no_weights": (removed(VAE), r"model.path: .*vae holds no weights \(\*.safetensors"),
    "damaged": (
        cut("unet/diffusion_pytorch_model.safetensors"),
        "model.path: .*unet/diffusion_pytorch_model.safetensors is damaged or cut short; fetch it again",
    ),
    "damaged_text": (
        cut("text_encoder/model.safetensors"),
        "model.path: .*text_encoder/model.safetensors is damaged or cut short",
    ),
    "damaged_index": (cut("model_index.json"), "model.path: .*model_index.json cannot be read as JSON; fetch it again"),
    "damaged_config": (cut("unet/config.json"), "model.path: .*unet/config.json cannot be read as JSON; fetch it again"),
    "no_object": (
        lambda folder: (folder / "vae" / "config.json").write_text("[]"),
        "model.path: .*vae/config.json holds no JSON object",
    ),
    "no_class": (
        rewritten("model_index.json", _class_name=["x"]),
        "model.path: .*its model_index.json names no pipeline class",
    ),
    "half_named": (rewritten("model_index.json", unet=["diffusers"]), "model.path: .*lacks the component unet"),
    "unknown_class": (rewritten("model_index.json", unet=["diffusers", "Foo"]), "model.path: .*base cannot be loaded: .*Foo"),
    "no_words": (
        emptied("tokenizer"),
        r"model.path: .*tokenizer holds no vocabulary \(tokenizer.json, .*fetch the folder again",
    ),
    "variants": (
        variants(unet="fp16", vae="bf16"),
        r"model.path: .*variants: (unet \(fp16\), vae \(bf16\)|vae \(bf16\), unet \(fp16\)); fetch all of one variant",
    ),
    "other_pipeline": (
        rewritten("model_index.json", _class_name="AudioLDMPipeline"),
        "model.path: a AudioLDMPipeline is not supported; take StableDiffusionPipeline",
    ),
    "inpainting": (other_unet(in_channels=9), "model.path: the network takes 9 channels and gives 4; inpainting networks"),
    "learned_variances": (
        other_unet(out_channels=8),
        "model.path: the network takes 4 channels and gives 8; .*learned variances",
    ),
    "other_weights": (rewritten("unet/config.json", in_channels=9), "model.path: .*base cannot be loaded: .*conv_in.weight"),
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
    "spacing": (
        rewritten("scheduler/scheduler_config.json", timestep_spacing="foo"),
        "model.path: the scheduler's timestep_spacing 'foo' is not known; it must be leading, trailing, linspace",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_folder_that_cannot_be_used_is_refused_in_one_line(what: str, refused: Callable[..., str]) -> None:
    break_it, pattern = BROKEN[what]
    said = refused(break_it)
    assert re.match(pattern, said), said


@pytest.mark.slow
def test_settings_that_do_not_fit_are_refused_in_one_line(refused: Callable[..., str]) -> None:
    assert refused(model={"path": "/no/such/folder"}).startswith("model.path: /no/such/folder: no such folder")
    said = refused(model={"lora_targets": ["to_q", "to_w"]})
    assert (
        said
        == "model.lora_targets: 'to_w' names no linear layer or convolution of the network; did you mean to_k or to_q or to_v?"
    ), said
    assert refused(model={"height": 17}) == "model.height: must be a multiple of 2 (got 17)"
    assert refused(model={"true_cfg": 2.0}).startswith("model.true_cfg: only a network with guidance as an input")
    assert refused(model={"dtype": "fp16"}).startswith("train.precision: gradients through fp16 weights vanish")
    said = refused(model={"dtype": "bf16"}, train={**SHORT["train"], "precision": "fp16"})
    assert said.startswith("train.precision: fp16 takes no bf16 weights; set it to bf16, or the weights' model.dtype")
    said = refused(prompts=["a cat", "a very long prompt about a cat"])
    assert said == "prompts: 'a very long prompt about a cat' has 26 tokens by tokenizer and the model reads 16; shorten it", (
        said
    )
    said = refused(sampler={"negative_prompt": "a very long prompt about a cat"})
    assert said.startswith("sampler.negative_prompt: 'a very long prompt about a cat' has 26 tokens by tokenizer and"), said
    assert refused(sampler={"steps": 2000}).startswith("sampler.steps: the scheduler's table has 1000 steps, got 2000")


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("targets", [["conv1"], ["to_q", "to_v"]])
def test_a_style_lora_is_refused_until_it_is_fused_and_then_kept(targets: list[str], rank: int | None) -> None:
    """Truth: the user's own network with its LoRA on, to rounding. Twin: the network without."""
    from peft import LoraConfig

    pipeline, bare = tiny_pipelines.build("sd"), build_from_pipeline(tiny_pipelines.build("sd"))
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=targets), adapter_name="style")
    generator = torch.Generator().manual_seed(1)
    for name, p in pipeline.unet.named_parameters():
        if "lora_" in name:
            p.data = 0.5 * torch.randn(p.shape, generator=generator)
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([400, 700]), pipeline.encode_prompt(["an owl"] * 2, "cpu", 1, False)[0]
    truth = pipeline.unet(x, t, text).sample.detach()
    for remedy in (pipeline.fuse_lora, pipeline.unload_lora_weights):
        with pytest.raises(ValueError, match=r"net: it already has an adapter \(style at .*load .*anew.*unload_lora_weights"):
            build_from_pipeline(pipeline, lora_rank=rank)
        remedy()
    model = build_from_pipeline(pipeline, lora_rank=rank)

    def same(found: torch.Tensor) -> None:
        assert float((found - truth).abs().max()) < 1e-5

    for net in (model.net, model.reference_net):
        accepts(same, net.core(x, t, text).sample.detach(), bare=bare.net.core(x, t, text).sample.detach())  # type: ignore


@pytest.mark.slow
def test_a_pipeline_serves_one_model_and_its_attention_is_not_fused() -> None:
    pipeline = tiny_pipelines.build("sd")
    model = build_from_pipeline(pipeline)
    with pytest.raises(ValueError, match="net: another model trains it already.*load it anew"):
        build_from_pipeline(pipeline)
    del model
    with pytest.raises(ValueError, match="net: it already has an adapter"):
        build_from_pipeline(pipeline, lora_rank=None)
    pipeline = tiny_pipelines.build("sd")
    pipeline.fuse_qkv_projections()
    for rank in (4, None):
        with pytest.raises(ValueError, match=r"net: its attention is fused.*load the pipeline anew"):
            build_from_pipeline(pipeline, lora_rank=rank)

    def all_learn(learns: list[bool]) -> None:
        assert all(learns)

    def gradients(*, fused: bool) -> list[bool]:
        model = build_from_pipeline(tiny_pipelines.build("sd"))
        if fused:
            model.net.core.fuse_qkv_projections()  # type: ignore[operator, union-attr]
        model.predict(torch.randn(2, 4, 8, 8), torch.tensor(0.5)).eps.sum().backward()
        return [p.grad is not None for p in model.parameters.values()]

    accepts(all_learn, gradients(fused=False), fused=gradients(fused=True))


def test_libraries_that_load_say_nothing_within_quiet() -> None:
    """The hub retries for half a minute, each time with a warning, where it cannot be reached."""
    names = ("diffusers", "transformers", "huggingface_hub.utils._http")

    def heard() -> list[bool]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with manager():
                warnings.warn("deprecated", UserWarning, stacklevel=1)
                loud = [logging.getLogger(name).isEnabledFor(logging.WARNING) for name in names]
        return [*loud, bool(caught)]

    manager: Callable[[], Any] = folders.quiet
    within = heard()
    manager = nullcontext
    accepts(lambda found: _equal(found, [False] * 4), within, outside=heard())


def test_weights_of_which_only_a_variant_is_there_are_read(tmp_path: Path) -> None:
    tiny_pipelines.build("sd").save_pretrained(tmp_path)
    whole = diffusers.load_pipeline(diffusers.Config(path=str(tmp_path)))
    variants(unet="fp16", text_encoder="fp16")(tmp_path)
    found = diffusers.load_pipeline(diffusers.Config(path=str(tmp_path)))
    other = tiny_pipelines.build("sd", seed=1)
    for name in ("unet", "text_encoder", "vae"):
        truth = whole.components[name].state_dict()

        def check(module: torch.nn.Module, truth: dict[str, torch.Tensor] = truth) -> None:
            assert all(torch.equal(value, truth[key]) for key, value in module.state_dict().items())

        accepts(check, found.components[name], other_weights=other.components[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd", "flux"])
def test_a_tokenizer_without_a_limit_has_that_of_its_encoder(name: str) -> None:
    size = {"height": 16, "width": 16} if name == "flux" else {}

    def built(limit: int) -> Any:
        pipeline = tiny_pipelines.build(name)
        pipeline.tokenizer.model_max_length = limit
        if name == "flux":
            pipeline.tokenizer_max_length = limit  # as a pipeline does when it is made
        return build_from_pipeline(pipeline, **size).conditions(["a red cat"])

    key = "pooled" if name == "flux" else "text"
    accepts(
        lambda found: _equal(found[key].tolist(), built(16)[key].tolist()),
        built(10**30),
        cut_short=built({"sd": 12, "flux": 3}[name]),
    )


def _equal(found: Any, truth: Any) -> None:
    assert found == truth


def test_a_prompt_is_as_long_as_diffusers_makes_it() -> None:
    """A learned word of two vectors is two tokens. Twin: the tokenizer alone, which counts it as one, and 16 fit."""
    pipeline = tiny_pipelines.build("sd")
    pipeline.load_textual_inversion({"<toy>": torch.randn(2, pipeline.text_encoder.config.hidden_size)})
    prompt = "a b c d e f g h i j k <toy> <toy>"
    whole = pipeline.maybe_convert_prompt(prompt, pipeline.tokenizer)
    tokens = [len(pipeline.tokenizer(text).input_ids) for text in (whole, prompt)]

    def refused_at(count: int) -> None:
        assert count > 16
        with pytest.raises(ValueError, match=f"has {count} tokens by tokenizer and the model reads 16"):
            build_from_pipeline(pipeline).conditions([prompt])

    accepts(refused_at, tokens[0], unconverted=tokens[1])
