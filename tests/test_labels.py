"""Truth: a mixture whose p(y|x) is exact, scores by autograd and of its parts, quadrature on a grid, the base itself."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from torch import nn
from twins import accepts, close, f64, same

import scoreaction as sa
from scoreaction.diffusion.labels import Labelled
from scoreaction.diffusion.mixtures import Mixture
from scoreaction.networks.labels import GAIN, LabelAdapter, Labels
from scoreaction.rewards import label as label_reward
from scoreaction.rewards import mixture_label
from scoreaction.tasks.labelled import LabelClassifier, LabelledData, averaged_down, fitted, log_loss, temperature
from scoreaction.training.confusion import Confusion, f1_scores
from scoreaction.training.label_task import LabelTask, optimum

APART = Mixture.isotropic([[2, 0], [-2, 0], [0, 2], [0, -2]], std=0.3)
OVERLAPPING = Mixture.isotropic([[0.8, 0], [-0.8, 0], [0, 1], [0, -1]], std=0.7)
NUMBERS = torch.tensor([0, 1, 0, 2])
GRID = torch.stack(torch.meshgrid(*[torch.linspace(-5, 5, 301, dtype=torch.float64)] * 2, indexing="ij"), -1).reshape(-1, 2)
NAMES = ("0", "1", "2")


def test_the_optimal_action_is_the_score_of_the_labels_own_components():
    """`s_pre + grad log p(y|x_t) = s of p(x|y)`: the gradient by autograd of the noised law's own labels."""
    process, t, x = sa.VP(), f64(0.3), torch.randn(50, 2, generator=torch.Generator().manual_seed(0)).double()
    labelled = Labelled(OVERLAPPING, NUMBERS)
    noised = Labelled(OVERLAPPING.noised(process, t), NUMBERS)
    x.requires_grad_(True)

    def action(y):
        return OVERLAPPING.score(process, x, t).detach() + torch.autograd.grad(noised.log_posterior(x)[:, y].sum(), x)[0]

    truth = labelled.conditional(1).score(process, x.detach(), t)
    close(action(1), truth, atol=1e-9, of_another_label=action(0), of_the_base=OVERLAPPING.score(process, x.detach(), t))


def test_the_optimum_of_each_label():
    """KL `E log p(y|x) - log p(y)`: log 2, 2 log 2, 2 log 2 apart; overlapping by quadrature, .443 in the prior's mean."""
    apart = [optimum(Labelled(APART, NUMBERS), y).kl_nats for y in range(3)]
    close(apart, f64([1, 2, 2]) * math.log(2), atol=1e-4, without_the_prior=[0.0, 0.0, 0.0])
    labelled = Labelled(OVERLAPPING, NUMBERS)
    law = [labelled.conditional(y).log_prob(GRID).softmax(0) for y in range(3)]
    truth = [float(p @ (labelled.conditional(y).log_prob(GRID) - OVERLAPPING.log_prob(GRID))) for y, p in enumerate(law)]
    found = [optimum(labelled, y).kl_nats for y in range(3)]
    close(found, truth, atol=0.005, of_apart=apart)
    close(float(labelled.prior @ f64(found)), 0.443, atol=0.004, unweighted=sum(found) / 3)


def total_variation(log_reward, *, y=1, beta=1.0):
    """Between `p exp(r/beta)/Z` and p(x|y), on the grid."""
    truth = Labelled(OVERLAPPING, NUMBERS).conditional(y).log_prob(GRID).softmax(0)
    return float(((OVERLAPPING.log_prob(GRID) + log_reward / beta).softmax(0) - truth).abs().sum() / 2)


def test_beta_other_than_one_and_a_classifier_too_sure_of_itself_miss_the_law():
    exact = Labelled(OVERLAPPING, NUMBERS).log_posterior(GRID)
    close([total_variation(exact[:, 1], beta=b) for b in (4, 1, 0.25)], [0.301, 0, 0.422], atol=2e-3, nothing=[0, 0, 0])
    sure = (2 * exact).log_softmax(1)[:, 1]
    close(total_variation(sure), 0.175, atol=2e-3, calibrated=total_variation(exact[:, 1]))


def drawn(n, *, seed=1):
    """Labelled samples of the overlapping mixture."""
    generator, labelled = torch.Generator().manual_seed(seed), Labelled(OVERLAPPING, NUMBERS)
    x = OVERLAPPING.sample(n, generator)
    y = labelled.log_posterior(x).exp().multinomial(1, generator=generator)[:, 0]
    return LabelledData(x.float(), y, NAMES)


