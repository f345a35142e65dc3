"""Tuners for tests: a user's own network, rewards that are a black box or smooth, and a short run of every algorithm."""

import json

import torch
from torch import nn

import scoreaction as sa


class Net(nn.Module):
    """A user's own network: x (batch, 2), cond (batch,) of class ids or None."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2))
        self.classes = nn.Embedding(3, 16)

    def forward(self, x, t, cond):
        h = self.body[0](torch.cat([x, t[:, None]], 1))
        return self.body[2](torch.tanh(h if cond is None else h + self.classes(cond)))


def own_model(prompts=False):
    encode = (lambda names: torch.tensor([int(name) for name in names])) if prompts else None
    return sa.Model(
        Net(), process=sa.VP(), predicts="eps", shape=(2,), encode=encode, null=torch.tensor([2]) if prompts else None
    )


def black_box(samples, conditions):
    """What an outside program might do: numpy in, list out."""
    sign = 1.0 if conditions is None else torch.tensor([1.0 - 2.0 * int(c) for c in conditions])
    return (sign * samples[:, 0]).numpy().tolist() if conditions is None else sign * samples[:, 0]


def tune(
    algorithm, *, iterations=4, output=None, reward=black_box, prompts=None, sampler=None, model=None, held_out=None, **train
):
    options = {"iterations": iterations, "batch": 16, "device": "cpu", "checkpoint_every": 2} | train
    return sa.Finetuner(
        model or own_model(prompts is not None),
        reward=reward,
        algorithm=algorithm,
        sampler=sampler or sa.Sampler(steps=4, eta=0.0 if algorithm.moves_noise else 1.0),
        train=sa.Train(**options),
        prompts=prompts,
        output=output,
        held_out=held_out,
    )


SCORE_ACTION = sa.ScoreAction(updates=2, rows=32, critic_updates=2)

ALGORITHMS = {
    "score_action": (SCORE_ACTION, None),
    "score_action_prompts": (SCORE_ACTION, ["0", "1"]),
    "ratio": (SCORE_ACTION.model_copy(update={"estimator": "likelihood_ratio", "look_ahead": "zeroth_order"}), None),
    "forward": (SCORE_ACTION.model_copy(update={"estimator": "forward", "each": 2}), ["0", "1"]),
    "ddpo": (sa.DDPO(baseline="prompt", minibatches=2), ["0", "1"]),
    "dpok": (sa.DPOK(kl_target=0.1, minibatches=2), None),
    "sqdf": (sa.SQDF(updates=2, rows=16, buffer=24, priority=1.0, importance=0.5, max_age=2), ["0", "1"]),
    "sqdf_published": (sa.SQDF(updates=2, rows=16, buffer=24, weights="chain", gamma=0.9), None),
    "sqdf_corrected": (sa.SQDF(updates=2, rows=16, correction=True, critic_updates=2, critic_rows=32, kl_target=0.1), None),
    "vard": (sa.VARD(updates=2, rows=16, critic_updates=2), ["0", "1"]),
    "q_learning": (sa.QLearning(updates=2, rows=16, critic_updates=2), ["0", "1"]),
    "pi_ft": (sa.PIFT(stages=2, rows=16, critic_updates=2), ["0", "1"]),
    "adjoint_matching": (sa.AdjointMatching(updates=2, rows=16), ["0", "1"]),
    "draft": (sa.DRaFT(last=2, beta=0.1, rows=16), ["0", "1"]),
    "draft_lv": (sa.DRaFT(low_variance=2), None),
    "refl": (sa.ReFL(beta=0.1, rows=16), ["0", "1"]),
    "ram": (sa.RAM(each=2, kl_target=0.1), ["0", "1"]),
    "nft": (sa.NFT(lag=0.2), ["0", "1"]),
    "awm": (sa.AWM(each=2), None),
    "hypernoise": (sa.Hypernoise(kl_target=0.1), ["0", "1"]),
    "prompt_loop": (sa.PromptLoop(menu={"0": ["0", "1"], "1": ["1", "2"]}, at=[1.0, 0.5], hidden=8), ["0", "1"]),
}

SMOOTH = sa.Reward(
    lambda x, c: x[:, 0] if c is None else x[:, 0] * torch.tensor([1.0 - 2.0 * int(p) for p in c]), differentiable=True
)


def reward_of(name):
    """A black box where one will do."""
    return (
        black_box if name in ("score_action", "score_action_prompts", "ratio", "ddpo", "dpok", "vard", "q_learning") else SMOOTH
    )


def flat(value, name=""):
    if isinstance(value, dict):
        return {k: v for key, inner in value.items() for k, v in flat(inner, f"{name}/{key}").items()}
    if isinstance(value, list | tuple):
        return {k: v for i, inner in enumerate(value) for k, v in flat(inner, f"{name}/{i}").items()}
    return {name: value}


def lines(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]
