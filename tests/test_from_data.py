"""Truth: the mixture of the same kernels, importance weights of the rows, and scikit-learn's leave-one-out likelihood."""

import json
import math

import numpy as np
import pytest
import torch
from twins import F64, accepts, close, f64, same

import scoreaction as sa
from scoreaction.cli import main
from scoreaction.diffusion.kernel_density import KernelDensity, bandwidth, rows_behind
from scoreaction.diffusion.mixtures import Mixture, Quadratic
from scoreaction.diffusion.rescaling import Rescale
from scoreaction.errors import UserError
from scoreaction.models import from_data
from scoreaction.recipes.build import build
from scoreaction.recipes.recipe import load_recipe
from scoreaction.report.page import write_report
from scoreaction.report.parts import exact_laws
from scoreaction.rewards._closed_form import QuadraticReward
from scoreaction.tasks.files import read_arrays
from scoreaction.training.exact_task import ExactTask

FOUR = Mixture.isotropic([[2, 0], [-2, 0], [0, 2], [0, -2]], std=0.3)
REWARD = Quadratic.linear([1.0, 0.5])


def points(n=400):
    return FOUR.sample(n, torch.Generator().manual_seed(100))


@pytest.mark.parametrize("process", [sa.VP(), sa.VE(), sa.Flow()])
def test_a_kernel_density_is_the_mixture_of_its_kernels(process):
    """Noised, and tilted by a reward that turns its kernels: prediction, score, density, optimum."""
    data, weights = points(40), torch.rand(40, generator=torch.Generator().manual_seed(1)).double()
    kernels, mixture = KernelDensity.at(data, std=0.2, weights=weights), Mixture.isotropic(data, std=0.2, weights=weights)
    turned = Quadratic(f64([[1.0, 0.3], [0.3, 2.0]]), f64([0.2, 0.1]), f64([1.0, 0.0]))
    x, t = 2 * torch.randn(7, 2, dtype=F64), torch.linspace(0.02, 1, 7, dtype=F64)
    for law, truth in ((kernels, mixture), (kernels.tilted(turned, 0.5), mixture.tilted(turned, 0.5))):
        assert isinstance(law, KernelDensity)
        other = truth.prediction(process, x, t.flip(0))
        for found, right, wrong in zip(law.prediction(process, x, t), truth.prediction(process, x, t), other, strict=True):
            close(found, right, atol=1e-9, other_times=wrong)
        close(law.score(process, x, t), truth.score(process, x, t), atol=1e-7, of_eps=law.prediction(process, x, t).eps)
        close(law.log_prob_at(process, x, t), truth.log_prob_at(process, x, t), atol=1e-9, at_0=law.log_prob(x))
        close(law.log_prob(x), truth.log_prob(x), atol=1e-9, unweighted=KernelDensity.at(data, std=0.2).log_prob(x))
        close(law.mean_reward(turned), truth.mean_reward(turned), points_alone=float(law.weights @ turned(law.means)))
    found, right = kernels.optimum(turned, 0.5), mixture.optimum(turned, 0.5)
    close([found.reward, found.kl_nats], [right.reward, right.kl_nats], half_beta=[right.reward, right.kl_nats / 2])
    sample = kernels.sample(20_000, torch.Generator().manual_seed(0))
    mean = weights @ data / weights.sum()
    close(sample.mean(0), mean, atol=0.05, unweighted=data.mean(0))


def test_gradients_reach_the_states_and_pieces_change_nothing(monkeypatch):
    law, t = KernelDensity.at(points(30), std=0.2), torch.full((5,), 0.3, dtype=F64)
    x = torch.randn(5, 2, dtype=F64, requires_grad=True)
    whole = law.prediction(sa.VP(), x, t).x0
    (grad,) = torch.autograd.grad(whole[:, 0].sum(), x)
    h = f64([1e-5, 0.0])
    difference = (law.prediction(sa.VP(), x + h, t).x0 - law.prediction(sa.VP(), x - h, t).x0)[:, 0] / 2e-5
    close(grad[:, 0], difference.detach(), atol=1e-6, none=0 * grad[:, 0])
    monkeypatch.setattr("scoreaction.diffusion.kernel_density.PIECE", 60)
    close(law.prediction(sa.VP(), x, t).x0.detach(), whole.detach(), atol=1e-12, one_row=whole[:1].detach())
    assert law.prediction(sa.VP(), x[:0], t[:0]).eps.shape == (0, 2)


def test_the_bandwidth_is_the_likeliest_by_leaving_one_out():
    """By scikit-learn's densities of all but one. Twins: of the points themselves, where each is likeliest at no width."""
    from sklearn.neighbors import KernelDensity as Theirs

    data = points(50)
    found = bandwidth(data)

    def score(h):
        every = data.numpy()
        rest = (np.delete(every, i, 0) for i in range(len(every)))
        return float(np.mean([Theirs(bandwidth=h).fit(r).score_samples(every[i : i + 1])[0] for i, r in enumerate(rest)]))

    def likeliest(h):
        assert score(h) > max(score(0.9 * h), score(1.1 * h))

    accepts(likeliest, found, narrow=0.5 * found, wide=2 * found)
    close(bandwidth(points()), 0.16, atol=0.01, of_fewer=found)


