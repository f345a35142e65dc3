"""Truth: the Bayes rate of a mixture, its cells by quadrature, tilted weights in closed form, classes of written digits."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from twins import accepts, close, f64, same

import scoreaction as sa
from scoreaction.commands.cluster import agreement
from scoreaction.diffusion.mixtures import Mixture, Quadratic
from scoreaction.networks.features import Features
from scoreaction.tasks.clustering import sinkhorn
from scoreaction.tasks.clusters import Clusters, cluster_entropy
from scoreaction.tasks.labelled import LabelledData
from scoreaction.training.clusters import optimum_entropy

MEANS = f64([[2, 0], [-2, 0], [0, 2], [0, -2]])
UNEQUAL = [0.7, 0.1, 0.1, 0.1]


def mixture(std, weights=None):
    return Mixture.isotropic(MEANS.tolist(), std=std, weights=weights)


def drawn(std, *, n=20_000, weights=None, seed=0):
    """Samples of the mixture, and the component of each."""
    generator = torch.Generator().manual_seed(seed)
    component = f64(weights or [0.25] * 4).multinomial(n, replacement=True, generator=generator)
    return (MEANS[component] + std * torch.randn(n, 2, generator=generator, dtype=torch.float64)).float(), component


def nearest_mode(clusters):
    """The number of the mode that each cluster's centre is nearest to."""
    return torch.cdist((clusters.centres * clusters.scale + clusters.shift).double(), MEANS).argmin(1)


def accuracy(clusters, samples, component):
    return float((nearest_mode(clusters)[clusters.assign(samples)] == component).double().mean())


def fitted(std, *, n=4000, **more):
    weights = more.pop("weights", None)
    return Clusters.fit(drawn(std, n=n, weights=weights, seed=1)[0], 4, **more)


@pytest.mark.parametrize(("std", "truth"), [(0.3, 1.0), (0.7, 0.95712), (1.0, 0.84889)])
def test_k_means_reads_the_modes_as_well_as_can_be(std, truth):
    """Bayes: `Phi(sqrt 2/std)^2`. Twins: centres that were not moved to their samples, the rate along one axis alone."""
    phi = 0.5 * (1 + math.erf(1 / std))
    close(phi**2, truth, atol=5e-6, one_axis=truth - 0.02)
    samples, component = drawn(std)
    clusters = fitted(std)
    unmoved = Clusters(**{**vars(clusters), "centres": clusters.centres + torch.tensor([1.0, 0.5])})
    close(accuracy(clusters, samples, component), phi**2, atol=0.006, unmoved=accuracy(unmoved, samples, component))


@pytest.mark.parametrize(("std", "truth"), [(0.3, 0.08999960), (0.7, 0.45803757), (1.0, 0.79393080)])
def test_clusters_are_cells_and_not_components(std, truth):
    """A cell's variance, by quadrature: turned by 45 degrees it is a quarter plane, the law a product. Twin: a component's."""
    u = torch.linspace(0, 12, 120_001, dtype=torch.float64)
    p = sum(torch.exp(-((u - side * math.sqrt(2)) ** 2) / (2 * std**2)) for side in (1, -1))
    p[0] /= 2
    mean = p @ u / p.sum()
    close(p @ (u - mean) ** 2 / p.sum(), truth, atol=1e-7, of_the_component=std**2)
    clusters, (samples, _) = fitted(std), drawn(std, n=40_000)
    own = samples[clusters.assign(samples) == int((nearest_mode(clusters) == 0).nonzero())]
    close(own.var(0), [truth] * 2, atol=0.02 * (0.5 + truth), of_all=samples.var(0))


ENTROPIES = {10.0: 1.373921, 2.0: 1.137899, 1.0: 0.773068, 0.5: 0.382645}
LINEAR = Quadratic.linear([1.0, 0.5])


def test_the_entropy_of_the_recipes_optimum():
    """Weights `w exp(l m/beta)` in closed form. Twins: in bits, and the base's."""
    weights = {beta: mixture(0.3).optimum(LINEAR, beta).law.weights for beta in ENTROPIES}
    nats = [cluster_entropy(1e9 * w)[0] for w in weights.values()]
    close(nats, [*ENTROPIES.values()], atol=1e-6, in_bits=f64(nats) / math.log(2), of_the_base=[math.log(4)] * 4)
    close(math.exp(nats[-1]), 1.4662, atol=5e-5, in_bits=2 ** nats[-1])
    model = sa.gaussian_mixture.build(sa.gaussian_mixture.Config())
    cells = [optimum_entropy(mixture(0.3).optimum(LINEAR, beta).law, model, fitted(0.3), seed=0) for beta in (1.0, 0.5)]
    close(cells, [0.773068, 0.382645], atol=0.01, of_the_base=[math.log(4)] * 2)


