"""Truth: the time of an alpha/sigma by hand, and weights; a run, its model, `plan` and the card have that time."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from affine import model, setting
from test_own_files import own
from torch import nn
from twins import accepts, close, f64, same

import scoreaction as sa
from scoreaction.algorithms._forward import sureness
from scoreaction.cli import main
from scoreaction.commands._plan_watch import watch_iteration
from scoreaction.diffusion.predictions import known_from, to_prediction
from scoreaction.errors import UserError
from scoreaction.recipes.recipe import load_recipe
from scoreaction.sampling.sampler import Sampler
from scoreaction.training.examples import Unread

VE = sa.VE()


class Bare(nn.Module):
    """A network whose output is what it predicts."""

    def __init__(self, size: int = 2) -> None:
        super().__init__()
        self.layer = nn.Linear(size, size)

    def forward(self, x: torch.Tensor, t: torch.Tensor, cond: Any) -> torch.Tensor:
        return self.layer(x)


class Letters(nn.Module):
    """Log-probabilities of three tokens from those that are there."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 3)

    def forward(self, x: torch.Tensor, t: torch.Tensor, cond: Any) -> torch.Tensor:
        return self.table(x)


def tuned(predicts: Any, algorithm: Any = None, **sampler: Any) -> sa.Finetuner:
    """A run of one iteration on such a network under VE."""
    made = sa.Model(Bare(), process=VE, predicts=predicts, shape=(2,))
    return sa.Finetuner(
        made, reward=sa.Reward(lambda x, _: x[:, 0], differentiable=True), algorithm=algorithm or sa.DDPO(),
        sampler=sa.Sampler(steps=3, **sampler), train=sa.Train(iterations=1, batch=4, device="cpu"),
    )  # fmt: skip


def test_the_time_is_that_of_the_ratio() -> None:
    """Twins: 0.05 under every schedule, and the same variance for the same size."""
    rate = math.log(50.0 / 0.01)
    truth = {sa.Flow(): 1 / 21, VE: math.log(0.05 / 0.01) / rate}
    for process, t in truth.items():
        found = known_from(process, "x0", 20.0)
        close(found, t, atol=6e-5, of_all=0.05, squared=known_from(process, "x0", 400.0))
    vp = f64(known_from(sa.VP(), "x0", 20.0))
    close(sa.VP().alpha(vp) / sa.VP().sigma(vp), 20.0, atol=0.1, earlier=sa.VP().alpha(vp / 2) / sa.VP().sigma(vp / 2))


def test_it_is_0_of_other_kinds_and_where_a_table_begins_later() -> None:
    """Twin: another table, whose data are clean."""
    for kind in ("eps", "score", "v", "velocity"):
        assert known_from(VE, kind, 20.0) == 0.0  # type: ignore[arg-type]
    same(known_from(sa.TableVP((0.9, 0.5, 0.1)), "x0", 20.0), 0.0, clean=known_from(sa.VP(), "x0", 20.0))


