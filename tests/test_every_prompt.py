"""Truth: `v = -sigma m` is the exact score of data N(m, 1), here with a mean for each prompt: the first alone is not all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from twins import accepts, close

import scoreaction as sa

PROMPTS = ["0", "1"]


class Means(nn.Module):
    """The law N(b cond, 1); broken in one way for prompts above 0."""

    def __init__(self, b: float, broken: str = "") -> None:
        super().__init__()
        self.b, self.broken = nn.Parameter(torch.tensor([b])), broken

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        v = -sa.VP().sigma(t)[:, None].to(x) * self.b * cond + 0 * x
        if self.broken == "random":
            v = v + 0.1 * torch.randn_like(x) * cond
        if self.broken == "mixing":
            v = v + 0.1 * x.mean(0) * cond
        return v


def encode(prompts: list[str]) -> Tensor:
    return torch.tensor([[float(prompt)] for prompt in prompts])


def first(samples: Tensor, prompts: Any) -> Tensor:
    return samples[:, 0]


def tuner(reward: Any = first, *, b: float = 3.0, broken: str = "", algorithm: Any = None, **options: Any) -> sa.Finetuner:
    return sa.Finetuner(
        sa.Model(Means(b, broken), process=sa.VP(), predicts="v", shape=(1,), encode=encode),
        reward=reward,
        algorithm=algorithm or sa.DPOK(beta=0.5),
        sampler=sa.Sampler(steps=10),
        train=sa.Train(iterations=1, batch=1000, lr=1e-4, device="cpu"),
        evaluation=sa.Evaluation(n=4000, steps=100),
        prompts=PROMPTS,
        **options,
    )


def by_prompt(samples: Tensor, prompts: list[str]) -> list[float]:
    return [float(samples[[asked == prompt for asked in prompts]].mean()) for prompt in PROMPTS]


def test_samples_follow_their_own_prompts() -> None:
    found = sa.sample(tuner().model, n=4000, steps=20, prompts=PROMPTS)
    of_one = sa.sample(tuner().model, n=4000, steps=20, prompts=PROMPTS[:1])
    close(by_prompt(found, PROMPTS * 2000), [0.0, 3.0], atol=0.1, first_only=by_prompt(of_one, PROMPTS * 2000))


@pytest.mark.parametrize("online", [None, sa.Online(rounds=(1000,), hidden=0, members=2)], ids=["reward", "oracle"])
def test_a_reward_sees_samples_of_the_prompts_that_it_is_told(online: sa.Online | None) -> None:
    seen: list[tuple[Tensor, list[str]]] = []

    def reward(samples: Tensor, prompts: list[str]) -> Tensor:
        seen.append((samples, prompts))
        return samples[:, 0]

    list(tuner(reward, online=online))
    samples, prompts = torch.cat([part for part, _ in seen]), [prompt for _, asked in seen for prompt in asked]
    shares = [prompts.count(prompt) / len(prompts) for prompt in PROMPTS]
    close(shares, 0.5, atol=0.07, first_only=[1.0, 0.0])
    close(by_prompt(samples, prompts), [0.0, 3.0], atol=0.25, exchanged=[3.0, 0.0], first_only=[0.0, 0.0], mixed=[1.5, 1.5])


def test_a_surrogate_remembers_samples_with_their_own_prompts() -> None:
    made = tuner(algorithm=sa.ScoreAction(beta=0.5, updates=1, rows=64, critic_updates=2))
    list(made)
    memory, n = made.learner.networks["surrogate"], 1000
    prompts = [PROMPTS[number] for number in memory.prompts[:n].tolist()]
    close(by_prompt(memory.samples[:n], prompts), [0.0, 3.0], atol=0.3, exchanged=[3.0, 0.0], mixed=[1.5, 1.5])


def test_a_policy_is_held_to_the_pretrained_model_under_its_own_prompt() -> None:
    """Before anything is learned both are N(3 cond, 1): no KL, where that of one prompt to another is 9/2 nats."""
    found, other = next(iter(tuner())), tuner()
    with torch.no_grad():
        other.model.parameters["b"].fill_(2.0)
    close(found["kl_nats"], 0.0, atol=1e-4, other_policy=next(iter(other))["kl_nats"], first_only=9 / 4)


@pytest.mark.slow
def test_a_summary_measures_all_prompts() -> None:
    """From N(0, 1) to N(1, 1) the path KL is 1/2 nats, and 0 for the prompt whose law stayed; half of that on average."""
    made = tuner(b=0.0)
    with torch.no_grad():
        made.model.parameters["b"].fill_(1.0)
    found = made.summary()
    close(found["kl_nats"], 0.25, atol=0.01, first_only=0.0, second_only=0.5)
    close(found["reward_tuned"], 0.5, atol=0.05, first_only=0.0, second_only=1.0)
    close([row["reward_tuned"] for row in found["prompts"]], [0.0, 1.0], atol=0.06, first_only=[0.0, 0.0], mixed=[0.5, 0.5])


def sloped(samples: Tensor, prompts: list[str]) -> Tensor:
    """Its gradient has the wrong sign for the second prompt."""
    wrong = torch.tensor([prompt != "0" for prompt in prompts])
    return torch.where(wrong, 2 * samples[:, 0].detach() - samples[:, 0], samples[:, 0])


def relative(samples: Tensor, prompts: list[str]) -> Tensor:
    """Depends on the batch for the second prompt."""
    wrong = torch.tensor([prompt != "0" for prompt in prompts])
    return samples[:, 0] - torch.where(wrong, samples[:, 0].max(), 0.0)


def gradient(fn: Callable[[Tensor, Any], Tensor]) -> sa.Reward:
    return sa.Reward(fn, differentiable=True)


@pytest.mark.parametrize(
    ("check", "broken"),
    [
        ("the network answers the same twice", lambda: tuner(broken="random")),
        ("a row's answer is its own", lambda: tuner(broken="mixing")),
        ("the reward's gradient is its own", lambda: tuner(gradient(sloped))),
        ("a sample's reward is its own", lambda: tuner(relative)),
    ],
)
def test_the_doctor_finds_what_is_wrong_with_the_second_prompt_alone(check: str, broken: Callable[[], sa.Finetuner]) -> None:
    def well(made: sa.Finetuner) -> None:
        verdicts = {finding.check: finding.verdict for finding in sa.examine(made, iterations=1)}
        assert verdicts[check] == "ok", verdicts

    accepts(well, tuner(gradient(first)), broken=broken())