def test_entropy_knows_its_error_and_no_order_of_clusters():
    """Error by drawing again; a permutation of clusters. Twins: without the root of n, other counts."""
    shares, generator = f64([0.5, 0.3, 0.15, 0.05]), torch.Generator().manual_seed(0)
    again = [
        cluster_entropy(shares.multinomial(400, replacement=True, generator=generator).bincount(minlength=4))[0]
        for _ in range(2000)
    ]
    error = cluster_entropy(400 * shares)[1]
    close(error, f64(again).std(), rtol=0.06, atol=0, of_one_sample=error * 20)
    counts = torch.tensor([9, 4, 1, 0])
    close(cluster_entropy(counts.flip(0)), cluster_entropy(counts), atol=1e-12, other=cluster_entropy(counts + 1))


def test_sinkhorn_forces_equal_shares():
    """Weights .7/.1/.1/.1 with the modes as prototypes: a sixth to a half are wrong by construction. Twin: the plain argmax."""
    samples, component = drawn(0.3, n=6000, weights=UNEQUAL)
    scores = nn.functional.normalize(samples.double(), dim=1) @ (MEANS / 2).T
    right = [(sinkhorn(scores, sharp, 200).argmax(1) == component).double().mean() for sharp in (0.05, 0.5)]
    close(right, [0.51, 0.82], atol=0.015, plain=[(scores.argmax(1) == component).double().mean()] * 2)
    noise = 0.3 * torch.randn(512, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shares = [sinkhorn(noise, 0.05, count).mean(0) for count in (200, 3)]
    close(shares[0], [1 / 16] * 16, atol=1e-6, of_three_iterations=shares[1])
    close(sinkhorn(noise, 0.05, 3).sum(1), [1.0] * 512, atol=1e-9, before_rows=noise.softmax(0).sum(1))


@pytest.mark.slow
def test_of_unequal_modes_k_means_is_right_and_equal_shares_are_not():
    samples, component = drawn(0.3, weights=UNEQUAL)
    found = {name: fitted(0.3, n=1000, weights=UNEQUAL, method=name) for name in ("kmeans", "sinkhorn")}
    rates = {name: accuracy(clusters, samples, component) for name, clusters in found.items()}
    close(rates["kmeans"], 1.0, atol=1e-3, sinkhorn=rates["sinkhorn"])
    shares = {name: clusters.counts.sort().values / 1000 for name, clusters in found.items()}
    close(shares["sinkhorn"], [0.25] * 4, atol=0.03, kmeans=shares["kmeans"])
    equal = fitted(0.3, n=1000, method="sinkhorn")
    close(accuracy(equal, *drawn(0.3)), 1.0, atol=0.02, of_unequal=rates["sinkhorn"])


def test_guidance_on_a_cell_is_exact_at_weight_one():
    """By quadrature: `s_pre + w grad log p_t(c|x)` is the score of the noised p(x|c) at w = 1, the base's at 0.

    Twin: w = 2, which should be the same law, since p(c|x0) is 0 or 1, and is not.
    """
    alpha, sigma = (float(part) for part in (sa.VP().alpha(f64(0.3)), sa.VP().sigma(f64(0.3))))
    x0, x = torch.linspace(-6, 6, 4001, dtype=torch.float64), torch.linspace(-2.5, 2.5, 41, dtype=torch.float64)
    x.requires_grad_(True)
    law = sum(torch.exp(-((x0 - m) ** 2) / (2 * 0.7**2)) for m in (-1.0, 1.2))

    def score(part):
        log = ((law * part).log() - (x[:, None] - alpha * x0) ** 2 / (2 * sigma**2)).logsumexp(1)
        return torch.autograd.grad(log.sum(), x)[0]

    cell = (x0 > 0.1).double()
    base, own = score(torch.ones_like(x0)), score(cell)
    joint = ((law * cell).log() - (x[:, None] - alpha * x0) ** 2 / (2 * sigma**2)).logsumexp(1)
    whole = (law.log() - (x[:, None] - alpha * x0) ** 2 / (2 * sigma**2)).logsumexp(1)
    posterior = torch.autograd.grad((joint - whole).sum(), x)[0]
    close(base + posterior, own, atol=1e-9, weight_two=base + 2 * posterior, weight_zero=base)
    close(base + 0 * posterior, base, atol=1e-12, weight_one=base + posterior)


@pytest.mark.slow
def test_clusters_of_handwritten_digits_agree_with_their_classes():
    """NMI .745 and purity .801 of scikit-learn's k-means on the same pixels. Twin: classes in another order."""
    pytest.importorskip("sklearn")
    from sklearn.metrics import normalized_mutual_info_score

    from scoreaction.tasks.digits.pretrain import images_and_labels

    images, labels = images_and_labels()
    clusters = Clusters.fit(images, 10)
    known = agreement(clusters.labels, labels)
    close(known["nmi"], normalized_mutual_info_score(labels, clusters.labels), atol=1e-9, purity=known["purity"])
    other = agreement(clusters.labels, labels.flip(0))
    close([known["nmi"], known["purity"]], [0.745, 0.801], atol=0.03, shuffled=[other["nmi"], other["purity"]])


def test_agreement_does_not_depend_on_names():
    """By hand: purity 3/4; NMI of renamed clusters. Twin: one sample moved."""
    labels, clusters = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 0, 1])
    found, renamed = agreement(clusters, labels), agreement(1 - clusters, labels)
    information = math.log(2) - 0.75 * (math.log(3) - 2 / 3 * math.log(2))
    truth = 2 * information / (math.log(2) + math.log(4) - 0.75 * math.log(3))
    close([found["purity"], found["nmi"]], [0.75, truth], atol=1e-12, moved=[*agreement(labels, labels).values()])
    close([*renamed.values()], [*found.values()], atol=1e-12, moved=[*agreement(labels, labels).values()])


