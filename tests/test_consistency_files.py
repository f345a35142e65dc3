"""Truth: what was saved, to the bit, and diffusers' own reading of a LoRA. Files of consistency models, and their command."""

from __future__ import annotations

import json
import re

import pytest
import torch
from distilling import plain, small
from safetensors.torch import load_file, save_file
from torch import nn
from twins import accepts, close, f64

import scoreaction as sa
from scoreaction.cli import main
from scoreaction.diffusion.processes import PROCESSES
from scoreaction.models import gaussian_mixture
from scoreaction.networks.model import Model

X, T = torch.randn(6, 2, generator=torch.Generator().manual_seed(1)), f64(0.6)


@pytest.fixture
def distilled(tmp_path):
    """A small mixture with a consistency model that has moved, and its folder."""
    model = small()
    distiller = sa.Distiller(model, sa.Distill(iterations=3, paths=8, lr=0.05))
    for _ in distiller:
        pass
    return model, distiller.save(tmp_path / "made")


@pytest.mark.parametrize(("build", "rank"), [(small, None), (plain, None), (plain, 2)])
def test_saved_and_loaded_it_is_the_same_to_the_bit(build, rank, tmp_path):
    model = build()
    distiller = sa.Distiller(model, sa.Distill(iterations=3, paths=8, rank=rank, lr=0.05))
    for _ in distiller:
        pass
    folder = distiller.save(tmp_path / "made")
    assert {path.name for path in folder.iterdir()} == {"consistency.safetensors", "consistency.json"}
    truth = model.consistency(X, T)

    def check(value):
        assert torch.equal(value, truth)

    again = (
        [small(consistency=folder)] if build is small else [sa.load_consistency(plain(lora_rank=r), folder) for r in (None, 3)]
    )
    for other in again:
        accepts(check, other.consistency(X, T).detach(), reference=model.reference(X, T).x0)


def test_what_does_not_fit_is_refused_in_one_line(distilled, tmp_path):
    _, folder = distilled

    def refused(message, make=small, **settings):
        with pytest.raises(ValueError, match=message) as found:
            make(**{"consistency": folder, **settings})
        assert "\n" not in str(found.value)
        assert str(found.value).startswith("model.consistency: ")

    refused(r"another process \(VP\), and this model's is Flow; distill", process="flow")
    refused(r"shape \[2\], and this model's is \[1\]", means=[[0.0]])
    refused("made of another model", means=[[1.0, 0.0], [-1.0, 0.0]])
    refused("holds no consistency model", consistency=tmp_path / "nowhere")
    wider = lambda **settings: gaussian_mixture.build(gaussian_mixture.Config(hidden=8, depth=2, **settings))  # noqa: E731
    refused("belongs to another network; .* has shape", make=wider)
    deeper = lambda **settings: gaussian_mixture.build(gaussian_mixture.Config(hidden=16, depth=1, **settings))  # noqa: E731
    refused("belongs to another network", make=deeper)
    file = tmp_path / "broken.safetensors"
    file.write_bytes(b"\x80\x04pickle")
    refused("cannot be read as safetensors", consistency=file)
    described = json.loads((folder / "consistency.json").read_text())
    (folder / "consistency.json").write_text(json.dumps({**described, "predicts": "eps"}))
    refused("predicts eps, and this model's is v")
    (folder / "consistency.json").write_text("{}")
    refused("damaged")
    small()  # and without a path nothing is


# LCM-LoRA


class Wrapped(nn.Module):
    """A tiny Stable Diffusion UNet on our clock."""

    def __init__(self):
        from diffusers import UNet2DConditionModel

        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.unet = UNet2DConditionModel(
                sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16),
                norm_num_groups=4, cross_attention_dim=8, attention_head_dim=4,
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            ).eval()  # fmt: skip

    def forward(self, x, t, cond):
        return self.unet(x, 999 * t, encoder_hidden_states=cond).sample


LATENT, TEXT = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2)), torch.ones(2, 3, 8)


def sd(**options):
    own = {"predicts": "eps", "shape": (4, 8, 8), "encode": lambda texts: TEXT[: len(texts)]}
    return Model(Wrapped(), process=PROCESSES["stable_diffusion"](), **own, **options)


@pytest.fixture(scope="module")
def lcm(tmp_path_factory):
    """An adapter that diffusers wrote with its alpha in the header; the same in kohya's names; what diffusers draws with it."""
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    net = Wrapped()
    targets = ["to_q", "to_out.0", "conv1", "time_emb_proj", "proj_in"]
    net.unet.add_adapter(LoraConfig(r=2, lora_alpha=6, target_modules=targets, rank_pattern={"to_q": 3}), adapter_name="lcm")
    generator = torch.Generator().manual_seed(3)
    for name, p in net.unet.named_parameters():
        if "lora_" in name:
            p.data = 0.3 * torch.randn(p.shape, generator=generator)
    layers = get_peft_model_state_dict(net.unet, adapter_name="lcm")
    folder = tmp_path_factory.mktemp("lcm")
    metadata = {**net.unet.peft_config["lcm"].to_dict(), "target_modules": targets}
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers, unet_lora_adapter_metadata=metadata)
    kohya = {}
    for name, value in layers.items():
        module, part = re.fullmatch(r"(.+)\.lora_([AB])\.weight", name).groups()
        flat = "lora_unet_" + module.replace(".", "_")
        kohya[f"{flat}.lora_{'down' if part == 'A' else 'up'}.weight"] = value.contiguous()
        kohya[f"{flat}.alpha"] = torch.tensor(6.0)
    save_file(kohya, folder / "kohya.safetensors")
    return folder, net(LATENT, f64(0.4).float().expand(2), TEXT).detach()


