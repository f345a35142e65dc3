"""Online black-box optimisation: a noisy oracle that answers few questions, asked in rounds, and a proxy of it.

python examples/online_black_box.py [iterations]        # about a minute and a half on a laptop's CPU

The model draws handwritten digits; the oracle counts dark pixels, with noise, and answers 256 questions in three rounds, and
120 more about what comes out. Training follows a small ensemble that is fitted to all answers so far. A laboratory
or people would take the oracle's place.
"""

import sys

import torch

import scoreaction as sa

noise = torch.Generator().manual_seed(0)


def oracle(pictures, prompts):
    """pictures (batch, 1, 16, 16) in [0, 1]; a count has no gradient, and every answer is off by about 3."""
    count = (pictures > 0.5).sum(dim=(1, 2, 3)).float()
    return count + 3 * torch.randn(len(count), generator=noise)


iterations = int(sys.argv[1]) if len(sys.argv) > 1 else 18
model = sa.models.digits.build(sa.models.digits.Config())
tuner = sa.Finetuner(
    model,
    reward=oracle,
    algorithm=sa.ScoreAction(beta=1.0, rows=80, updates=8, critic_updates=16),
    sampler=sa.Sampler(steps=10, guidance=2.0),
    train=sa.Train(iterations=iterations, batch=32, lr=1e-4, schedule="constant"),
    prompts=["1", "4", "7"],
    online=sa.Online(rounds=(64, 64, 128), budget=256 + 2 * 60, features="samples"),
    evaluation=sa.Evaluation(n=60, steps=10),
)
seen = 0
for metrics in tuner:
    if metrics["round"] > seen:
        seen = metrics["round"]
        error = metrics.get("proxy_error", float("nan"))
        print(f"round {seen:.0f}: the oracle's mean {metrics['oracle_mean']:.1f}, error of the last proxy {error:.1f}")
print(f"the proxy's mean {metrics['reward_mean']:.1f} at {metrics['kl_nats']:.1f} nats, {tuner.reward.queries} questions asked")
summary = tuner.summary()  # 60 samples of each model, which the budget pays for too
print(f"dark pixels: {summary['reward_base']:.1f} before, {summary['reward_tuned']:.1f} after")