@pytest.mark.slow
def test_a_fitted_classifier_leads_near_the_law_and_is_calibrated_on_the_other_half():
    data = drawn(2000)
    half, other = data.halves()
    net = fitted(half, other)
    accepts(near, total_variation(net(GRID.float())[:, 1].double()), too_sure=0.175)
    kept = net.temperature.clone()
    net.temperature.fill_(1.0)
    with torch.no_grad():
        net.net[-1].weight.mul_(2.0)
        net.net[-1].bias.mul_(2.0)
    close(float(temperature(net, other)), 2 * float(kept), atol=0.02, unchanged=float(kept))
    spoilt, net.temperature = log_loss(net, other), 2 * kept
    accepts(lambda loss: same(loss < spoilt - 0.01, True), log_loss(net, other), spoilt=spoilt)


def near(found):
    assert found < 0.06


def test_halves_share_no_sample_and_have_the_same_labels():
    half, other = drawn(400).halves()
    rows = {tuple(row) for row in half.samples.tolist()} & {tuple(row) for row in other.samples.tolist()}
    same(rows, set(), the_same_half=set(map(tuple, half.samples.tolist())))
    close((half.labels.bincount() - other.labels.bincount()).abs().max(), 0, atol=1, sorted_first=100)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.body = nn.Sequential(nn.Linear(3, 8), nn.SiLU(), nn.Linear(8, 2))

    def forward(self, x, t, cond):
        return self.body(torch.cat([x, t[:, None]], 1))


def labelled_model(rank=None):
    adapter = LabelAdapter(Net(), at="body.0", labels=["small", "large"])
    return sa.Model(
        adapter, process=sa.VP(), predicts="v", shape=(2,), lora_rank=rank, encode=adapter.encode(), null=adapter.null()
    )


@pytest.mark.parametrize("rank", [None, pytest.param(2, marks=pytest.mark.slow)])
def test_the_reference_and_samples_without_a_label_stay_the_base(rank):
    """To the bit at first; once the table alone has learned, still so without a label."""
    model, x, t = labelled_model(rank), torch.randn(4, 2), torch.full((4,), 0.4, dtype=torch.float64)
    base = sa.Model(Net(), process=sa.VP(), predicts="v", shape=(2,)).predict(x, t).x0.detach()
    cond = model.conditions(["small", "large", "small", "large"])
    without = {"label": torch.full((4,), 2)}
    table = model.net.table.vectors
    same(torch.equal(model.predict(x, t, cond).x0, base), True)
    same("table.vectors" in model.parameters, True)
    model.predict(x, t, cond).x0.square().sum().backward()
    same(bool((table.grad.abs().sum(1) > 0).all()), True)
    with torch.no_grad():
        table.add_(1.0 / GAIN)
    told = model.predict(x, t, cond).x0.detach()
    same(model.reference(x, t, cond).x0, base, of_the_policy=told)
    same(model.predict(x, t, without).x0.detach(), base, with_a_label=told)
    model.predict(x, t, cond)  # after which the module may be called by others
    same(model.net.net(x[:2], t[:2].float(), None).shape, base[:2].shape)


def test_guidance_cannot_lead_away_from_a_label():
    """What it leads away from is the pretrained model's. Twin: a negative prompt without one."""
    model = labelled_model()
    model.lead_away_from("", guidance=2.0)
    with pytest.raises(ValueError, match="sampler.negative_prompt: names a label"):
        model.lead_away_from("small", guidance=2.0)


def test_every_kind_of_layer_gets_the_vector_in_its_channels():
    def moved(layer, x):
        adapter = LabelAdapter(nn.Sequential(layer), at="0", labels=["a", "b"])
        adapter.net.forward = lambda x, t, cond: layer(x)
        with torch.no_grad():
            adapter.table.vectors.copy_(torch.arange(8.0).view(2, 4) / GAIN)
            cond = {"label": torch.tensor([1, 0, 2])}
            return adapter(x, None, cond) - layer.forward(x)

    linear, words = moved(nn.Linear(3, 4), torch.randn(3, 3)), moved(nn.Linear(3, 4), torch.randn(3, 5, 3))
    picture = moved(nn.Conv2d(3, 4, 3, padding=1), torch.randn(3, 3, 4, 4))
    truth = torch.tensor([[4.0, 5, 6, 7], [0, 1, 2, 3], [0, 0, 0, 0]])
    close(linear, truth, atol=1e-6, other=truth.flip(0))
    close(words, truth[:, None].expand(3, 5, 4), atol=1e-6, other=truth[:, None].flip(0).expand(3, 5, 4))
    close(picture, truth[:, :, None, None].expand(3, 4, 4, 4), atol=1e-6, other=truth[:, None, None, :].expand(3, 4, 4, 4))


