"""Truth: the KL between linear Gaussian chains in closed form; what steering leaves in a summary, an evaluation, a report."""

import json

import numpy as np
import pytest
from steering_chain import BETA, M0, coefficients, made, steps
from twins import accepts, close, same

import scoreaction as sa
from scoreaction.cli import main
from scoreaction.commands.steer import chosen_steering, steering_of
from scoreaction.diffusion.mixtures import Quadratic
from scoreaction.errors import UserError
from scoreaction.recipes.recipe import load_recipe
from scoreaction.rewards import CountedReward
from scoreaction.rewards._closed_form import QuadraticReward
from scoreaction.training.steering import certificate

X = QuadraticReward(Quadratic.linear([1.0]))
TINY = ["train.iterations=1", "train.batch=8", "evaluation.n=32", "evaluation.steps=6", "train.device=cpu"]


def gap(n, th1, rho=1.5):
    """KL of the policy with score `s_pre + th1 alpha` to the chain's optimum, whose start and steps are shifted."""
    chain, grid = steps(n, rho=rho), (np.arange(n, -1, -1) / n) ** rho
    slope, kl = 1.0, 0.0
    for (a, _, k, gain, _, _), t in reversed(list(zip(chain, grid, strict=False))):
        if k > 0:
            kl += (gain * th1 * coefficients(t)[0] - k * k * slope / BETA) ** 2 / (2 * k * k)
        slope *= a
    return kl + (slope / BETA) ** 2 / 2


@pytest.mark.parametrize("th1", [0.0, 1.5])
def test_the_gap_is_the_kl_to_the_optimum(th1):
    """Of the pretrained model itself, 1.4 nats, and of a policy that goes some of the way."""
    policy, sampler = made((0.0, th1)), sa.Sampler(steps=20)
    found = certificate(policy, sampler, CountedReward(X), BETA, n=2048, prompts=None, seed=0)
    truth, error = gap(20, th1), found["gap_nats_se"]
    assert 0 < error < 0.1
    close(
        found["gap_nats"],
        truth,
        atol=4 * error,
        other_policy=gap(20, th1 + 1),
        without_log_z=found["gap_nats"] - found["log_z"],
    )


def test_the_gap_needs_a_beta():
    with pytest.raises(ValueError, match=r"evaluation.certificate: the algorithm has no beta.*set evaluation.beta"):
        certificate(made(), sa.Sampler(steps=5), CountedReward(X), 0.0, n=8, prompts=None, seed=0)


def test_steering_from_python():
    black = sa.steer(made((0.0, 1.0)), lambda x, prompts: x[:, 0], n=600, beta=BETA, particles=8, steps=20, reference=True)
    same(black.figures["backward_per_sample"], 0.0, twisted=1.0)
    smooth = sa.steer(
        made(), sa.Reward(lambda x, prompts: x[:, 0], differentiable=True), n=600, beta=BETA, particles=8, steps=20
    )
    close(smooth.x0.mean(), 1.5, atol=0.25, unsteered=M0)
    close(black.x0.mean(), 1.35, atol=0.25, unsteered=M0)
    with pytest.raises(ValueError, match=r"steer.beta: smc needs it"):
        sa.steer(made(), lambda x, prompts: x[:, 0], n=4)
    with pytest.raises(Exception, match="no gradient reaches the samples"):
        sa.steer(made(), sa.Reward(lambda x, prompts: x[:, 0].detach(), differentiable=True), n=4, beta=1.0, steps=3)


