"""Truth: the exact denoiser of a Gaussian, torch's own schedules, and the run that was not interrupted."""

import json
import math
import os
import signal
from unittest.mock import patch

import numpy as np
import pytest
import torch
from test_docs import ROOT, commands, snippets
from twins import accepts, close, same

import scoreaction as sa
from scoreaction.cli import main
from scoreaction.diffusion.mixtures import Mixture
from scoreaction.diffusion.predictions import from_prediction
from scoreaction.errors import UserError
from scoreaction.models import pretrained
from scoreaction.recipes.build import build
from scoreaction.recipes.pretraining import pretraining
from scoreaction.recipes.recipe import load_recipe
from scoreaction.tasks.data_files import read_data
from scoreaction.tasks.fitting import Fit, denoised_share, noisy
from scoreaction.training.pretraining import Pretrain, Pretrainer

SMALL = ["pretrain.width=8", "pretrain.depth=1", "pretrain.batch=16", "pretrain.check_every=2", "pretrain.checkpoint_every=4"]


def table(folder, n=400):
    """A Gaussian whose columns are correlated, in units of their own."""
    root = torch.tensor([[1.0, 0.0], [0.9, math.sqrt(1 - 0.81)]])
    rows = torch.randn(n, 2, generator=torch.Generator().manual_seed(3)) @ root.T * torch.tensor([5.0, 0.1]) + 7
    np.savez(folder / "rows.npz", rows=rows.numpy())
    return folder / "rows.npz"


def test_the_rate_is_that_of_torchs_schedules():
    """A warm-up of 100 batches from a hundredth, times a cosine to 0. Twin: the cosine alone."""
    for batches in (30, 250):
        net = torch.nn.Linear(1, 1)
        fitting, optimizer = Fit(net, batches=batches, lr=0.3, decay=0.9), torch.optim.AdamW(net.parameters(), lr=0.3)
        warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=min(100, batches))
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, batches)
        ours, theirs = [], []
        for i in range(batches):
            fitting.batch = i
            ours.append(fitting.rate())
            theirs.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            cosine.step()
            warmup.step()
        close(
            ours,
            theirs,
            rtol=1e-9,
            atol=1e-12,
            no_warmup=[0.15 * (1 + math.cos(math.pi * i / batches)) for i in range(batches)],
        )


def test_a_gaussian_is_denoised_as_well_as_it_can_be(tmp_path):
    """Within a few per cent of what can be known, on rows left out. Twins: the untrained network, and one of other data."""
    pretrainer = Pretrainer(Pretrain(data=table(tmp_path), width=32, depth=2, batches=250, batch=256, lr=1e-2, ema=0.98))
    before = denoised_share(pretrainer.fit.net, pretrainer.judged)
    log = list(pretrainer)
    law = Mixture(torch.ones(1), torch.zeros(1, 2), torch.tensor([[[1.0, 0.9], [0.9, 1.0]]]))
    process = pretrainer.process
    best = denoised_share(lambda x, t, cond: from_prediction(process, "v", t, law.prediction(process, x, t)), pretrainer.judged)

    def known(share):
        assert 1 - share > 0.85 * (1 - best), (share, best)

    accepts(known, pretrainer.best_loss, untrained=before, half=(1 + best) / 2)
    same(log[-1]["held_out_loss"], pretrainer.log[-1]["held_out_loss"], of_training=log[-1]["loss"])
    x = sa.sample(pretrainer.model(), n=1500, steps=25, reference=True).double()
    rows = torch.as_tensor(np.load(tmp_path / "rows.npz")["rows"]).double()
    close(torch.corrcoef((x).T)[0, 1], 0.9, atol=0.05, none=0.0)
    close(x.std(0) / rows.std(0), [1.0, 1.0], atol=0.12, raw=1 / rows.std(0))
    close((x.mean(0) - 7) / rows.std(0), [0.0, 0.0], atol=0.2, raw=-7 / rows.std(0))