def test_a_run_and_its_model_have_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Twins: what is set stays, other kinds have none, and an algorithm has a ratio of its own; one that is not settled."""
    run = tuned("x0")
    same(run.sampler.off_below, known_from(VE, "x0", 20.0), unset=None, none=0.0)
    same(run.model.off_below, run.sampler.off_below, as_it_was=0.0)
    run.save(tmp_path)
    assert sa.load(tmp_path, net=Bare()).off_below == run.sampler.off_below
    assert run.evaluation.sampler(run.sampler).off_below == run.sampler.off_below
    same(tuned("x0", sa.NFT()).sampler.off_below, known_from(VE, "x0", 5.0), of_others=run.sampler.off_below)
    assert tuned("x0", off_below=0.0).sampler.off_below == 0.0
    assert tuned("x0", off_below=0.5).model.off_below == 0.5
    assert tuned("v").sampler.off_below == 0.0
    monkeypatch.setattr(Sampler, "settled", lambda self, model, ratio: self)
    assert tuned("x0").sampler.off_below is None


def test_where_the_policy_is_no_network_of_steps_it_is_0() -> None:
    """Truth: hypernoise refuses any other. Twin: the same network trained in its steps."""
    found = tuned("x0", sa.Hypernoise(), eta=0.0)
    same(found.sampler.off_below, 0.0, of_steps=tuned("x0").sampler.off_below)
    tokens = sa.MaskedModel(Letters(), process=sa.Masking(vocabulary=3), length=2)
    assert tokens.predicts == "x0"
    assert sa.Sampler().settled(tokens, 20.0).off_below == 0.0


def test_rows_weigh_by_what_is_predicted() -> None:
    """By hand, alpha/sigma = 3 and 1/3 of Flow. Twins: eps for x0, and all alike."""
    t = f64([0.25, 0.75])
    by_hand = {"eps": [1.0, 1 / 3], "score": [1.0, 1 / 3], "x0": [1 / 3, 1.0], "v": [1.0, 1.0], "velocity": [1.0, 1.0]}
    for kind, weights in by_hand.items():
        made = model(sa.Flow())
        made.predicts = kind  # type: ignore[assignment]
        twins = {"reversed": weights[::-1]} if weights[0] != weights[1] else {"of_eps": by_hand["eps"]}
        close(sureness(made, t), weights, atol=1e-12, **twins)


def test_under_ve_a_velocity_weighs_as_the_eps_that_it_is() -> None:
    """Truth: `dsigma/dt eps`, whose error is sigma times larger in x0, sigma = .0841 and 5.946. Twin: that of a flow."""
    made, t = model(VE), f64([0.25, 0.75])
    made.predicts = "velocity"
    close(sureness(made, t), [1.0, 0.1682], atol=1e-4, of_a_flow=[1.0, 1.0])


def test_under_ve_v_is_edms_form_of_x0() -> None:
    """Truth: `c_skip x + c_out F` of Karras et al. 2022 with data of std 1, `F = -v/sqrt(1 + sigma^2)`. Twin: of std 0.5."""
    t, x = f64([0.1, 0.5, 0.9]), torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    f = torch.randn(3, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sigma = VE.sigma(t)[:, None]

    def edm(std: float) -> torch.Tensor:
        return (std**2 * x + sigma * std * torch.sqrt(sigma**2 + std**2) * f) / (sigma**2 + std**2)

    found = to_prediction(VE, "v", x, t, -torch.sqrt(1 + sigma**2) * f).x0
    close(found, edm(1.0), atol=1e-9, of_half=edm(0.5))


def test_forward_counts_errors_of_vectors_as_those_of_eps() -> None:
    """Twins: of pictures those of x0, and what is set stays."""

    def errors(shape: tuple[int, ...], **settings: Any) -> str:
        made = sa.Model(Bare(shape[-1]), process=sa.VP(), predicts="v", shape=shape)
        where = setting(made, steps=4)
        learner: Any = sa.ScoreAction(estimator="forward", **settings).build(where)
        return learner.config.errors

    same(errors((2,)), "eps", of_pictures=errors((1, 4, 4)))
    assert errors((2,), errors="x0") == "x0"
    assert errors((1, 4, 4), errors="eps") == "eps"


def test_eps_networks_are_not_trained_where_they_say_nothing_of_the_sample() -> None:
    """Truth: sigma/alpha at t = 1, by hand. Twins: a table cut earlier, data in a box, and a network that predicts v."""

    def trained(end: float, predicts: Any = "eps", **options: Any) -> None:
        made = sa.Model(Bare(), process=sa.TableVP((1.0, 0.5, end)), predicts=predicts, shape=(2,), **options)
        sa.Finetuner(made, reward=lambda x, _: x[:, 0], algorithm=sa.DDPO(), train=sa.Train(batch=4, device="cpu"))

    with pytest.raises(ValueError, match=r"^model.process: an error of eps counts 1e\+04 times in x0 .*TableVP.cut"):
        trained(1e-8)
    trained(1.1e-6)
    trained(1e-8, project=lambda x0: x0.clamp(-1, 1))
    trained(1e-8, "v")


MODEL = """
from pydantic import BaseModel
from scoreaction.models.gaussian_mixture import build as mixture, Config

def build(config):
    made = mixture(config)
    made.predicts = PREDICTS
    return made
