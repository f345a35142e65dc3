"""Truth: the run whose reward behaves. One that does not is one line with the cause, and what was learned before is saved."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from tuning import own_model, tune
from twins import close, same

import scoreaction as sa
from scoreaction.cli import main
from scoreaction.rewards import CountedReward, Reward, RewardError
from scoreaction.training.online import Online
from scoreaction.training.run_folder import RunFolder


def _raise(error: BaseException) -> None:
    raise error


def _write(samples: Tensor) -> None:
    samples[0, 0] = 7.0


def _write_by_numpy(samples: Tensor) -> None:
    samples.numpy()[-1, -1] *= -1


HARM: dict[str, Callable[[Tensor], Any]] = {
    "raised SystemExit: 0": lambda x: sys.exit(0),
    "raised SystemExit: the judge is gone": lambda x: sys.exit("the judge is gone"),
    "raised GeneratorExit": lambda x: _raise(GeneratorExit()),
    "raised BaseException: odd": lambda x: _raise(BaseException("odd")),
    "raised StopIteration: x": lambda x: _raise(StopIteration("x")),
    r"raised RuntimeError: no \\x1b\[31m score": lambda x: _raise(RuntimeError("no \x1b[31m\nscore")),
    "must return plain real numbers, got a complex tensor; convert it": lambda x: x[:, 0].to(torch.complex64),
    "must return one number a sample, got list": lambda x: [complex(1, 1)] * len(x),
    "must return plain real numbers, got a sparse tensor; convert it": lambda x: x[:, 0].to_sparse(),
    "must return plain real numbers, got a meta tensor": lambda x: x[:, 0].to("meta"),
    "changes its samples in place": _write,
    "changes its samples in place, which": _write_by_numpy,
    "changes its samples in place, which are": lambda x: x.data.mul_(2.0),
    "changes its samples in place, which are measured": lambda x: x.numpy().sort(axis=0),
    "changes torch's default dtype from torch.float32 to torch.float64": lambda x: torch.set_default_dtype(torch.float64),
    "changes torch's grad mode from False to True": lambda x: torch.set_grad_enabled(True),
}


@pytest.mark.parametrize("said", HARM)
def test_a_reward_that_misbehaves_is_one_line_and_the_state_is_saved(said: str, tmp_path: Path) -> None:
    """In its third call; twin: in none."""
    calls: list[int] = []

    def reward(samples: Tensor, prompts: Any) -> Any:
        calls.append(1)
        fine = samples[:, 0].clone()
        if len(calls) != 3:
            return fine
        answer = HARM[said](samples)
        return fine if answer is None or said.startswith("changes") else answer

    tuner = tune(sa.DDPO(), output=tmp_path, reward=reward, checkpoint_every=100)
    with pytest.raises(RewardError, match=f"^reward: {said}") as caught:
        list(tuner)
    assert str(caught.value).isprintable()
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()
    assert RunFolder(tmp_path).newest_checkpoint() == tmp_path / "checkpoints" / "000002"
    calls += [1]
    again = tune(sa.DDPO(), output=tmp_path, reward=reward)
    assert again.resume()
    *_, last = again
    *_, truth = tune(sa.DDPO(), reward=lambda x, c: x[:, 0])
    same({**last, "seconds": 0}, {**truth, "seconds": 0}, another={**truth, "seconds": 0, "iteration": 3})


@pytest.mark.parametrize(
    "answer",
    [
        lambda x: np.array(x[:, 0].tolist(), dtype=object),
        lambda x: x[:, 0].double().numpy(),
        lambda x: tuple(x[:, 0].tolist()),
        lambda x: x[:, 0].detach().requires_grad_(True),
        lambda x: x[:, 0] * torch.nn.Parameter(torch.ones(())),
    ],
)
def test_answers_that_mean_numbers_are_taken(answer: Callable[[Tensor], Any]) -> None:
    """Truth: the numbers; a black box leaves no graph, which a reward with a gradient (the twin) does."""
    samples = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    scores = CountedReward(lambda x, c: answer(x))(samples, None)
    close(scores, samples[:, 0], atol=1e-6, second=samples[:, 1])
    kept = CountedReward(Reward(lambda x, c: x[:, 0], differentiable=True))(samples.requires_grad_(True), None)
    same(scores.requires_grad, False, with_a_gradient=kept.requires_grad)


def test_an_interrupt_within_a_reward_is_one() -> None:
    with pytest.raises(KeyboardInterrupt):
        CountedReward(lambda x, c: _raise(KeyboardInterrupt()))(torch.zeros(2, 2), None)


def test_a_long_message_is_cut() -> None:
    with pytest.raises(RewardError, match="raised ValueError: x{1000}...$"):
        CountedReward(lambda x, c: _raise(ValueError("x" * 5000)))(torch.zeros(2, 2), None)


@pytest.mark.slow
def test_a_round_that_fails_is_taken_back_and_what_was_learned_before_saved(tmp_path: Path) -> None:
    """Truth: the run whose oracle never failed; the answers on disk are not asked for again."""
    answered: list[int] = []

    def oracle(samples: Tensor, prompts: Any) -> Tensor:
        if len(answered) == broken:
            raise OSError("the oracle is gone")
        answered.append(len(samples))
        return samples[:, 0]

    def run(folder: Path | None) -> sa.Finetuner:
        online = Online(rounds=(16, 32), members=2, hidden=4)
        algorithm = sa.DRaFT(last=1, rows=16)
        train = sa.Train(iterations=4, batch=16, checkpoint_every=100, device="cpu")
        sampler = sa.Sampler(steps=4)
        return sa.Finetuner(
            own_model(), reward=oracle, algorithm=algorithm, sampler=sampler, train=train, output=folder, online=online
        )

    broken = 2  # in the middle of the second round, before iteration 3
    with pytest.raises(RewardError, match="the oracle is gone"):
        list(run(tmp_path))
    assert RunFolder(tmp_path).newest_checkpoint() == tmp_path / "checkpoints" / "000002"
    broken = -1
    again = run(tmp_path)
    assert again.resume()
    found = [{**metrics, "seconds": 0} for metrics in again]
    assert answered == [16, 16, 16]
    truth = [{**metrics, "seconds": 0} for metrics in run(None)]
    same(found, truth[2:], first=truth[:2])


def test_a_module_that_exits_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it is imported and where it is built; twin: one that does not."""
    monkeypatch.chdir(tmp_path)
    head = "import sys\nfrom scoreaction.rewards.linear import *\n"
    for name, text in (("leaves_a", "sys.exit(3)"), ("leaves_b", "def build(config): sys.exit(0)"), ("stays_a", "")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "reward.py").write_text(head + text)
        reward = f"reward={{name: {name}.reward, direction: [1.0, 0.5]}}"
        code = main(["plan", "mixture", reward])
        said = capsys.readouterr().err
        same(code, 0 if name == "stays_a" else 2, the_other=2 if name == "stays_a" else 0)
        assert said.count("\n") == (code != 0), said
