"""Truth: the tilt of the base's own samples, the recipe's closed form with its modes for clusters, and the base's shares."""

import json
import math

import numpy as np
import pytest
import torch
from twins import accepts, close, f64, same

import scoreaction as sa
from scoreaction.cli import main
from scoreaction.errors import UserError
from scoreaction.recipes.build import build
from scoreaction.recipes.recipe import dump, load_recipe, resolve
from scoreaction.rewards._weighted import Part, WeightedSum
from scoreaction.rewards.keep_clusters import KeptShares, baselines_of
from scoreaction.tasks.clusters import Clusters, cluster_entropy
from scoreaction.training.clusters import cluster_figures
from scoreaction.world import World
from scoreaction.yaml_text import parse_yaml

BETA = 0.5
MEANS = f64([[2, 0], [-2, 0], [0, 2], [0, -2]])


def linear(samples, prompts):
    return samples @ samples.new_tensor([1.0, 0.5])


def drawn(n=4000, *, seed=0):
    """Samples of the recipe `mixture`'s law."""
    generator = torch.Generator().manual_seed(seed)
    which = torch.randint(4, (n,), generator=generator)
    return (MEANS[which] + 0.3 * torch.randn(n, 2, generator=generator, dtype=torch.float64)).float()


def clusters_of(n=4000, prompts=None):
    return Clusters.fit(drawn(n), 4, prompts=prompts)


def tilted(scores, labels, k=4):
    """The share of each cluster under the base's samples, weighted by `exp(r/beta)`."""
    weights = (scores.double() / BETA).softmax(0)
    return torch.zeros(k, dtype=torch.float64).index_add(0, labels, weights)


def test_the_tilt_of_the_bases_own_samples_keeps_every_share():
    """An identity, whatever the reward. Twins: the reward alone, and less each cluster's mean where spreads differ."""

    def reward(samples, prompts):
        return linear(samples, prompts) * (1 + 2 * (samples[:, 0] > 1))

    clusters = clusters_of()
    samples, labels = clusters.samples, clusters.labels
    alone = reward(samples, None)
    means = torch.stack([alone[labels == c].mean() for c in range(4)])
    kept = KeptShares(reward, clusters, BETA)
    shares = tilted(kept(samples, None), labels)
    base = clusters.counts / len(samples)
    close(shares, base, atol=1e-6, alone=tilted(alone, labels), less_means=tilted(alone - means[labels], labels))
    other = KeptShares(reward, clusters, 4 * BETA)(samples, None)
    accepts(lambda s: close(s, base, atol=1e-6, none=base + 1e-3), shares, at_another_beta=tilted(other, labels))
    same(kept.scored.queries, 2 * len(samples), asked_each_time=3 * len(samples))
    kept.beta = 4 * BETA  # of a run that takes it up again at another beta
    same(kept(samples, None), other, at_the_first=KeptShares(reward, clusters, BETA)(samples, None))


def test_the_recipes_optimum_gains_within_its_modes_alone():
    """E r = .2250 at .2250 nats, weights 1/4; the reward alone 2.0984 at 1.2286. By `l l s^2/beta` and by drawing."""
    l, s2 = f64([1.0, 0.5]), 0.09
    gained, nats = float(l @ l) * s2 / BETA, float(l @ l) * s2 / (2 * BETA**2)
    log_w = MEANS @ l / BETA
    w = log_w.softmax(0)
    alone = float(w @ (MEANS @ l)) + gained, float(w @ (4 * w).log()) + nats
    close([gained, nats, *alone], [0.2250, 0.2250, 2.0984, 1.2286], atol=5e-5, without_variance=[0, 0, 1.8734, 1.0036])
    samples, clusters = drawn(200_000, seed=3), clusters_of(20_000)
    scores = KeptShares(linear, clusters, BETA)(samples, None).double()
    weights = (scores / BETA).softmax(0)
    reward = float(weights @ linear(samples, None).double())
    kl = float(weights @ (len(weights) * weights).log())
    close([reward, kl], [0.225, 0.225], atol=0.03, of_the_reward_alone=alone)
    close(scores.div(BETA).exp().mean(), 1.0, atol=0.03, of_the_reward_alone=linear(samples, None).div(BETA).exp().mean())