"""
SMALL = [
    "algorithm.name=ddpo",
    "train.iterations=1",
    "train.batch=4",
    "sampler.steps=3",
    "evaluation.n=4",
    "evaluation.steps=3",
]


@pytest.mark.slow
def test_train_plan_and_the_card_say_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Truth: `known_from`, in words. Twins: a network that predicts v, of which nothing is said, and a time that was set."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    words = f"below time {known_from(sa.VP(), 'x0', 20.0):g} (0 is data, 1 noise) the pretrained model acts"

    def texts(kind: str, *more: str) -> str:
        name = own(tmp_path, MODEL.replace("PREDICTS", repr(kind)), name=f"of_{kind}{len(more)}")
        recipe = ["mixture", f"model={{name: {name}}}", *SMALL, *more]
        assert main(["train", *recipe, "--output", name]) == 0
        assert main(["plan", *recipe]) == 0
        out = capsys.readouterr()
        return " ".join((out.out + out.err + (tmp_path / name / "model" / "README.md").read_text()).lower().split())

    def says(text: str) -> None:
        assert text.count(words) == 3

    accepts(says, texts("x0"), of_v=texts("v"), set_to_0=texts("x0", "sampler.off_below=0"))


def test_what_trains_no_steps_is_not_refused_for_its_signal() -> None:
    """Truth: the run is made. Twin: one that trains steps, on the same table."""

    def made(algorithm: Any, **more: Any) -> None:
        net = sa.Model(Bare(), process=sa.TableVP((1.0, 0.5, 1e-8)), predicts="eps", shape=(2,))
        reward = sa.Reward(lambda x, _: x[:, 0], differentiable=True)
        sampler = sa.Sampler(steps=3, eta=0.0 if algorithm.moves_noise else 1.0)
        evaluation = sa.Evaluation(eta=sampler.eta)
        sa.Finetuner(
            net, reward=reward, algorithm=algorithm, sampler=sampler, evaluation=evaluation,
            train=sa.Train(batch=4, device="cpu"), **more,
        )  # fmt: skip

    made(sa.Hypernoise())
    made(sa.DDPO(), data=Unread())
    with pytest.raises(ValueError, match="model.process"):
        made(sa.DDPO())


def test_a_plan_knows_that_x0_is_bounded() -> None:
    """Truth: what train takes. Twin: without bounds it is refused, as train does."""
    recipe = load_recipe("mixture", SMALL)

    def planned(project: Any) -> float:
        table = sa.TableVP((0.999, 0.5, 0.1, 1e-8))
        return watch_iteration(
            recipe, sa.Model(Bare(), process=table, predicts="eps", shape=(2,), project=project), gradient=False
        ).off_below

    assert planned(lambda x0: x0.clamp(-1, 1)) == 0
    with pytest.raises(UserError, match="model.process"):
        planned(None)


def test_a_student_has_the_teacher_that_acts_where_the_policy_did() -> None:
    """Truth: the model's own time. Twin: a sampler that says 0."""
    made = tuned("x0").model
    settings = sa.Student(steps=2, iterations=1, teacher_steps=4)
    below = made.off_below

    def limit(sampler: sa.Sampler) -> float:
        made.off_below = below
        return sa.StudentDistiller(made, settings, sampler).sampler.acts_from

    same(limit(sa.Sampler()), known_from(VE, "x0", 20.0), of_one_that_says_0=limit(sa.Sampler(off_below=0.0)))


def test_a_process_of_small_data_wants_the_time_itself() -> None:
    """Truth: alpha/sigma at t = 1, 25. Twin: a time that is set."""
    small = sa.VE(sigma_min=0.0002, sigma_max=0.04)

    def run(**sampler: Any) -> None:
        made = sa.Model(Bare(), process=small, predicts="x0", shape=(2,))
        sa.Finetuner(
            made, reward=lambda x, _: x[:, 0], algorithm=sa.DDPO(), sampler=sa.Sampler(steps=3, **sampler),
            train=sa.Train(batch=4, device="cpu"),
        )  # fmt: skip

    with pytest.raises(ValueError, match=r"^sampler.off_below: alpha/sigma is above 20 at all times"):
        run()
    run(off_below=0.0)


@pytest.mark.slow
def test_a_model_that_cannot_be_trained_is_steered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Truth: its samples are drawn. Twin: training on the same table, which is refused."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    ends = "    made.process = sa.TableVP((0.999, 0.5, 0.1, 1e-8))\n    return made"
    name = own(tmp_path, MODEL.replace("PREDICTS", "'eps'").replace("    return made", ends), name="without_signal")
    recipe = ["mixture", f"model={{name: {name}}}", *SMALL]
    steered = main(["steer", *recipe, "--method", "best_of", "--particles", "2", "--n", "4", "--output", "steered"])
    same(steered, 0, trained=main(["train", *recipe, "--output", "trained"]))
    assert "model.process: an error of eps" in capsys.readouterr().err