def test_rows_left_out_are_never_trained_on_and_the_best_weights_stay(tmp_path):
    pretrainer = Pretrainer(Pretrain(data=table(tmp_path, 50), width=8, batches=6, batch=16, check_every=2, held_out=0.2))
    every = torch.cat([pretrainer.data, pretrainer.left_out])
    rows = torch.as_tensor(np.load(tmp_path / "rows.npz")["rows"]).double()
    same(len(pretrainer.left_out), 10, all_rows=50)
    same(len({tuple(row) for row in every.tolist()}), 50, copies=40)
    close(pretrainer.data.double().mean(0), [0.0, 0.0], atol=1e-5, of_all=pretrainer.decode.inverse(rows).mean(0))
    losses = iter([0.5, 0.2, 0.4])
    with patch("scoreaction.training.pretraining.denoised_share", lambda net, states: next(losses)):
        batches = {}
        for metrics in pretrainer:
            batches[metrics["batch"]] = {name: value.clone() for name, value in pretrainer.fit.average.state_dict().items()}
    same(pretrainer.best_batch, 4, last=6)
    name = "body.last.weight"
    same(pretrainer.model().net.state_dict()[name], batches[4][name], last=batches[6][name])


def trained(settings, stop=None, forget=()):
    """The best weights and the log of a pretraining; with `stop` it is saved and resumed after so many batches."""
    pretrainer = Pretrainer(settings)
    if stop is not None:
        for metrics in pretrainer:
            if metrics["batch"] == stop:
                break
        state, pretrainer = pretrainer.state(), Pretrainer(settings)
        own = pretrainer.state()
        pretrainer.load_state({key: own[key] if key in forget else value for key, value in state.items()})
    list(pretrainer)
    return {name: value.tolist() for name, value in pretrainer.best.state_dict().items()} | {"log": pretrainer.log}


def test_a_resumed_pretraining_is_the_whole_one_bit_for_bit(tmp_path):
    settings = Pretrain(data=table(tmp_path), width=8, batches=10, batch=16, check_every=2)
    whole = trained(settings)
    same(trained(settings, stop=5), whole, **{f"without_{key}": trained(settings, 5, (key,)) for key in ("generator", "log")})


def recipe(folder, data):
    path = folder / "own.yaml"
    path.write_text(
        f"model: {{name: pretrained, path: {folder / 'net'}}}\nreward: {{name: linear, direction: [1.0, 0.5]}}\n"
        f"algorithm: ddpo\nsampler: {{steps: 4}}\ntrain: {{iterations: 2, batch: 8}}\nevaluation: {{n: 16, steps: 4}}\n"
        f"pretrain: {{data: {data}, batches: 8}}\n"
    )
    return str(path)


LESS = {
    "train": ["train.iterations=1", "train.batch=8", "sampler.steps=3", "evaluation.n=16", "evaluation.steps=3"],
    "pretrain": [*SMALL, "pretrain.batches=8"],
    "plan": ["train.batch=8", "evaluation.n=16"],
    "doctor": ["train.batch=8", "sampler.steps=3", "--iterations", "1"],
    "steer": ["sampler.steps=3", "evaluation.steps=3", "evaluation.n=16"],
    "sample": ["--steps", "3"],
}