def test_shares_are_kept_for_each_prompt():
    """Two prompts that reverse the reward. Twins: the baselines of all prompts together, prompts exchanged."""
    prompts = ["up", "down"] * 2000
    clusters, sign = clusters_of(prompts=prompts), torch.tensor([1.0, -1.0] * 2000)

    def reward(samples, prompts):
        return linear(samples, None) * torch.tensor([1.0 if p == "up" else -1.0 for p in prompts])

    scores = KeptShares(reward, clusters, BETA)(clusters.samples, prompts)
    together = KeptShares(lambda x, _: linear(x, _) * sign[: len(x)], clusters_of(), BETA)(clusters.samples, None)
    exchanged = reward(clusters.samples, prompts) - (reward(clusters.samples, prompts[::-1]) - scores)

    def keeps(found):
        for number in range(2):
            rows = torch.arange(number, 4000, 2)
            base = clusters.labels[rows].bincount(minlength=4) / len(rows)
            close(tilted(found[rows], clusters.labels[rows]), base, atol=1e-5, uniform=[0.4, 0.2, 0.2, 0.2])

    accepts(keeps, scores, together=together, exchanged=exchanged, alone=reward(clusters.samples, prompts))


def test_a_cluster_without_samples_of_a_prompt_gains_nothing():
    """By hand: `beta log mean exp(r/beta)`, and the best sample's reward where there is none. Twin: 0."""
    rewards, prompt, cluster = f64([1.0, 3.0, -2.0, 4.0]), torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 1, 1])
    mean = 0.5 * math.log((math.exp(2) + math.exp(6)) / 2)
    table = baselines_of(rewards, prompt, cluster, 2, 0.5)
    close(table, [[mean, -2.0], [4.0, 4.0]], atol=1e-9, of_nothing=[[mean, -2.0], [0.0, 4.0]], mean=[[2.0, -2.0], [4.0, 4.0]])


def files(folder, **more):
    clusters = clusters_of(400, prompts=more.pop("prompts", None))
    Clusters(**{**vars(clusters), **more}).write(folder / "c.npz")
    return folder / "c.npz"


SMALL = ["train.iterations=2", "train.batch=32", "evaluation.n=64", "evaluation.steps=4", "sampler.steps=4"]


def kept_recipe(path, *more, inner="{name: linear, direction: [1.0, 0.5]}"):
    return load_recipe("mixture", [f"reward={{name: keep_clusters, clusters: {path}, reward: {inner}}}", *SMALL, *more])


@pytest.mark.slow
def test_a_run_measures_shares_and_takes_the_algorithms_beta(tmp_path, monkeypatch):
    """Truth: shares of the samples in its folder. Twin: those of another model; and a run that is not given clusters."""
    path = files(tmp_path)
    tuner = build(kept_recipe(path, f"evaluation.clusters={path}", "algorithm.beta=0.25"), tmp_path / "run")
    same(tuner.reward.reward.beta, 0.25, of_the_recipe=0.5)
    same("cluster_entropy" in next(iter(tuner)), True, without="cluster_entropy" in next(iter(build(kept_recipe(path)))))
    found = tuner.summary()
    clusters = Clusters.read(path)
    shares = {}
    for kind in ("base", "tuned"):
        samples = torch.from_numpy(np.load(tmp_path / "run" / "samples" / f"{kind}.npz")["samples"])
        shares[kind] = (clusters.assign(samples).bincount(minlength=4) / 64).double()
    for kind in ("base", "tuned"):
        own = [cluster[f"share_{kind}"] for cluster in found["clusters"]]
        close(own, shares[kind], atol=1e-9, permuted=shares[kind].roll(1) + 1e-6)
        close(found[f"cluster_entropy_{kind}"], cluster_entropy(64 * shares[kind])[0], atol=1e-9, bits=2.0)
    same("optimum_cluster_entropy" in found, False, exact=True)
    monkeypatch.chdir(tmp_path)  # a relative path is of the folder in which the recipe was read, also within a reward
    recipe = kept_recipe("c.npz", "evaluation.clusters=c.npz")
    same(recipe.reward.dump()["clusters"], str(path), relative="c.npz")
    same(recipe.evaluation.clusters, path, relative="c.npz")
    same(
        resolve(parse_yaml(dump(recipe), where="here")) == recipe,
        True,
        other=resolve({**recipe.values(), "reward": "ink"}) == recipe,
    )


