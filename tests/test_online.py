"""Truth: the uninterrupted run bit for bit, the oracle's own count of questions, and the exact optimum of a known reward."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from commanding import train
from test_recipe import fault
from tuning import SCORE_ACTION, Net, flat, lines, own_model
from twins import accepts, close, same

import scoreaction as sa
from scoreaction.commands.evaluate import open_run
from scoreaction.networks.proxy import Proxy
from scoreaction.recipes.build import build
from scoreaction.recipes.recipe import load_recipe
from scoreaction.report.curve_figures import run_figure
from scoreaction.report.page import write_report
from scoreaction.rewards import RewardError
from scoreaction.rewards._weighted import Part, WeightedSum
from scoreaction.training.online import Online, QueryLog
from scoreaction.training.run import Run
from scoreaction.training.run_folder import read_json_lines
from scoreaction.world import World

ROUNDS = (20, 24, 30)

LOG = "queries.jsonl"


class Oracle:
    """Counts every sample it is asked about; may break down before a question."""

    differentiable = False

    def __init__(self, breaks_at=None):
        self.asked, self.breaks_at, self.calls = [], breaks_at, 0

    def __call__(self, samples, conditions):
        self.calls += 1
        if self.calls == self.breaks_at:
            raise ConnectionError("the laboratory is closed")
        self.asked += samples.tolist()
        return samples[:, 0] - 0.1 * samples[:, 1] ** 2


def tuner_with(
    oracle, *, output=None, algorithm=SCORE_ACTION, prompts=None, iterations=6, seed=0, every=100, model=None, n=16, steer=None,
    evaluation=None, **online
):  # fmt: skip
    return sa.Finetuner(
        model or own_model(prompts is not None),
        reward=oracle,
        algorithm=algorithm,
        sampler=sa.Sampler(steps=3),
        train=sa.Train(iterations=iterations, batch=16, device="cpu", seed=seed, checkpoint_every=every),
        evaluation=sa.Evaluation(n=n, steps=3, **(evaluation or {})),
        steer=steer,
        prompts=prompts,
        output=output,
        online=Online(**{"rounds": ROUNDS, "noise_std": 0.3, "members": 2, "hidden": 0} | online),
    )


def same_run(ours, theirs):
    ours, theirs = flat(ours.state()), flat(theirs.state())
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        if key != "/seconds":
            assert torch.equal(ours[key], value) if isinstance(value, torch.Tensor) else ours[key] == value, key


class Killed(BaseException):
    """Nothing in the library catches it, as nothing catches a lost power supply."""


def killed_in_fit(monkeypatch, number):
    """The process ends when the proxy is fitted for this time: answers are paid for and nothing has seen them."""
    fits, fit = [], Proxy.fit

    def dying(self, *arguments):
        fits.append(1)
        if len(fits) == number:
            raise Killed
        fit(self, *arguments)

    monkeypatch.setattr(Proxy, "fit", dying)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dies_in", "every", "hidden"), [(1, 100, 0), (2, 1, 8), (3, 100, 0)], ids=["at_once", "with_checkpoints", "without"]
)
def test_a_run_killed_between_query_and_refit_asks_nothing_twice(dies_in, every, hidden, tmp_path, monkeypatch):
    """Weights, proxy, optimisers, random state, log and metrics are those of a run that was never killed."""
    options = {"prompts": ["0", "1"], "every": every, "hidden": hidden}
    whole = tuner_with(Oracle(), output=tmp_path / "whole", **options)
    list(whole)

    def killed_and_resumed(folder, *, log_lost=False):
        oracle = Oracle()
        with monkeypatch.context() as patch:
            killed_in_fit(patch, dies_in)
            with pytest.raises(Killed):
                list(tuner_with(oracle, output=folder, **options))
        assert len(oracle.asked) == sum(ROUNDS[:dies_in])
        if log_lost:
            (folder / LOG).unlink()
        resumed = tuner_with(oracle, output=folder, **options)
        resumed.resume()
        return oracle, resumed

    oracle, resumed = killed_and_resumed(tmp_path / "cut")
    list(resumed)
    same_run(resumed, whole)
    assert (tmp_path / "cut" / LOG).read_text() == (tmp_path / "whole" / LOG).read_text()
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")

    def once(asked):
        assert len(asked) == sum(ROUNDS)

    once(oracle.asked)
    if every == 100:
        forgetful, again = killed_and_resumed(tmp_path / "forgot", log_lost=True)
        list(again)
        accepts(once, oracle.asked, without_the_log=forgetful.asked)


@pytest.mark.slow
def test_an_oracle_that_breaks_down_within_a_round_is_asked_the_rest_only(tmp_path):
    """The second round asks 16 and then 8; its second question fails, and a line of the log is torn."""
    whole = tuner_with(Oracle(), output=tmp_path / "whole")
    list(whole)
    oracle = Oracle(breaks_at=4)
    with pytest.raises(RewardError, match="the laboratory is closed"):
        list(tuner_with(oracle, output=tmp_path / "cut"))
    log = tmp_path / "cut" / LOG
    assert len(read_json_lines(log)) == 20 + 16
    with log.open("a") as file:
        file.write('{"round": 2, "prompt": nu')
    resumed = tuner_with(oracle, output=tmp_path / "cut")
    assert resumed.resume()  # of the iterations before the round
    list(resumed)
    same_run(resumed, whole)
    assert len(oracle.asked) == sum(ROUNDS)
    assert log.read_text() == (tmp_path / "whole" / LOG).read_text()
    other = tuner_with(Oracle(), seed=1)
    list(other)
    accepts(lambda tuner: same_run(tuner, whole), resumed, other_seed=other)


@pytest.mark.parametrize("breaks_at", [2, None])
@pytest.mark.slow
def test_the_first_answers_set_the_scale_of_a_sum_once(breaks_at, tmp_path):
    """The first round asks 16 and then 4; its second question fails, or the run ends before its first checkpoint."""

    def summed(oracle, name):
        return tuner_with(WeightedSum([Part(oracle, 2.0, normalise=True)]), output=tmp_path / name)

    whole = summed(Oracle(), "whole")
    list(whole)
    cut = summed(Oracle(breaks_at), "cut")
    if breaks_at is None:
        next(iterations := iter(cut))
        iterations.close()
    else:
        with pytest.raises(RewardError, match="the laboratory is closed"):
            list(cut)
    resumed = summed(Oracle(), "cut")
    assert not resumed.resume()
    list(resumed)
    same_run(resumed, whole)
    assert (tmp_path / "cut" / LOG).read_text() == (tmp_path / "whole" / LOG).read_text()
    later = summed(Oracle(), "later")
    later.reward.reward.settle(torch.tensor([[0.0], [3.0]]))
    list(later)
    accepts(lambda tuner: same_run(tuner, whole), resumed, another_scale=later)


def test_all_that_may_fail_in_one_process_alone_ends_all(tmp_path, monkeypatch):
    """Truth: a list of what a round does; each entry says whether the other processes would hear of its failure."""
    inside, done = [False], {}

    def together(self, work, *, sends=False):
        inside[0] = True
        try:
            return work()
        finally:
            inside[0] = False

    def noted(kind, name):
        own = getattr(kind, name)
        monkeypatch.setattr(kind, name, lambda *a, **k: (done.setdefault(name, inside[0]), own(*a, **k))[1])

    monkeypatch.setattr(World, "together", together)
    noted(QueryLog, "add"), noted(QueryLog, "read"), noted(Oracle, "__call__"), noted(Run, "write_recipe")
    tuner = tuner_with(Oracle(), output=tmp_path / "run")
    tuner.resume()
    next(iter(tuner))
    names = ("add", "read", "__call__", "write_recipe")
    same(done, dict.fromkeys(names, True), written_alone=done | {"add": False}, never_read={k: True for k in names[2:]})


KILL = """
import os, sys
from scoreaction.networks.proxy import Proxy
fit, fits = Proxy.fit, []
def dying(self, *arguments):
    fits.append(1)
    if len(fits) == 2: os._exit(9)
    fit(self, *arguments)