@pytest.mark.slow
def test_the_commands_of_the_page_run_one_after_the_other(tmp_path, monkeypatch, capsys):
    """As printed but smaller, with the recipe that is printed. Twin: those that need the model, before it is made."""
    page = ROOT / "docs" / "start_from_data.md"
    (text,) = [body for head, body in snippets(page, "yaml")]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(text)
    (tmp_path / "table.csv").write_text("".join(f"{i % 7},{i % 5}\n" for i in range(40)))
    assert main(["plan", "mine.yaml"]) == 2
    assert (
        capsys.readouterr().err
        == "model.path: runs/mine holds no pretrained model; make one with scoreaction pretrain (a relative path begins at "
        + str(tmp_path)
        + ")\n"
    )
    done = {}
    for name, *rest in [parts for parts in commands(page) if len(parts) > 1]:
        code = main([name, *rest, *LESS[name]])
        done[name] = done.get(name, 0) + 1
        assert code in ((0, 1) if name == "doctor" else (0,)), (name, rest)  # eight batches make no denoiser
    same(done, {"train": 3, "pretrain": 1, "sample": 1, "plan": 1, "doctor": 1, "steer": 1}, none={})
    assert {"pretrained.json", "weights.safetensors", "metrics.jsonl"} <= set(os.listdir("runs/mine"))
    same(len((tmp_path / "runs/mine/metrics.jsonl").read_text().splitlines()), 4, every_batch=8)
    same(np.load("runs/mine/samples.npz")["samples"].shape, (100, 2), one=(1, 2))
    model = sa.load("runs/mine")
    rows = read_data("moons", None, 32)
    close(model.decode(torch.zeros(1, 2))[0], rows.mean(0), atol=0.05, raw=[0.0, 0.0])
    capsys.readouterr()
    assert main(["pretrain", "mine.yaml"]) == 2
    assert "already holds a model" in capsys.readouterr().err
    assert main(["evaluate", "runs/mine", "--steps", "3"]) == 2
    assert "name it in a recipe" in capsys.readouterr().err


@pytest.mark.slow
def test_a_signal_leaves_a_checkpoint_and_says_how_to_go_on(tmp_path, capsys):
    """The folder is then that of a run without the signal. Twin: without --resume it is refused."""
    own = recipe(tmp_path, table(tmp_path))
    step = Fit.step

    def interrupted(fitting, loss):
        value = step(fitting, loss)
        if fitting.batch == 3:
            signal.raise_signal(signal.SIGINT)
        return value

    with patch.object(Fit, "step", interrupted):
        assert main(["pretrain", own, *SMALL]) == 130
    line = capsys.readouterr().err.splitlines()[-1]
    assert "stopped after batch 3 of 8; go on with: scoreaction pretrain" in line
    assert main(["pretrain", own, *SMALL]) == 2
    assert main(["pretrain", own, *SMALL, "pretrain.lr=1", "--resume"]) == 2
    assert "pretrain.lr" in capsys.readouterr().err
    assert main(["pretrain", own, *SMALL, "--resume"]) == 0
    assert main(["pretrain", own, *SMALL, "--output", str(tmp_path / "whole")]) == 0
    resumed, whole = ((tmp_path / name / "weights.safetensors").read_bytes() for name in ("net", "whole"))
    first = json.loads((tmp_path / "net" / "pretrained.json").read_text())["metrics"]
    same(resumed, whole, cut=whole[:-1])
    assert first["rows"] == 360