def test_the_optimum_of_the_data_is_that_of_its_rows_and_copies_are_weights(tmp_path):
    """The figures of 400 points of the mixture; of kernels without width the rows' own weights exp(r/beta)."""
    law = KernelDensity.at(points(), std=0.15)
    found = law.optimum(REWARD, 0.5)
    close([found.reward, found.kl_nats], [2.1800, 1.2555], atol=1e-3, true_law=[2.0984, 1.2286])
    table = points(30) * f64([10.0, 0.1]) + f64([50.0, -3.0])
    np.savez(tmp_path / "rows.npz", rows=torch.cat([table, table[:5]]).numpy())
    config = from_data.Config(data=tmp_path / "rows.npz", bandwidth=1e-4)
    model = from_data.build(config)
    assert len(model.law.means) == 30
    rewards, copies = REWARD(table), f64([math.log(2)] * 5 + [0.0] * 25)
    weights = torch.softmax(rewards / 5.0 + copies, 0)
    own = ExactTask.of(model, QuadraticReward(REWARD), 5.0)
    plain = torch.softmax(rewards / 5.0, 0)
    close(
        own.optimum.reward, float(weights @ rewards), rtol=1e-4, copies_lost=float(plain @ rewards), base=float(rewards.mean())
    )
    log_z = float(torch.logsumexp(rewards / 5.0 + copies, 0)) - math.log(35)
    close(own.optimum.log_z, log_z, rtol=1e-4, without_shift=log_z - float(REWARD.l @ model.decode.shift) / 5)
    close(own.optimum.kl_nats, own.optimum.reward / 5 - log_z, atol=1e-3, of_half=own.optimum.reward / 10 - log_z)


def test_the_error_of_an_optimum_by_its_rows_is_the_spread_over_other_rows():
    """Of 30 samples of 400 rows. Twins: an error of independent rows, all of one weight."""
    rewards, errors, rows = [], [], []
    for seed in range(30):
        law = KernelDensity.at(FOUR.sample(400, torch.Generator().manual_seed(seed)), std=0.15)
        best = law.optimum(REWARD, 0.5)
        behind = rows_behind(best.law.weights, REWARD(best.law.means))
        rewards.append(best.reward)
        errors.append(behind["optimum_reward_se"])
        rows.append(behind["optimum_rows"])
    spread = float(np.std(rewards))
    close(np.mean(errors), spread, rtol=0.4, atol=0.0, of_400=float(np.std(rewards)) * 85**0.5 / 20 / 2)
    close(np.mean(rows), 83.0, rtol=0.2, atol=0.0, all_rows=400.0)
    # what the width of the kernels adds: they have it as variance beside the rows' own, l^2 h^2/beta
    close(np.mean(rewards) - 2.0984, 0.15**2 * 1.25 / 0.5, atol=0.04, none=0.0)


def test_samples_have_the_units_of_the_table_and_laws_of_a_report_too(tmp_path):
    table = points(200) * f64([100.0, 0.01]) + f64([1e4, 7.0])
    (tmp_path / "t.csv").write_text("a,b\n" + "".join(f"{a},{b}\n" for a, b in table.tolist()))
    tuner = build(load_recipe("moons", [f"model.data={tmp_path / 't.csv'}", "reward.direction=[0.01, 1]"]))
    sample = sa.sample(tuner.model, n=1500, steps=25, reference=True).double()
    close(sample.mean(0) / table.std(0), table.mean(0) / table.std(0), atol=0.08, raw=[0.0, 0.0])
    close(sample.std(0) / table.std(0), [1.0, 1.0], atol=0.08, raw=1 / table.std(0))
    law, optimum = exact_laws(load_recipe("moons", [f"model.data={tmp_path / 't.csv'}"]).values(),
                              {"distance_to_optimum": 0.1, "beta": 0.5})  # fmt: skip
    close(law.means.mean(0) / table.std(0), table.mean(0) / table.std(0), atol=1e-3, raw=[0.0, 0.0])
    assert optimum is not None