Proxy.fit = dying
from scoreaction.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_killed_process_goes_on_from_the_command_line(tmp_path):
    options = ["online.rounds=[8,8]", "online.hidden=4", "train.checkpoint_every=1"]
    assert train(tmp_path / "whole", *options) == 0
    command = ["train", str(tmp_path / "whole" / "recipe.yaml"), "--output", str(tmp_path / "cut")]
    died = subprocess.run([sys.executable, "-c", KILL, *command], env=os.environ, capture_output=True, check=False)
    assert died.returncode == 9
    assert len(read_json_lines(tmp_path / "cut" / LOG)) == 16
    assert train(tmp_path / "cut", *options, "--resume") == 0
    first, second = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "cut"))
    assert {k: v for k, v in first.items() if k != "seconds"} == {k: v for k, v in second.items() if k != "seconds"}
    assert (tmp_path / "cut" / LOG).read_text() == (tmp_path / "whole" / LOG).read_text()


def test_training_follows_the_proxy_and_the_kl_is_to_the_pretrained_model():
    tuner = tuner_with(Oracle(), optimism=1.0)
    before = sa.sample(tuner.model, n=8, steps=3, reference=True)
    *_, last = tuner
    generator = torch.Generator().manual_seed(0)
    prompt = torch.zeros(16, dtype=torch.long)
    x0 = tuner.learner.explore(prompt, tuner.learner.times(generator), generator).x0
    with torch.no_grad():
        value = tuner.learner.reward(x0, prompt)
    close(value, tuner.rounds.proxy(x0, prompt), oracle=Oracle()(x0, None))
    assert tuner.learner.reward.differentiable, "whatever the oracle is"
    by_default = {kind: tuner_with(Oracle(), proxy=kind).rounds.proxy.optimism for kind in ("ensemble", "ucb")}
    assert by_default == {"ensemble": 0.0, "ucb": 1.0}
    assert tuner.rounds.proxy.optimism == 1.0

    def unchanged(samples):
        assert torch.equal(samples, before)

    accepts(unchanged, sa.sample(tuner.model, n=8, steps=3, reference=True), policy=sa.sample(tuner.model, n=8, steps=3))
    assert last["kl_nats"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", [pytest.param("ensemble", marks=pytest.mark.long), "ucb"])
def test_few_noisy_answers_bring_the_mixture_near_its_optimum(kind):
    """Optimum: reward 2.098. 96 answers, each with noise of 0.5; the model that was asked first has reward 0."""
    few = ["train.batch=64", "train.iterations=18", "train.lr=5e-3", "sampler.steps=8", "algorithm.updates=6"]
    small = ["evaluation.n=512", "evaluation.steps=20", "algorithm.critic_updates=12"]
    online = ["online.rounds=[32,32,32]", "online.noise_std=0.5", f"online.proxy={kind}", "online.members=4", "online.hidden=0"]
    tuner = build(load_recipe("mixture", [*few, *small, *online]))
    list(tuner)
    summary = tuner.summary()

    def near(reward):
        assert 1.3 < reward < 2.6

    accepts(near, summary["reward_tuned"], base=summary["reward_base"])
    assert summary["reward_queries"] == 96
    assert summary["optimum_reward"] == pytest.approx(2.098, abs=1e-3), "of the oracle, not of the proxy"


@pytest.mark.parametrize("algorithm", [sa.DDPO(), sa.DPOK(), SCORE_ACTION.model_copy(update={"estimator": "likelihood_ratio"})])
def test_any_trainer_may_follow(algorithm):
    tuner = tuner_with(Oracle(), algorithm=algorithm, proxy="ucb", iterations=3)
    rounds = [metrics["round"] for metrics in tuner]
    one = tuner_with(Oracle(), algorithm=algorithm, proxy="ucb", iterations=3, rounds=(20,))
    same(rounds, [1, 2, 3], of_one_round=[metrics["round"] for metrics in one])


def test_a_prompt_given_twice_is_one_to_the_proxy():
    """Its reward is 5 more: the proxy must know so whichever of the two was asked."""

    def oracle(samples, conditions):
        return torch.tensor([5.0 * float(c == "1") for c in conditions])

    tuner = tuner_with(oracle, prompts=["1", "0", "1"], rounds=(60,), iterations=1, noise_std=0.0)
    list(tuner)
    told = tuner.collector.objective(torch.zeros(2, 2), ["1", "0"])
    close(told, [5.0, 0.0], atol=0.1, first_of_two_only=[2.5, 0.0], one_for_all=[3.3, 3.3])


def test_rounds_share_out_the_iterations():
    close(Online(rounds=(8, 8, 8)).length(20), 6, rounded_up=7)
    close(Online(rounds=(8, 8, 8), iterations_per_round=2).length(20), 2, shared_out=6)
    tuner = tuner_with(Oracle(), rounds=(8, 9), iterations_per_round=1, iterations=4)
    assert [metrics["round"] for metrics in tuner] == [1, 2, 2, 2]


def test_what_cannot_be_is_refused_in_one_line(tmp_path):
    for override, said in {
        "online.rounds=[]": "online.rounds: ",
        "online.rounds=[4]": "online.rounds: a round asks at least 8 samples",
        "online.rounds=256": "online.rounds: must be a valid",
        "online.budget=100": "online.budget: 100 queries do not pay for the first round of 256",
        "online.budget=1000": "online.budget: 1000 queries do not pay for the 1536 of all rounds",
        "online.proxi=ucb": "online.proxi: unknown key; did you mean proxy?",
        "online.proxy=gp": "online.proxy: must be 'ensemble' or 'ucb' (got 'gp')",
        "online.noise_std=-1": "online.noise_std: must be greater than or equal to 0",
        "onlin.rounds=[8]": "onlin: unknown key; did you mean online?",
        "rounds=[8]": "rounds: unknown key; did you mean online.rounds?",
    }.items():
        assert fault(override).startswith(said)
    assert load_recipe("mixture", ["online.budget=1536"]).online is not None
    with pytest.raises(ValueError, match=r"train\.iterations: 2 end before round 3 begins; raise it to 3, or"):
        build(load_recipe("mixture", ["online.rounds=[8,8,8]", "train.iterations=2"]))
    hard = sa.Model(Net(), process=sa.VP(), predicts="eps", shape=(2,), features=lambda samples: samples.detach().round())
    with pytest.raises(ValueError, match=r"online\.features: no gradient reaches the samples .*; take samples"):
        tuner_with(Oracle(), model=hard)
    assert tuner_with(Oracle(), model=hard, features="samples").rounds is not None
    list(tuner_with(Oracle(), output=tmp_path, iterations=3))
    (tmp_path / "moved").mkdir()
    shutil.copy(tmp_path / LOG, tmp_path / "moved")
    with pytest.raises(ValueError, match="already holds a run"):
        list(tuner_with(Oracle(), output=tmp_path / "moved", iterations=3))
    (tmp_path / LOG).unlink()
    longer = tuner_with(Oracle(), output=tmp_path, rounds=(*ROUNDS, 8), iterations=4)
    longer.resume()
    with pytest.raises(ValueError, match=r"queries\.jsonl: lacks answers of the rounds before 4; put the file back"):
        list(longer)
    (tmp_path / LOG).write_text('{"round": 1}\n')
    with pytest.raises(ValueError, match=r"queries\.jsonl line 1: not an answer of the oracle"):
        tuner_with(Oracle(), output=tmp_path, iterations=3).resume()


@pytest.mark.slow
def test_a_finished_run_is_opened_reported_and_drawn_from(tmp_path):
    assert train(tmp_path / "run", "online.rounds=[8,8]", "online.hidden=4") == 0
    opened = open_run(tmp_path / "run", tuned=True).tuner
    assert opened.rounds.round == 2
    assert float(opened.rounds.proxy.heads.abs().sum()) > 0
    assert write_report(tmp_path / "run").is_file()
    axis = run_figure(read_json_lines(tmp_path / "run" / "metrics.jsonl"), None).axes[0]
    labels = {line.get_label(): len(line.get_xdata()) for line in axis.lines}
    close([labels["by the proxy"], labels["by the oracle, a round"]], [4, 2], every_iteration=[4, 4])
    assert load_recipe(str(tmp_path / "run" / "recipe.yaml")).online == Online(rounds=(8, 8), hidden=4)