def test_prompts_name_their_labels():
    labels = Labels(("small", "large"))
    same(labels.split("a red circle | large"), ("a red circle", 1), first=("a red circle", 0))
    same(labels.split("large"), ("", 1), no_label=("large", 2))
    same(labels.split("a red circle"), ("a red circle", 2), labelled=("a red circle", 0))
    same(labels.split(sa.Prompt("a red circle", metadata={"label": 1})), ("a red circle", 1), by_text=("a red circle", 2))
    with pytest.raises(ValueError, match=r"'larg' is no label; did you mean large"):
        labels.split("a red circle | larg")


@pytest.mark.slow
def test_the_commands_on_a_control(tmp_path, capsys):
    """Truth: the labels of the recipe. Twin: those of another run, which has none."""
    from scoreaction.cli import main

    small = ["train.iterations=1", "train.batch=16", "evaluation.n=32", "evaluation.steps=3", "sampler.steps=3"]
    run, other = tmp_path / "run", tmp_path / "other"
    assert main(["train", "ctrl", *small, "--output", str(run)]) == 0
    assert main(["train", "mixture", *small, "--output", str(other)]) == 0
    labels = [list(json.loads((folder / "summary.json").read_text()).get("by_label", {})) for folder in (run, other)]
    same(labels[0], list(NAMES), without_labels=labels[1])
    assert main(["evaluate", str(run), "--n", "32", "--steps", "3"]) == 0
    assert main(["sample", str(run), "--n", "4", "--prompt", "1"]) == 0
    assert main(["report", str(run)]) == 0
    assert "distance" in capsys.readouterr().out


def test_the_error_of_a_mean_over_labels_is_that_of_independent_measurements():
    """`sqrt(sum (p e)^2)` for shares p. Twin: their sum."""
    from scoreaction.recipes.build import build
    from scoreaction.recipes.recipe import load_recipe

    tuner = build(load_recipe("ctrl"))
    task = LabelTask.of(tuner.model, tuner.reward.reward, tuner.beta)
    assert task is not None
    found = task.figures(tuner.model, sa.Sampler(steps=2), 32, 0)
    parts = [p * own["distance_to_optimum_se"] for p, own in zip(task.prior, found["by_label"].values(), strict=True)]
    close(found["distance_to_optimum_se"], sum(part**2 for part in parts) ** 0.5, atol=1e-12, summed=sum(parts))


@pytest.mark.long
def test_a_run_comes_near_the_law_of_each_label():
    from scoreaction.recipes.build import build
    from scoreaction.recipes.recipe import load_recipe

    settings = "train.iterations=12", "train.batch=128", "evaluation.n=512", "evaluation.steps=25"
    tuner = build(load_recipe("ctrl", settings))
    task = LabelTask.of(tuner.model, tuner.reward.reward, tuner.beta)
    assert task is not None
    assert LabelTask.of(tuner.model, tuner.reward.reward, 0.5) is None
    sampler = sa.Sampler(steps=25)
    before = task.figures(tuner.model, sampler, 512, 0)["distance_to_optimum"]
    list(tuner)
    found = tuner.summary()
    close(
        found["optimum_kl_nats"],
        0.443,
        atol=0.005,
        unweighted=sum(v["optimum_kl_nats"] for v in found["by_label"].values()) / 3,
    )

    def nearer(distance):
        assert distance < 0.5 * before

    accepts(nearer, found["distance_to_optimum"], before=before)