@pytest.mark.slow
def test_a_run_on_a_table_comes_close_to_its_optimum(tmp_path):
    """Three quarters of the way from the base's reward to the optimum's. Twin: the base."""
    small = ["train.iterations=16", "algorithm.updates=10", "algorithm.critic_updates=8", "sampler.steps=8", "train.batch=64"]
    small += ["evaluation.n=256", "evaluation.steps=8"]
    assert main(["train", "moons", *small, "--output", str(tmp_path / "run")]) == 0
    found = json.loads((tmp_path / "run" / "summary.json").read_text())

    def near(reward):
        assert abs(reward - found["optimum_reward"]) < 0.25 * (found["optimum_reward"] - found["reward_base"])

    accepts(near, found["reward_tuned"], base=found["reward_base"])
    assert 1 < found["optimum_rows"] < 300
    page = write_report(tmp_path / "run").read_text()
    assert "rests on" in page
    assert main(["sample", str(tmp_path / "run"), "--n", "5"]) == 0
    assert sa.load(tmp_path / "run").law is not None


BAD = {
    "nan": ("a,b\n" + "1,2\n" * 10 + "nan,3\n", "1 values that are no number, the first in row 10, column 0"),
    "few": ("1,2\n2,3\n", "has 2 rows of 2 columns; at least 10 rows"),
    "words": ("a,b\n1,2\nx,3\n", "line 3 of .*leave out columns that are no numbers"),
    "ragged": ("1,2\n1,2,3\n", "line 2 of .* has 3 values, and those before it 2"),
    "constant": ("".join(f"{i},5\n" for i in range(12)), "the same value in every row of column 1; leave the column out"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_table_is_one_line_with_its_key(case, tmp_path):
    """Twin: a good one is built."""
    text, why = BAD[case]
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(UserError, match=f"^model.data: .*{why}") as caught:
        build(load_recipe("moons", [f"model.data={tmp_path / 't.csv'}"]))
    assert "\n" not in str(caught.value)
    (tmp_path / "t.csv").write_text("".join(f"{i % 5},{i % 7}\n" for i in range(40)))
    build(load_recipe("moons", [f"model.data={tmp_path / 't.csv'}"]))


def test_what_is_no_table_is_refused_before_any_work(tmp_path):
    np.savez(tmp_path / "two.npz", a=np.eye(12), b=np.eye(12))
    np.savez(tmp_path / "objects.npz", a=np.array([{}] * 12, dtype=object))
    np.savez(tmp_path / "pictures.npz", a=np.zeros((12, 4, 4), dtype=np.uint8))
    np.savez(tmp_path / "large.npz", a=np.random.default_rng(0).normal(size=(1_000_001, 2)).astype(np.float32))
    for name, why in {
        "two.npz": r"^model.array: .* has the arrays a, b; name one",
        "objects.npz": r"^model.data: .* cannot be read",
        "pictures.npz": r"^model.data: .* holds pictures.*scoreaction pretrain",
        "large.npz": r"^model.data: .*2,000,002 numbers.*scoreaction pretrain",
        "nothing.csv": r"^model.data: .* is not there; .*moons",
    }.items():
        with pytest.raises(UserError, match=why):
            build(load_recipe("moons", [f"model.data={tmp_path / name}"]))
    with pytest.raises(UserError, match=r"^model.array: .*there is no 'c'"):
        build(load_recipe("moons", [f"model.data={tmp_path / 'two.npz'}", "model.array=c"]))
    with pytest.raises(UserError, match=r"^model.bandwidth: must be auto or a positive number"):
        build(load_recipe("moons", ["model.bandwidth=-1"]))
    with pytest.raises(UserError, match=r"^reward.direction: must have 2 numbers"):
        build(load_recipe("moons", ["reward.direction=[1]"]))


def test_rescaling_takes_a_law_to_the_units_of_samples():
    law, own = Mixture.isotropic(points(5), std=0.3), Rescale(f64([2.0, 3.0]), f64([1.0, -1.0]))
    moved = own.law(law)
    x = torch.randn(6, 2, dtype=F64)
    close(moved.log_prob(own(x)), law.log_prob(x) - math.log(6), atol=1e-10, without_jacobian=law.log_prob(x))
    close(own.inverse(own(x)), x, atol=1e-12, twice=own(own(x)))


def test_a_folder_of_its_name_is_not_taken_for_a_table_that_ships(tmp_path, monkeypatch):
    """Twin: a folder of another name, which is one's own data."""
    monkeypatch.chdir(tmp_path)
    for name in ("moons", "mine"):
        (tmp_path / name).mkdir()
    data = [str(load_recipe("moons", [f"model.data={name}"]).model.config.data) for name in ("moons", "mine")]
    same(data[0], "moons", of_ones_own=data[1])
    same(data[1], str(tmp_path / "mine"), as_it_stands="mine")


def test_an_array_beside_the_named_one_is_not_read(tmp_path):
    """Objects beside it do no harm. Twin: the objects themselves."""
    np.savez(tmp_path / "a.npz", table=np.ones((3, 2)), more=np.array([{}, 1], dtype=object))
    same(list(read_arrays(tmp_path / "a.npz", "table")), ["table"], all_of_them=["table", "more"])
    with pytest.raises(ValueError, match="it has objects"):
        read_arrays(tmp_path / "a.npz", "more")