@pytest.mark.slow
def test_pictures_of_a_folder_and_of_a_file_become_a_model(tmp_path):
    """Grey ones have one channel; sides are `size`; decoded they are in [0, 1]. Twin: bytes that are not divided."""
    from PIL import Image

    generator = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(generator.integers(0, 255, (12, 20), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    grey = read_data(tmp_path, None, 8)
    same(tuple(grey.shape), (12, 1, 8, 8), colour=(12, 3, 8, 8))
    Image.fromarray(generator.integers(0, 255, (12, 20, 3), dtype=np.uint8)).save(tmp_path / "12.png")
    same(tuple(read_data(tmp_path, None, 8).shape), (13, 3, 8, 8), grey=(13, 1, 8, 8))
    pixels = generator.integers(0, 255, (12, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "pixels.npz", pixels)
    stored = read_data(tmp_path / "pixels.npz", None, 32)
    close(stored, torch.as_tensor(pixels / 255).movedim(3, 1), atol=1e-6, bytes_=stored * 255)
    pretrainer = Pretrainer(Pretrain(data=tmp_path / "pixels.npz", width=8, batches=2, batch=4, check_every=1))
    list(pretrainer)
    pretrainer.save(tmp_path / "net", pretrainer.figures(pretrainer.model()))
    model = pretrained.build(pretrained.Config(path=tmp_path / "net", lora_rank=2))
    samples = sa.sample(model, n=2, steps=2, reference=True)
    assert samples.shape == (2, 3, 8, 8)
    assert 0 <= float(samples.min()) <= float(samples.max()) <= 1
    assert 0 < len(model.parameters) < len(list(model.net.parameters()))


def test_noise_of_a_table_of_times_and_of_a_formula():
    x0, generator = torch.ones(64, 2), torch.Generator().manual_seed(0)
    t, x, v = noisy(sa.VP(), x0, generator)
    alpha, sigma = sa.VP().alpha(t)[:, None], sa.VP().sigma(t)[:, None]
    close(alpha * x - sigma * v, torch.ones(64, 2), atol=1e-6, other_sign=alpha * x + sigma * v)
    close(t.sort().values, (torch.arange(64) + 0.5) / 64, atol=1 / 64, all_at_once=torch.rand(64).double() * 0.5)


BAD = {
    "pretrain.data=nowhere.csv": "pretrain.data: nowhere.csv is not there",
    "pretrain.batches=0": "pretrain.batches: must be greater than or equal to 1",
    "pretrain.size=30": "pretrain.size: must be a multiple of 4",
    "pretrain.epochs=3": "pretrain.epochs: unknown key",
    "pretrain.held_out=0.9": "pretrain.held_out: must be less than or equal to 0.5",
    "pretrain.device=tpu": "pretrain.device: 'tpu' cannot be used here",
    "pretrain=null": "pretrain: is required, for example pretrain: {data: table.csv}",
    "model.path=5": "model.path: must be the name of a folder (got 5)",
}


@pytest.mark.parametrize("override", BAD)
def test_bad_settings_are_one_line_before_any_work(override, tmp_path, capsys):
    """Twin: without them it begins."""
    folder = tmp_path / "net"
    assert main(["pretrain", "pretrained", *SMALL, override, "--output", str(folder)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    same(lines[0].startswith(BAD[override]), True, another=any(lines[0].startswith(BAD[o]) for o in BAD if o != override))
    assert not folder.exists()
    assert pretraining("pretrained")[0].batches == 2000


def test_bad_data_and_damage_are_one_line(tmp_path):
    np.savez(tmp_path / "odd.npz", np.zeros((12, 10, 10), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"^data: pictures of 10 x 10 pixels; sides must be multiples of 4"):
        Pretrainer(Pretrain(data=tmp_path / "odd.npz"))
    np.savez(tmp_path / "loud.npz", 2 * np.ones((12, 8, 8)))
    with pytest.raises(ValueError, match=r"^data: pictures in .* must be bytes, or numbers in \[0, 1\]"):
        Pretrainer(Pretrain(data=tmp_path / "loud.npz"))
    left_out = int(torch.randperm(12, generator=torch.Generator().manual_seed(0))[0])
    np.savez(tmp_path / "flat.npz", np.stack([np.arange(12.0), np.arange(12) == left_out], 1))
    with pytest.raises(
        ValueError, match=r"^data: column 1 has one value in every row that is trained on; leave the column out"
    ):
        Pretrainer(Pretrain(data=tmp_path / "flat.npz"))
    with pytest.raises(ValueError, match=r"^data: .* has 0 pictures"):
        Pretrainer(Pretrain(data=tmp_path))
    (tmp_path / "pretrained.json").write_text("{}")
    with pytest.raises(UserError, match=r"^model.path: .* is damaged") as caught:
        build(load_recipe("pretrained", [f"model.path={tmp_path}"]))
    assert "\n" not in str(caught.value)
    assert build(load_recipe("pretrained")).model.shape == (2,)