def test_data_is_read_from_arrays_and_pictures(tmp_path):
    data = drawn(200)
    np.savez(tmp_path / "a.npz", samples=data.samples.numpy(), labels=data.labels.numpy())
    read = LabelledData.read(tmp_path / "a.npz")
    same(read.samples, data.samples, shuffled=data.samples.flip(0))
    same((read.names, read.labels.tolist()), (NAMES, data.labels.tolist()), of_texts=(("x",), data.labels.tolist()))
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 255, (40, 8, 8), dtype=np.uint8)
    with (tmp_path / "labels.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "label"])
        for i, picture in enumerate(pixels):
            Image.fromarray(picture).save(tmp_path / f"{i}.png")
            writer.writerow([f"{i}.png", "dark" if i % 2 else "bright"])
    read = LabelledData.read(tmp_path)
    close(read.samples[:, 0], pixels / 255, atol=1e-6, in_bytes=pixels)
    same((read.names, read.labels[:2].tolist()), (("bright", "dark"), [0, 1]), turned=(("dark", "bright"), [0, 1]))


def filled(*counts, shape=(2,)):
    """Zeros with so many of each label, from these numbers."""
    labels = np.concatenate([np.full(count, number) for number, count in counts])
    return {"samples": np.zeros((len(labels), *shape)), "labels": labels}


WRONG = {
    "one label": (filled((0, 50)), r"data: must have two labels or more"),
    "few": (filled((0, 45), (1, 5)), r"label '1' has 5 samples"),
    "gap": (filled((0, 40), (2, 40)), r"label '1' has 0 samples"),
    "negative": (filled((0, 40), (-1, 40)), r"from 0 on \(got -1\)"),
    "lengths": ({"samples": np.zeros((50, 2)), "labels": np.zeros(49, int)}, r"must have the same N"),
    "names": ({"x": np.zeros((50, 2))}, r"must have the arrays samples"),
    "floats": ({**filled((0, 40), (1, 40)), "labels": np.r_[np.zeros(40), np.ones(40)]}, r"labels must be names or integers"),
    "nan": ({"samples": np.full((50, 2), np.nan), "labels": np.zeros(50, int)}, r"samples must be finite"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_data_that_cannot_be_used_is_refused_by_name(wrong, tmp_path):
    arrays, said = WRONG[wrong]
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=said):
        LabelledData.read(tmp_path / "a.npz")


def test_pictures_in_bytes_are_those_in_one(tmp_path):
    """The reward sees [0, 1]. Twin: the bytes as they are."""
    pictures = np.random.default_rng(0).integers(0, 255, (60, 1, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", samples=pictures, labels=np.arange(60) % 2)
    close(LabelledData.read(tmp_path / "a.npz").samples, pictures / 255, atol=1e-6, as_they_are=pictures)
    np.savez(tmp_path / "b.npz", samples=pictures.astype(np.float32), labels=np.arange(60) % 2)
    with pytest.raises(ValueError, match=r"^data: images must have values in \[0, 1\]"):
        label_reward.build(label_reward.Config(data=tmp_path / "b.npz"))


def test_large_pictures_are_averaged_down():
    """The classifier of 64 pixels a side is that of the means of 2 x 2. Twin: every other pixel; small ones are as they are."""
    x = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    means = torch.stack([x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)]).mean(0)
    net = LabelClassifier(x, 2)
    close(net(x).detach(), net(means).detach(), atol=1e-5, subsampled=net(x[:, :, ::2, ::2]).detach())
    same(averaged_down(means), means, doubled=2 * means)


def test_a_table_of_labels_that_cannot_be_read_is_refused(tmp_path):
    """Twin: the tables of the test above, which are read."""
    for text, said in ((b"file,label\na.png\n", "both cells"), ("file,label\na.png,h\xf6\n".encode("latin-1"), "in UTF-8")):
        (tmp_path / "labels.csv").write_bytes(text)
        with pytest.raises(ValueError, match=said):
            LabelledData.read(tmp_path)


@pytest.mark.slow
def test_the_rewards(tmp_path):
    data = drawn(400)
    np.savez(tmp_path / "a.npz", samples=data.samples.numpy(), labels=data.labels.numpy())
    exact = mixture_label.build(mixture_label.Config(means=OVERLAPPING.means.tolist(), std=0.7, labels=NUMBERS.tolist()))
    x, prompts = torch.tensor([[0.8, 0.0], [0.0, -1.0]]), ["0", "2"]
    truth = Labelled(OVERLAPPING, NUMBERS).log_posterior(x.double())[[0, 1], [0, 2]]
    close(exact(x, prompts), truth, atol=1e-5, of_the_first=Labelled(OVERLAPPING, NUMBERS).log_posterior(x.double())[:, 0])
    found = label_reward.build(label_reward.Config(data=tmp_path / "a.npz"))
    judge = label_reward.build(label_reward.Config(data=tmp_path / "a.npz", judge=True, correct=True))
    close(found(x, prompts), truth, atol=0.3, turned=found(x, ["2", "0"]))
    same(judge(x, prompts).tolist(), [1.0, 1.0], turned=judge(x, ["2", "0"]).tolist())
    with pytest.raises(ValueError, match="has samples of shape"):
        found(torch.zeros(2, 3), prompts)
    with pytest.raises(ValueError, match="is no label"):
        exact(x, ["0 | 7", "1"])


def test_macro_f1_by_a_confusion_of_hand():
    """Asked / read: 3 1 0, 2 4 0, 0 0 5; F1 2/3, 8/11, 1. Twins: accuracy, precision alone, a mean that labels' sizes weigh."""
    table = torch.tensor([[3, 1, 0], [2, 4, 0], [0, 0, 5]])
    truth = f64([2 / 3, 8 / 11, 1.0])
    close(f1_scores(table), truth, atol=1e-12, recall=[3 / 4, 4 / 6, 1.0], precision=[3 / 5, 4 / 5, 1.0])
    rows = table.sum(1).double()

    class Judge(nn.Module):
        def forward(self, x):
            return torch.eye(3)[x[:, 0].long()].log()

    labels = Labels(("a", "b", "c"))
    judge = label_reward.LabelScore(Judge(), labels, (1,), judge=True, correct=True)
    held_out = {"other": sa.rewards.CountedReward(lambda x, p: x[:, 0]), "label": sa.rewards.CountedReward(judge)}
    confusion = Confusion.of(held_out)
    same(Confusion.of({"other": held_out["other"]}), None, a_judge=confusion)
    for asked, row in enumerate(table.tolist()):
        read = [number for number, count in enumerate(row) for _ in range(count)]
        confusion.add(torch.tensor(read)[:, None].float(), [labels.names[asked]] * len(read))
    same(confusion.table, table.double(), turned=table.double().T)
    found = confusion.figures()
    close(found["macro_f1"], truth.mean(), atol=1e-12, accuracy=12 / 15, weighted=rows @ truth / rows.sum())
    close([v["accuracy"] for v in found["by_label"].values()], [3 / 4, 4 / 6, 1.0], atol=1e-12, precision=[3 / 5, 4 / 5, 1])
    close([v["f1"] for v in found["by_label"].values()], truth, atol=1e-12, turned=truth.flip(0))
    empty = Confusion(judge)  # a label that is read and never asked for counts 0, one that is neither counts nothing
    empty.add(torch.tensor([[0.0], [1.0]]), ["a", "a"])
    close(empty.figures()["macro_f1"], (2 / 3 + 0) / 2, atol=1e-12, of_all_three=2 / 9, of_those_asked=2 / 3)
    same(list(empty.figures()["by_label"]), ["a"], all_labels=["a", "b", "c"])


@pytest.mark.slow
def test_a_runs_figures_by_label(tmp_path):
    """Accuracy by label has the held-out reward as its mean, and KL by label the run's. Twin: before training."""
    data = drawn(400)
    np.savez(tmp_path / "a.npz", samples=data.samples.numpy(), labels=data.labels.numpy())
    from scoreaction.recipes.build import build
    from scoreaction.recipes.recipe import load_recipe
    from scoreaction.report.run import run_tables

    path = tmp_path / "a.npz"
    settings = [f"reward={{name: label, data: {path}}}", "train.iterations=4", "train.batch=64", "evaluation.n=300"]
    judge = f"evaluation.held_out=[{{name: label, data: {path}, judge: true, correct: true}}]"
    tuner = build(load_recipe("ctrl", [*settings, judge, "sampler.steps=8", "evaluation.steps=8", "prompts=['0', '1', '2']"]))
    list(tuner)
    found = tuner.summary()
    by_label = found["by_label"]
    same(list(by_label), list(NAMES), sorted_back=[*NAMES][::-1])
    for kind, other in (("base", "tuned"), ("tuned", "base")):
        mean = sum(label[f"accuracy_{kind}"] for label in by_label.values()) / 3
        close(mean, found[f"held_out.label_{kind}"], atol=1e-6, other=found[f"held_out.label_{other}"])
        f1 = sum(label[f"f1_{kind}"] for label in by_label.values()) / 3
        close(found[f"macro_f1_{kind}"], f1, atol=1e-6, other=found[f"macro_f1_{other}"])
    kl = sum(label["kl_nats"] for label in by_label.values()) / 3
    close(kl, found["kl_nats"], rtol=0.25, atol=0, of_one=3 * kl)
    (table,) = [grid for grid in run_tables(found) if grid.title == "By label"]
    same([row[0] for row in table.rows], list(NAMES), without=[])