@pytest.mark.slow
def test_a_run_is_measured_steered_where_its_recipe_has_the_block(tmp_path, capsys):
    run = tmp_path / "run"
    options = [*TINY, "steer.particles=4", "evaluation.certificate=true"]
    assert main(["train", "linear_quadratic", *options, "--output", str(run)]) == 0
    summary = json.loads((run / "summary.json").read_text())

    def complete(figures):
        wanted = {"reward_steered", "distance_steered", "evaluations_per_sample", "queries_per_sample", "gap_nats", "log_z"}
        assert wanted <= figures.keys()
        assert figures["evaluations_per_sample"] == 4 * 6

    accepts(complete, summary, unsteered={k: v for k, v in summary.items() if "steered" not in k})
    counted = summary["reward_queries"]
    same(counted, json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["reward_queries"], measuring_too=counted + 1)
    assert "gap" in capsys.readouterr().out

    assert main(["sample", str(run), "--n", "5", "--steer", "svdd", "--particles", "3", "--steps", "4"]) == 0
    assert "10 network evaluations, 9 reward queries a sample" in capsys.readouterr().out
    assert np.load(run / "samples.npz")["samples"].shape == (5, 1)
    assert main(["evaluate", str(run), "--steer", "smc", "--particles", "4", "--n", "8", "--steps", "3", "--certificate"]) == 0
    (cell,) = json.loads((run / "evaluation.json").read_text())["grid"]
    assert {"reward", "gap_nats", "queries_per_sample", "distance"} <= cell.keys()
    assert main(["steer", str(run), "--method", "smc", "--target", "reference", "--n", "8", "evaluation.steps=5"]) == 0
    steered = json.loads((run / "steered" / "summary.json").read_text())
    same(steered["evaluations_per_sample"], 4.0 * 5 * 2, policy_alone=4.0 * 5)
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert "gap to the optimum" in page
    assert "Steered" in page


@pytest.mark.slow
def test_the_pretrained_model_of_a_recipe_is_steered_into_a_folder(tmp_path, refused):
    folder = tmp_path / "steered"
    command = ["steer", "mixture", *TINY, "--method", "twisted", "--particles", "4", "--n", "16", "--output", str(folder)]
    assert main(command) == 0
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["reward_steered"] > summary["reward_base"]
    same(summary["queries_per_sample"], 4.0 * 7, no_start=4.0 * 6)
    assert {path.name for path in (folder / "samples").iterdir()} == {"base.npz", "base.png", "steered.npz", "steered.png"}
    assert main(["report", str(folder)]) == 0
    assert "without training" in (folder / "report.html").read_text()
    assert refused(*command).startswith("--output: ")


REFUSED = {
    "unknown method": (["--method", "svd"], "--method: must be"),
    "near a method": (["--method", "svd"], "(got 'svd'); did you mean svdd?"),
    "one particle": (["--particles", "1"], "--particles: must be greater than or equal to 2"),
    "no noise": (["--method", "svdd", "evaluation.eta=0"], "evaluation.eta: svdd has nothing to choose from"),
    "nothing to correct": (["--method", "smc", "--target", "reference"], "steer.target: the pretrained model is steered"),
    "no use": (["--method", "guidance", "--particles", "4"], "steer.particles: guidance has no use for it"),
    "misspelt": (["steer.evvery=2"], "steer.evvery: unknown key; did you mean every?"),
    "left of another method": (["steer.method=twisted", "steer.every=2", "--method", "best_of"], "steer.every: best_of has no"),
    "all of svdd": (["--method", "svdd", "steer.returns=all"], "steer.returns: "),
}


def test_a_method_that_is_none_is_named_by_the_option_it_was_given_with():
    """Twins: the other command's option, and a name that is near none, for which there is no guess."""
    recipe = load_recipe("mixture")

    def line(name, command="evaluate"):
        options = {"particles": None, "beta": None, "target": None}
        ask = steering_of if command == "evaluate" else chosen_steering
        with pytest.raises(UserError) as caught:
            ask(recipe if command == "evaluate" else None, method=name, **options)
        return str(caught.value)

    same(line("svd").partition(":")[0], "--steer", of_the_other_command=line("svd", command="steer").partition(":")[0])
    same(line("svd").endswith("did you mean svdd?"), True, far=line("xyz").endswith("?"))


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_line_before_any_work(case, tmp_path, refused):
    options, message = REFUSED[case]
    assert message in refused("steer", "mixture", *TINY, *options, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_training_refuses_a_block_that_cannot_be(tmp_path, refused):
    line = refused("train", "mixture", *TINY, "steer.method=smc", "evaluation.eta=0", "--output", tmp_path / "out")
    assert line.startswith("evaluation.eta: smc has nothing to choose from")
    assert not (tmp_path / "out").exists()