def test_an_exact_task_knows_the_entropy_of_its_optimum(tmp_path):
    """.3826 at beta .5, in closed form. Twin: the base's."""
    path = files(tmp_path)
    found = build(load_recipe("mixture", [f"evaluation.clusters={path}", *SMALL])).summary()
    close(found["optimum_cluster_entropy"], 0.382645, atol=0.01, base=found["cluster_entropy_base"])


@pytest.mark.parametrize("size", [2, 3])
def test_shares_are_those_of_all_processes(size):
    """Each counts its own rows, and sums are exchanged. Twin: one process's own."""
    labels = clusters_of(400).labels
    counts = [labels[rank::size].bincount(minlength=4) for rank in range(size)]

    class Summing(World):
        def reduced(self, values, how="mean"):
            assert (values, how) == (counts[self.rank].tolist(), "sum")
            return torch.stack(counts).sum(0).tolist()

    whole = cluster_figures(labels.bincount(minlength=4))
    for rank in range(size):
        same(cluster_figures(counts[rank], Summing(rank, size)), whole, own=cluster_figures(counts[rank]))


REFUSED = {
    "another beta": (["reward.beta=0.2"], r"^reward\.beta: keeps shares at 0\.2, and algorithm\.beta is 0\.5; leave it out"),
    "no beta": (["algorithm.name=ddpo"], r"^reward\.beta: the algorithm has none"),
    "a beta that moves": (["algorithm.kl_target=1.0"], r"^algorithm\.kl_target: moves beta"),
    "rounds": (["online={rounds: [8, 8]}"], r"^online: keep_clusters asks its reward apart"),
    "a gradient": (["algorithm.name=draft"], "needs its gradient"),
    "no file": (["reward.clusters=nowhere.npz"], r"^reward\.clusters: .*nowhere\.npz is not there"),
    "an unknown reward": (["reward.reward={name: inc}"], r"^reward\.reward\.name: unknown reward 'inc'; did you mean ink"),
    "an unknown key": (["reward.reward.scael=2.0"], r"^reward\.reward\.scael: unknown key; did you mean scale"),
    "no reward": (["reward.reward=null"], r"^reward\.reward: must be a mapping"),
    "no file to measure": (["evaluation.clusters=no.npz"], r"^evaluation\.clusters: .*no\.npz is not there"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_run_that_would_keep_no_shares_is_refused(case, tmp_path):
    path, (changes, line) = files(tmp_path), REFUSED[case]
    if case == "another beta":
        build(kept_recipe(path))
    with pytest.raises(ValueError, match=line) as caught:
        build(kept_recipe(path, *changes))
    assert "\n" not in str(caught.value)


def test_clusters_that_a_reward_cannot_keep_are_refused(tmp_path):
    for changes, line in (
        ({"drawn": False}, "are of data, and the shares to keep are the model's"),
        ({"features": sa.networks.features.Features("model")}, "with --features samples"),
    ):
        with pytest.raises(UserError, match=rf"^reward\.clusters: .*{line}"):
            build(kept_recipe(files(tmp_path, **changes)))
    kept = KeptShares(linear, clusters_of(400), BETA)
    with pytest.raises(ValueError, match=r"^clusters: are of samples of shape \(2,\), the model's are \(3,\)"):
        kept(torch.zeros(2, 3), None)
    with pytest.raises(ValueError, match="made with prompts or without"):
        kept(torch.zeros(2, 2), ["a", "b"])
    with pytest.raises(ValueError, match="^clusters: have no samples of the prompt 'b'"):
        KeptShares(linear, clusters_of(400, prompts=["a"] * 400), BETA)(torch.zeros(2, 2), ["a", "b"])
    with pytest.raises(ValueError, match="^beta: is the algorithm's in a run"):
        KeptShares(linear, clusters_of(400))(torch.zeros(2, 2), None)
    with pytest.raises(ValueError, match="in a sum keeps no shares"):
        sa.Finetuner(
            sa.gaussian_mixture.build(sa.gaussian_mixture.Config()), reward=WeightedSum([Part(kept, 1.0), Part(linear, 1.0)]),
            algorithm=sa.DPOK(beta=BETA), train=sa.Train(batch=8),
        )  # fmt: skip


def test_a_strangers_module_within_a_reward_is_refused(tmp_path):
    """Twin: the same recipe, trusted, whose module is then looked for."""
    text = "model: gaussian_mixture\nreward: {name: keep_clusters, clusters: c.npz, reward: {name: of_a.stranger}}\n"
    (tmp_path / "r.yaml").write_text(text + "algorithm: ddpo\n")
    with pytest.raises(UserError, match=r"^reward\.reward\.name: .* names the module of_a\.stranger, whose code would run"):
        load_recipe(str(tmp_path / "r.yaml"))
    with pytest.raises(UserError, match=r"^reward\.reward\.name: .*of_a"):
        load_recipe(str(tmp_path / "r.yaml"), trust=True)


def test_the_command(tmp_path, capsys, monkeypatch):
    """Clusters of the model's samples are its modes; data with labels say how well they agree. Twin: another seed's file."""
    monkeypatch.chdir(tmp_path)
    assert main(["cluster", "mixture", "--k", "4", "--n", "400", "evaluation.steps=10", "--output", "c.npz"]) == 0
    first = capsys.readouterr().out
    assert "4 clusters of 400 samples by kmeans" in first
    assert "clusters: c.npz" in first
    clusters = Clusters.read(tmp_path / "c.npz")
    centres = clusters.centres * clusters.scale + clusters.shift
    close(torch.cdist(centres.double(), MEANS).amin(1), [0.0] * 4, atol=0.15, permuted=torch.cdist(centres.double(), MEANS)[0])
    samples = drawn(400)
    np.savez("data.npz", samples=samples.numpy(), labels=(samples[:, 0].abs() > 1).numpy().astype(int))
    assert main(["cluster", "mixture", "--data", "data.npz", "--k", "4", "--output", "d.npz"]) == 0
    assert "purity 1.000, NMI 0.66" in capsys.readouterr().out
    same(Clusters.read(tmp_path / "d.npz").drawn, False, of_the_model=clusters.drawn)
    np.savez("two.npz", winner=np.zeros((2, 2)), loser=np.ones((2, 2)))
    for words, line in (
        (["--k", "21", "--n", "400"], "--k: must be 2 to 20, a 20th of the 400 samples (got 21)"),
        (["--features", "net", "--at", "chnage"], "--at: 'chnage' is no module of ExactPlusNet; did you mean change"),
        (["--features", "net"], "--at: net needs the name of a module"),
        (["--at", "change"], "--at: names a module, and features are not net; leave it out"),
        (["--method", "kmean"], "--method: unknown method 'kmean'; did you mean kmeans"),
        (["--features", "pixels"], "--features: must be samples, model or net (got 'pixels')"),
        (["--output", "c.txt"], "--output: c.txt must be the name of an .npz file"),
        (["--data", "nowhere.npz"], "--data: nowhere.npz is not there"),
        (["--data", "two.npz"], "--data: two.npz holds pairs; give samples"),
    ):
        assert main(["cluster", "mixture", "evaluation.steps=4", *words]) == 2
        same(capsys.readouterr().err.startswith(line), True, of_another=first.startswith(line))


@pytest.mark.slow
def test_an_unlabelled_set_is_steered_by_its_clusters(tmp_path, monkeypatch):
    """A control whose labels are clusters: samples drawn with a label are in its cluster. Twin: before training."""
    monkeypatch.chdir(tmp_path)
    assert main(["cluster", "mixture", "--k", "4", "--n", "1000", "evaluation.steps=10", "--output", "c.npz"]) == 0
    settings = [
        "model.labels=[0, 1, 2, 3]",
        "reward={name: label, data: c.npz}",
        "algorithm.beta=1.0",
        "prompts=['0', '1', '2', '3']",
    ]
    more = ["train.iterations=8", "train.batch=128", "sampler.steps=10", "evaluation.steps=10", "evaluation.n=400"]
    judge = "evaluation.held_out=[{name: label, data: c.npz, judge: true, correct: true}]"
    more += [judge, "evaluation.clusters=c.npz"]
    assert main(["train", "mixture", *settings, *more, "--output", "run"]) == 0
    found = json.loads((tmp_path / "run" / "summary.json").read_text())

    def steered(share):
        assert share > 0.5

    accepts(steered, found["held_out.label_tuned"], before=found["held_out.label_base"])
    assert main(["evaluate", "run", "--n", "64", "--steps", "4"]) == 0
    (row,) = json.loads((tmp_path / "run" / "evaluation.json").read_text())["grid"]
    close(row["cluster_entropy"], 1.1, atol=0.3, of_one=0.0)
    assert main(["report", "run"]) == 0
    page = (tmp_path / "run" / "report.html").read_text()
    same("Of 4 clusters its samples fill" in page and "By label" in page, True, without="Of 5 clusters" in page)
