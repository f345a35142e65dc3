"""Truth: the ODE of Gaussian data in closed form, many steps of the teacher, diffusers' own reading of a LoRA."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from twins import accepts, close, f64

import scoreaction as sa
from scoreaction.cli import main
from scoreaction.diffusion.predictions import expand, from_prediction
from scoreaction.diffusion.processes import PROCESSES
from scoreaction.diffusion.solvers import time_grid
from scoreaction.models import gaussian_mixture, linear_quadratic
from scoreaction.networks.model import Model
from scoreaction.training.distillation import endpoint_errors, follow
from scoreaction.types import Prediction

M, V = 0.3, 0.8


def end(process, x, t):
    """Where the probability-flow ODE of data N(M, V) ends: `m + sqrt(v/P) (x - alpha m)`, P = alpha^2 v + sigma^2."""
    alpha, sigma2 = process.alpha(t), process.sigma2(t)
    return M + expand(torch.sqrt(V / (alpha**2 * V + sigma2)), x) * (x - expand(alpha, x) * M)


def points(process, n=512):
    """(x, t) where the process goes, over all times."""
    generator = torch.Generator().manual_seed(5)
    t = torch.linspace(0.05, 1, n, dtype=torch.float64)
    x0 = M + V**0.5 * torch.randn(n, 1, generator=generator)
    return expand(process.alpha(t), x0) * x0 + expand(process.sigma(t), x0) * torch.randn(n, 1, generator=generator), t


def within(truth, tolerance):
    def check(value):
        assert float((value - truth).square().mean().sqrt()) < tolerance

    return check


def lq(process="vp", **settings):
    return linear_quadratic.build(linear_quadratic.Config(process=process, **settings))


@pytest.mark.slow
@pytest.mark.parametrize("process", ["vp", "flow"])
def test_a_distilled_gaussian_is_the_ode_in_closed_form(process):
    """Tolerance 0.06 (the data's spread is 0.89). Twins: the mean of x0 given x_t, which it began as, and too few steps."""
    torch.manual_seed(0)
    model = lq(process, hidden=64)
    before = lq(process, hidden=64)
    for _ in sa.Distiller(model, sa.Distill(iterations=170, paths=64, lr=5e-3)):
        pass
    for _ in sa.Distiller(before, sa.Distill(iterations=5, paths=64, lr=5e-3)):
        pass
    x, t = points(model.process)
    said = model.consistency(x, t)
    assert not said.requires_grad, "gradients reach no parameter"
    early = before.consistency(x, t)
    accepts(within(end(model.process, x, t), 0.06), said, tweedie=model.reference(x, t).x0, untrained=early)


def test_the_teacher_walks_its_ode():
    """Truth: the closed form at every point of a path. Twin: the stochastic path's law, which forgets where it began."""
    model = lq()
    times = time_grid(model.process, 16, name="log_snr")
    x = torch.randn(64, 1, generator=torch.Generator().manual_seed(0))
    states = follow(model, x, times, None, 1.0)
    truth = end(model.process, x, times[0])
    accepts(within(truth, 0.02), states[-1], forgets=states[-1].flip(0), stays=states[8])
    finer = follow(model, x, time_grid(model.process, 64, name="log_snr"), None, 1.0)
    error = lambda s: float((s[-1] - truth).abs().max())  # noqa: E731
    assert error(finer) < error(states) / 8  # second order


class Exact(nn.Module):
    """A network that says the end of the ODE."""

    def __init__(self, process):
        super().__init__()
        self.process = process

    def forward(self, x, t, cond):
        t = t.double()
        x0 = end(self.process, x, t)
        sigma = expand(self.process.sigma(t), x)
        return from_prediction(self.process, "v", t, Prediction(x0, (x - expand(self.process.alpha(t), x) * x0) / sigma))


@pytest.mark.parametrize("leap", [1, 3, None])
def test_what_is_learnt_is_consistent_at_every_leap(leap):
    """Truth: the exact consistency function is its own target. Twin: the reference's x0 in its place."""
    loss = {}
    for name in ("exact", "tweedie"):
        model = lq()
        distiller = sa.Distiller(model, sa.Distill(paths=64, steps=32, leap=leap))
        if name == "exact":
            model.consistency_net = Exact(model.process)
        loss[name] = f64(distiller._loss(*distiller._states()).item())
    close(loss["exact"], 0, atol=0.004, tweedie=loss["tweedie"])


def test_small_batches_give_the_gradient_of_the_whole():
    """Truth: one batch. Twin: the sum over batches in place of the mean."""

    def gradient(max_rows):
        distiller = sa.Distiller(plain(), sa.Distill(paths=5, steps=4, leap=2, max_rows=max_rows))
        learned = distiller._states()
        torch.nn.ParameterList(distiller.parameters.values()).requires_grad_(True)
        loss = distiller._backward(*learned)
        return torch.cat([f64([loss]), *[p.grad.double().flatten() for p in distiller.parameters.values()]])

    whole = gradient(100)
    close(gradient(7), whole, atol=1e-6, summed=3 * whole)


@pytest.mark.slow
def test_guidance_of_the_teacher_is_in_it():
    """Truth: the guided reference's own ODE at the prompt's guidance. Twin: the unguided one."""

    class Told(nn.Module):
        """x0 is what it was told: the ODE ends there."""

        def __init__(self):
            super().__init__()
            self.scale, self.process = nn.Parameter(torch.ones(2)), sa.VP()

        def forward(self, x, t, cond):
            return (self.scale * cond[:, None].to(x)).expand_as(x)

    model = Model(Told(), process=sa.VP(), predicts="x0", shape=(2,), null=torch.tensor([1.0]),
                  encode=lambda prompts: torch.tensor([float(p) for p in prompts]))  # fmt: skip
    for _ in sa.Distiller(model, sa.Distill(iterations=100, paths=8, lr=0.05), guidance=2.0, prompts=["3"]):
        pass
    found = model.consistency(torch.zeros(4, 2), f64(0.5), model.conditions(["3"] * 4))
    close(found, torch.full((4, 2), 1 + 2.0 * (3 - 1)), atol=0.1, unguided=torch.full((4, 2), 3.0))
    assert model.consistency_guidance == 2.0


@pytest.mark.long
def test_a_distilled_mixture_is_near_the_ends_of_its_ode():
    """Truth: 100 steps of the teacher. The mean of x0 given x_t, which it begins as, is a twin at every t from 0.6."""
    torch.manual_seed(0)
    model = gaussian_mixture.build(gaussian_mixture.Config())
    for _ in sa.Distiller(model, sa.Distill(iterations=220, paths=32)):
        pass
    errors = endpoint_errors(model, 512)
    for t, ours, tweedie in zip(errors["t"], errors["consistency"], errors["tweedie"], strict=True):
        if t > 0.5:
            close(ours / tweedie, 0, atol=0.4, tweedie=1.0)


# Files


def small(process="vp", **settings):
    torch.manual_seed(0)
    return gaussian_mixture.build(gaussian_mixture.Config(process=process, hidden=16, depth=2, **settings))


def plain(**options):
    """A network whose every layer matters from the start."""

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(2, 8), nn.Linear(8, 2)

        def forward(self, x, t, cond):
            return self.last(torch.tanh(self.first(x)))

    return Model(Plain(), process=sa.VP(), predicts="v", shape=(2,), **options)


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


def test_an_adapter_that_cannot_learn_is_said_so():
    with pytest.raises(ValueError, match=r"distill\.rank: .*null"):
        next(iter(sa.Distiller(small(), sa.Distill(rank=2, paths=4))))


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


def test_another_guidance_than_the_teachers_is_refused_when_the_run_is_built():
    class Conditional(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Linear(3, 2)

        def forward(self, x, t, cond):
            return self.last(torch.cat([x, cond[:, None].to(x)], 1))

    def build(guidance, prompts=("1", "2")):
        model = Model(Conditional(), process=sa.VP(), predicts="v", shape=(2,), null=torch.tensor([0.0]),
                      encode=lambda texts: torch.tensor([float(text) for text in texts]))  # fmt: skip
        sa.Distiller(model, guidance=2.0, prompts=["1"])
        return sa.Finetuner(
            model, reward=lambda x, c: x[:, 0], algorithm=sa.DDPO(), sampler=sa.Sampler(guidance=guidance), prompts=prompts
        )

    build(2.0)
    with pytest.raises(ValueError, match=r"^model\.consistency: was distilled at guidance 2, and sampler\.guidance is 3"):
        build(3.0)


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
    return Model(Wrapped(), process=PROCESSES["stable_diffusion"](), predicts="eps", shape=(4, 8, 8), **options)


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


@pytest.fixture(scope="module")
def digits():
    pytest.importorskip("diffusers")
    from scoreaction.models import digits

    return digits.build(digits.Config(consistency="shipped"))


@pytest.mark.slow
def test_the_shipped_one_of_the_digits_is_near_the_ends_of_its_ode(digits):
    """Truth: 40 steps of the guided teacher. Twin: its x0, at every t above 0.5."""
    assert digits.consistency_guidance == 2.0
    errors = endpoint_errors(digits, 20, guidance=2.0, prompts=list(range(10)), steps=40)
    for t, ours, tweedie in zip(errors["t"], errors["consistency"], errors["tweedie"], strict=True):
        if t > 0.5:
            close(ours / tweedie, 0, atol=0.45, tweedie=1.0)
        assert ours < tweedie


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


class Towards(nn.Module):
    """A network whose prediction of x0 is the prompt's condition: a path of the ODE ends there."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(()))

    def forward(self, x, t, cond):
        return self.w * cond.expand_as(x)


def test_each_state_of_a_path_has_the_prompt_of_the_path():
    model = sa.Model(
        Towards(), process=sa.VP(), predicts="x0", shape=(2,), encode=lambda p: torch.tensor([[float(x)] for x in p])
    )
    states, ends = sa.Distiller(model, sa.Distill(paths=7, steps=4), prompts=["1", "2", "3"])._states()
    close(ends[:, 0], states.prompt + 1.0, atol=1e-3, of_the_next_path=states.prompt.roll(1) + 1.0)