def test_columns_of_a_table_count_alike_whatever_their_units():
    """Clusters stand apart in the first column; the second has another unit. Twin: centres that are not standardised."""
    generator = torch.Generator().manual_seed(0)
    side = torch.arange(400) % 2
    table = torch.stack([side + 0.1 * torch.randn(400, generator=generator), 1e3 * torch.randn(400, generator=generator)], 1)
    clusters = Clusters.fit(table, 2)
    raw = Clusters(**{**vars(clusters), "centres": clusters.centres * clusters.scale, "scale": torch.ones(2)})
    purity = [agreement(found.assign(table), side)["purity"] for found in (clusters, raw)]
    accepts(lambda share: same(share > 0.95, True), purity[0], not_standardised=purity[1])


class Net(nn.Module):
    """A network whose module `read.0` gives the sign of its input, large."""

    def __init__(self):
        super().__init__()
        self.read = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Tanh())
        self.out = nn.Linear(3, 2)
        nn.init.constant_(self.read[0].weight, 2.0)

    def forward(self, x, t, cond):
        return self.out(self.read(x))


def test_features_of_a_network_are_those_of_its_module_at_that_time():
    """By hand: the linear layer at `alpha x0 + sigma eps`, its mean over noises. Twins: at another time, of x0 itself."""
    model, x0 = sa.Model(Net(), process=sa.VP(), predicts="v", shape=(2,)), torch.randn(5, 2)
    generator = torch.Generator().manual_seed(0)
    eps = torch.stack([torch.randn(2, generator=generator) for _ in range(4)])

    def at(t, count=4):
        alpha, sigma = float(sa.VP().alpha(f64(t))), float(sa.VP().sigma(f64(t)))
        return (alpha * x0 + sigma * eps[:count].mean(0)) @ model.net.read[0].weight.T

    found = Features("net", at="read.0", t=0.2).of(x0, model)
    close(found, at(0.2).detach(), atol=1e-5, at_another_time=at(0.4).detach(), of_one_noise=at(0.2, 1).detach())
    alone = Features("net", at="read.0", t=0.2).of(x0[2:3], model)
    close(alone, found[2:3], atol=1e-6, of_another=found[1:2])
    same(Features("model").of(x0, model), x0, network=found)
    same(model.evaluations.forward, 0, counted=20)


def test_tokens_are_compared_one_hot():
    """Sequences that differ in as many positions are as far apart. Twin: the numbers of tokens."""
    tokens = torch.tensor([[0, 1], [2, 1], [2, 0]]).repeat(40, 1)
    x = Features(vocabulary=3).of(tokens)
    close(torch.cdist(x[:1], x[1:3]).square(), [[2, 4]], atol=1e-6, numbers=torch.cdist(tokens[:1] * 1.0, tokens[1:3] * 1.0))
    clusters = Clusters.fit(tokens, 3)
    same(clusters.counts.tolist(), [40, 40, 40], of_another=[60, 60])
    same(clusters.assign(torch.tensor([[2, 5]])).shape, (1,), refused=(0,))  # a token that the file has not