@pytest.mark.slow
@pytest.mark.parametrize("file", ["", "pytorch_lora_weights.safetensors", "kohya.safetensors"])
def test_an_lcm_lora_says_what_it_says_in_diffusers(lcm, file):
    """Truth: the network with the adapter that diffusers saved. Twins: the base, and a scale of 1 for alpha/rank."""
    folder, truth = lcm
    model = sa.load_consistency(sd(lora_rank=2, lora_targets=["to_q", "conv2"]), folder / file)
    t = f64(0.4)
    said = lambda y: (LATENT - float(model.process.sigma(t)) * y) / float(model.process.alpha(t))  # noqa: E731
    found = model.consistency(LATENT, t, TEXT).detach()
    base = model.reference(LATENT, t, TEXT).x0.detach()
    assert torch.equal(base, sd().reference(LATENT, t, TEXT).x0)
    for name, p in model.consistency_parameters.items():
        if "lora_B" in name:
            p.data /= 3 if p.shape[1] == 2 else 2
    unscaled = model.consistency(LATENT, t, TEXT).detach()
    close(found, said(truth), atol=2e-4, base=base, unscaled=unscaled)
    assert model.consistency_guidance is None


def test_a_file_that_is_no_lora_of_this_network_is_refused(lcm, tmp_path):
    folder, _ = lcm
    tensors = load_file(folder / "pytorch_lora_weights.safetensors")
    name = next(iter(tensors))

    def refused(changed, message):
        save_file(changed, tmp_path / "changed.safetensors")
        with pytest.raises(ValueError, match=message):
            sa.load_consistency(sd(), tmp_path / "changed.safetensors")

    text = {f"text_encoder.layer.lora_{part}.weight": torch.ones(8, 8) for part in "AB"}
    refused({**tensors, **text}, "which this one does not have")
    refused({**tensors, "unet.conv_in.weight": torch.ones(2)}, "no LoRA weight")
    refused({key: value for key, value in tensors.items() if key != name}, "no whole LoRA")
    refused({**tensors, name: torch.ones(2, 5)}, "belongs to another network; .* has shape")


# The command


@pytest.mark.slow
def test_distill_writes_a_folder_that_a_recipe_takes(tmp_path, capsys):
    made, quick = tmp_path / "made", ["model.hidden=8", "distill.iterations=2", "distill.paths=4"]
    assert main(["distill", "mixture", *quick, "--output", str(made)]) == 0
    assert f"consistency: {made}" in capsys.readouterr().out
    found = json.loads((made / "consistency.json").read_text())
    assert found["process"]["name"] == "VP"
    assert found["guidance"] == 1.0
    assert found["rank"] is None
    assert set(found["metrics"]["errors"]) == {"t", "consistency", "tweedie"}
    train = [
        "algorithm.name=ddpo",
        "train.batch=8",
        "evaluation.n=16",
        "evaluation.steps=3",
        "train.iterations=1",
        "model.hidden=8",
    ]
    use = f"model.consistency={made}"
    assert main(["train", "mixture", *train, use, "--output", str(tmp_path / "run")]) == 0
    assert sa.load(tmp_path / "run").has_consistency

    def refused(*arguments):
        capsys.readouterr()
        assert main([*arguments]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        return said.strip()

    assert "made for another process (VP)" in refused("train", "mixture", *train, use, "model.process=flow")
    assert "model.consistency: nowhere" in refused("train", "mixture", "model.consistency=nowhere")
    assert "already holds a consistency model" in refused("distill", "mixture", *quick, "--output", str(made))
    assert "distill.iterration: unknown key; did you mean iterations?" in refused("distill", "mixture", "distill.iterration=1")
    assert "model.consistency: this model already has" in refused("distill", "mixture", *quick, use)
    assert "lora_targets" in refused("distill", "mixture", *quick, "distill.rank=2", "distill.targets=[attention]")
    assert "cannot be written to" in refused("distill", "mixture", *quick, "--output", str(made / "consistency.json"))


def test_the_shipped_one_is_refused_for_other_digits(tmp_path):
    import shutil

    from scoreaction.models import digits
    from scoreaction.tasks.digits.networks import shipped

    for part in ("unet", "scheduler"):
        shutil.copytree(shipped() / part, tmp_path / part)
    digits.build(digits.Config(path=tmp_path, consistency="shipped"))
    file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: 1.1 * value for name, value in load_file(file).items()}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="made of another model"):
        digits.build(digits.Config(path=tmp_path, consistency="shipped"))
