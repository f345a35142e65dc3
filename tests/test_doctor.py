"""Truth: runs that are broken on purpose, each found by its own check, which says ok of the run that is in order."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from twins import accepts, close, same

import scoreaction as sa
from scoreaction.cli import main
from scoreaction.commands.doctor.checkup import examine
from scoreaction.commands.doctor.finding import Finding
from scoreaction.models import gaussian_mixture

PRETRAINED = gaussian_mixture.build(gaussian_mixture.Config())


class Net(nn.Module):
    """The mixture's network, broken in one way."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = gaussian_mixture.build(gaussian_mixture.Config()).net
        self.unused = nn.Linear(2, 2) if how == "unused" else nn.Identity()
        self.register_buffer("calls", torch.zeros(()))
        self.how = how

    def forward(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        y = self.inner(x, t, None)
        match self.how:
            case "random":
                return y + 0.3 * torch.randn_like(y)
            case "somewhat random":
                return y + 2e-3 * torch.randn_like(y)
            case "mixing":
                return y - 0.1 * y.mean(0)
            case "counting":
                self.calls += 1
            case "detached":
                return y.detach() + 0 * x
            case "not finite":
                return y * float("nan")
            case "told":
                return y + 0.1 * cond
            case "thousandths":
                return self.inner(x, t / 2, None)
            case "untrained":
                return 0 * y
            case "silent":  # eps of the first direction alone
                alpha, sigma = (f(t.double()).to(x)[:, None] for f in (sa.VP().alpha, sa.VP().sigma))
                return torch.cat([(alpha * y + sigma * x)[:, :1], 0 * y[:, 1:]], 1)
        return y


class Foreign(nn.Module):
    """The mixture's flow with time from noise to data and velocity x0 - eps, as half of the field writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.law, self.b = gaussian_mixture.Config().law(), nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, t: Tensor, cond: None) -> Tensor:
        prediction = self.law.prediction(sa.Flow(), x, (1 - t.double()).clamp(1e-3, 1 - 1e-3))
        return prediction.x0 - prediction.eps + self.b


def tune_foreign() -> sa.Finetuner:
    model = sa.Model(Foreign(), process=sa.Flow(), predicts="velocity", shape=(2,))
    train = sa.Train(iterations=3, batch=64, device="cpu")
    return sa.Finetuner(model, reward=linear, algorithm=sa.DDPO(), sampler=sa.Sampler(steps=5), train=train)


def linear(x: Tensor, _: Any) -> Tensor:
    return x @ torch.tensor([1.0, 0.5])


def flat(x: Tensor, _: Any) -> Tensor:
    return linear(x, _).round() + 0 * x[:, 0]


def backwards(x: Tensor, _: Any) -> Tensor:
    return 2 * linear(x, _).detach() - linear(x, _)


def raising(x: Tensor, _: Any) -> Tensor:
    raise OSError("the scorer is down")


class Tiring:
    """A reward that fails in the second iteration: the checks ask it three times before."""

    differentiable = False

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: Tensor, conditions: Any) -> Tensor:
        self.calls += 1
        return raising(x, conditions) if self.calls > 5 else linear(x, conditions)


def differentiable(fn: Callable[[Tensor, Any], Tensor]) -> sa.Reward:
    return sa.Reward(fn, differentiable=True)


def tune(
    how: str = "whole",
    *,
    reward: Any = linear,
    algorithm: Any = None,
    predicts: Any = "v",
    prompts: list[str] | None = None,
    steps: int = 25,
    eta: float = 1.0,
    lr: float = 1e-3,
    process: Any = None,
    off_below: float | None = None,
) -> sa.Finetuner:
    encode = (lambda names: torch.tensor([[float(name)] for name in names])) if prompts else None
    model = sa.Model(Net(how), process=process or sa.VP(), predicts=predicts, shape=(2,), encode=encode)
    return sa.Finetuner(
        model, reward=reward, algorithm=algorithm or sa.DPOK(beta=0.5), prompts=prompts,
        sampler=sa.Sampler(steps=steps, eta=eta, off_below=off_below),
        train=sa.Train(iterations=3, batch=64, lr=lr, device="cpu"),
    )  # fmt: skip


def other_reference() -> sa.Finetuner:
    tuner = tune()
    with torch.no_grad():
        next(tuner.model.reference_net.parameters()).add_(0.3)
    return tuner


def shared_reference() -> sa.Finetuner:
    tuner = tune()
    tuner.model.reference_net = tuner.model.net
    return tuner


def standardised(x: Tensor, _: Any) -> Tensor:
    return linear(x, _) - linear(x, _).max()


def noisy(x: Tensor, _: Any) -> Tensor:
    return linear(x, _) + 0.1 * torch.randn(len(x))


BROKEN: dict[str, tuple[Callable[[], sa.Finetuner], str, str]] = {
    "random": (lambda: tune("random"), "the network answers the same twice", "wrong"),
    "not finite": (lambda: tune("not finite"), "the network answers the same twice", "wrong"),
    "random ratios": (lambda: tune("random"), "training runs", "wrong"),
    "ratios somewhat off": (lambda: tune("somewhat random"), "ratios begin at 1", "wrong"),
    "mixing rows": (lambda: tune("mixing"), "a row's answer is its own", "wrong"),
    "another reference": (other_reference, "the policy begins as the pretrained model", "wrong"),
    "another reference's KL": (other_reference, "the KL begins at 0", "wrong"),
    "shared reference": (shared_reference, "the reference stays", "wrong"),
    "blind to prompts": (lambda: tune(prompts=["0", "1"]), "prompts matter", "wrong"),
    "prompts all equal": (lambda: tune("told", prompts=["1"] * 4), "prompts matter", "note"),
    "eps for v": (lambda: tune(predicts="eps"), "the network finds the noise", "wrong"),
    "another process": (lambda: tune(process=sa.CosineVP()), "the network finds the noise", "wrong"),
    "another unit of time": (lambda: tune("thousandths"), "the network finds the noise", "wrong"),
    "both turned": (tune_foreign, "the network finds the noise", "wrong"),
    "untrained": (lambda: tune("untrained", predicts="eps"), "the network finds the noise", "wrong"),
    "a silent direction": (lambda: tune("silent", predicts="eps"), "every direction is denoised", "wrong"),
    "eps without a signal": (
        lambda: tune(predicts="eps", process=sa.TableVP((1.0, 0.5, 4e-6))), "what is predicted is known at all times", "note",
    ),
    "x0 close to the data": (
        lambda: tune(predicts="x0", process=sa.Flow(), off_below=0.0), "what is predicted is known at all times", "note",
    ),
    "half eta": (lambda: tune(eta=0.5), "samples forget their noise", "note"),
    "noise": (lambda: tune(reward=noisy), "the reward answers the same twice", "note"),
    "standardised": (lambda: tune(reward=standardised), "a sample's reward is its own", "wrong"),
    "all equal": (lambda: tune(reward=lambda x, _: torch.ones(len(x))), "the reward tells samples apart", "wrong"),
    "nearly all equal": (
        lambda: tune(reward=lambda x, _: (torch.arange(len(x)) % 32 == 0).float()), "the reward tells samples apart", "note",
    ),
    "down": (lambda: tune(reward=raising), "the reward answers", "wrong"),
    "low beta": (lambda: tune(algorithm=sa.DPOK(beta=1e-3)), "beta suits the reward's scale", "note"),
    "high beta": (lambda: tune(algorithm=sa.DPOK(beta=1e3)), "beta suits the reward's scale", "note"),
    "no beta": (lambda: tune(algorithm=sa.DDPO()), "beta suits the reward's scale", "note"),
    "no graph": (
        lambda: tune(reward=differentiable(lambda x, _: linear(x, _).detach())), "the reward's gradient is its own", "wrong",
    ),
    "no slope": (lambda: tune(reward=differentiable(flat)), "the reward's gradient is its own", "wrong"),
    "wrong slope": (lambda: tune(reward=differentiable(backwards)), "the reward's gradient is its own", "wrong"),
    "dead": (lambda: tune("detached"), "training runs", "wrong"),
    "down later": (lambda: tune(reward=Tiring()), "training runs", "wrong"),
    "nothing to learn": (lambda: tune(reward=lambda x, _: torch.ones(len(x))), "every iteration learns", "note"),
    "unused": (lambda: tune("unused"), "gradients reach all that is trained", "note"),
    "lost in rounding": (lambda: tune(lr=1e-13), "what is trained moves", "wrong"),
    "counting": (lambda: tune("counting"), "what is frozen stays", "wrong"),
    "one update": (lambda: tune(algorithm=sa.DPOK(minibatches=1)), "ratios then leave 1", "note"),
    "clipped": (lambda: tune(lr=0.1), "ratios then leave 1", "note"),
    "coarse": (lambda: tune(steps=3), "the grid is fine enough", "note"),
}  # fmt: skip


@pytest.fixture(scope="module")
def in_order() -> dict[str, Finding]:
    found = {finding.check: finding for finding in sa.examine(tune("told", prompts=["0", "1"], reward=differentiable(linear)))}
    return found | {finding.check: finding for finding in sa.examine(tune(reward=differentiable(linear)))}


@pytest.mark.slow
def test_a_run_in_order(in_order: dict[str, Finding]) -> None:
    def all_well(found: dict[str, Finding]) -> None:
        assert {finding.verdict for finding in found.values()} == {"ok"}, found

    accepts(all_well, in_order, broken={finding.check: finding for finding in sa.examine(tune("random"), iterations=1)})


@pytest.mark.slow
@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_found(name: str, in_order: dict[str, Finding]) -> None:
    make, check, verdict = BROKEN[name]
    found = {finding.check: finding for finding in sa.examine(make(), iterations=2)}

    def broken(found: dict[str, Finding]) -> None:
        assert check in found
        assert found[check].verdict == verdict, found

    accepts(broken, found, in_order=in_order)
    assert found[check].remedy or verdict == "note" or check in ("training runs", "the reward answers")
    assert (check in in_order) != (check in ("every iteration learns", "the reward answers"))


def test_the_error_in_finding_noise_is_that_of_a_gaussian() -> None:
    """`E (eps - sigma x)^2 = alpha^2` for data N(0, 1), where v is 0."""

    class Still(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.b = nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor, t: Tensor, cond: None) -> Tensor:
            return self.b * x

    tuner = sa.Finetuner(
        sa.Model(Still(), process=sa.VP(), predicts="v", shape=(8,)), reward=lambda x, _: x[:, 0], algorithm=sa.DDPO(),
        sampler=sa.Sampler(steps=200), train=sa.Train(iterations=1, batch=64, device="cpu"),
    )  # fmt: skip
    seen = next(finding.seen for finding in sa.examine(tuner, iterations=1) if finding.check == "the network finds the noise")
    errors = [float(number) for number in seen.removeprefix("error ").partition(" of 1")[0].split(", ")]
    truth = [snr / (1 + snr) for snr in (64, 16, 4, 1, 0.25)]
    close(errors, truth, atol=0.05, without_noise=[s * (1 - s) for s in truth], other_direction=truth[::-1])


@pytest.mark.slow
def test_looking_counts_for_nothing_and_leaves_gradients_on() -> None:
    tuner = tune(reward=differentiable(linear))
    findings = sa.examine(tuner, iterations=2)
    next(findings)
    assert torch.is_grad_enabled()
    list(findings)
    plain = tune(reward=differentiable(linear))
    done = list(islice(plain, 2))[-1]
    counts = tuner.counts() | {"seconds": 0}
    same(
        counts,
        {key: done[key] for key in counts} | {"seconds": 0},
        one_query_more=counts | {"reward_queries": counts["reward_queries"] + 1},
    )

    def unchanged(other: sa.Finetuner) -> None:
        found, truth = tuner.model.parameters, other.model.parameters
        assert all(torch.equal(value, truth[name]) for name, value in found.items())

    accepts(unchanged, plain, untrained=tune(reward=differentiable(linear)))


@pytest.mark.slow
def test_a_finished_tuner_is_not_examined() -> None:
    """The twin has an iteration left."""
    tuner = tune()
    next(iter(tuner))
    assert list(examine(tuner, 1))
    list(tuner)
    with pytest.raises(ValueError, match=r"^train\.iterations: all 3 of them are done; examine a tuner that is built anew"):
        list(examine(tuner))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_command(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is written; what is wrong is exit code 1, what the user got wrong 2."""
    monkeypatch.chdir(tmp_path)
    small = ["train.batch=32", "sampler.steps=10", f"train.precision={precision}"]
    assert main(["doctor", "mixture", *small, "--iterations", "2"]) == 0
    out = capsys.readouterr().out
    assert "training runs: 2 iterations" in out
    assert " 0 wrong" in out
    assert list(tmp_path.iterdir()) == []
    assert main(["doctor", "mixture", *small, "train.lr=1e-13"]) == 1
    said = capsys.readouterr()
    assert "wrong what is trained moves" in said.out
    assert said.err == "checks that found something wrong: 1\n"
    assert main(["doctor", "nowhere"]) == 2