def test_a_file_holds_the_clusters_and_is_data_with_labels(tmp_path):
    """Twin: other clusters. What it holds are numbers and texts: nothing is unpickled."""
    clusters, other = fitted(0.3, n=400), fitted(1.0, n=400, seed=5)
    clusters = Clusters(**{**vars(clusters), "prompts": ["a", "b"] * 200})
    clusters.write(tmp_path / "c.npz")
    read = Clusters.read(tmp_path / "c.npz")
    samples, _ = drawn(0.3, n=500)
    same(read.assign(samples), clusters.assign(samples), others=other.assign(samples))
    same((read.prompts, read.drawn, read.features), (clusters.prompts, True, Features()), without=(None, True, Features()))
    data = LabelledData.read(tmp_path / "c.npz")
    same((data.names, data.labels.tolist()), (("0", "1", "2", "3"), clusters.labels.tolist()), others=((), []))
    with np.load(tmp_path / "c.npz", allow_pickle=False) as arrays:
        same({arrays[name].dtype.kind for name in arrays.files} - set("fiubU"), set(), pickled={"O"})


def broken(folder, **changes):
    """A file of clusters with some arrays changed or, None, left out."""
    fitted(0.3, n=400).write(folder / "c.npz")
    with np.load(folder / "c.npz") as arrays:
        kept = {**arrays, **changes}
    np.savez(folder / "b.npz", **{name: value for name, value in kept.items() if value is not None})
    return folder / "b.npz"


BROKEN = {
    "no_centres": {"centres": None},
    "too_few_offsets": {"offsets": np.zeros(3, np.float32)},
    "not_finite": {"scale": np.full(2, np.nan, np.float32)},
    "labels_beyond": {"labels": np.full(400, 4)},
    "a_label_too_few": {"labels": np.zeros(399, int)},
    "features_of_no_kind": {"features": np.array('{"kind": "pixel"}')},
    "features_that_are_no_json": {"features": np.array("{")},
    "prompts_too_few": {"prompts": np.array(["a"])},
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_holds_no_clusters_is_refused(name, tmp_path):
    Clusters.read(broken(tmp_path))
    with pytest.raises(ValueError, match=r"^clusters: .*b.npz holds no clusters; make them with scoreaction cluster"):
        Clusters.read(broken(tmp_path, **BROKEN[name]))
    with pytest.raises(ValueError, match=r"^clusters: .* is not there"):
        Clusters.read(tmp_path / "other.npz")


def test_what_has_no_such_clusters_is_refused():
    samples, model = drawn(0.3, n=400)[0], sa.Model(Net(), process=sa.VP(), predicts="v", shape=(2,))
    Clusters.fit(samples, 20)
    with pytest.raises(ValueError, match=r"^k: must be 2 to 20, a 20th of the 400 samples \(got 21\)"):
        Clusters.fit(samples, 21)
    with pytest.raises(ValueError, match="^k: there are 2 different samples only"):
        Clusters.fit(torch.tensor([[0.0], [1.0]]).repeat(100, 1), 3)
    with pytest.raises(ValueError, match="finite"):
        Clusters.fit(samples / 0, 2)
    Features("net", at="read.0").check(model)
    with pytest.raises(ValueError, match=r"^at: 'raed' is no module of Net; did you mean read"):
        Features("net", at="raed").check(model)
    with pytest.raises(ValueError, match="^at: net needs the name of a module"):
        Features("net")
    with pytest.raises(ValueError, match="^time: "):
        Features("net", at="read.0", t=0.0)


def test_a_cluster_that_stays_empty_is_refused(monkeypatch):
    """Twin: one that is empty nine times."""
    from scoreaction.tasks import clustering

    samples, right = drawn(0.3, n=400)[0], clustering._lloyd

    def empty_first(times):
        left = iter([True] * times)

        def lloyd(rows, centres):
            if next(left, False):
                raise clustering.ClusterError("empty")
            return right(rows, centres)

        monkeypatch.setattr(clustering, "_lloyd", lloyd)

    empty_first(9)
    assert len(Clusters.fit(samples, 4)) == 4
    empty_first(10)
    with pytest.raises(ValueError, match="^k: one of 4 clusters stays empty after 10 starts"):
        Clusters.fit(samples, 4)
