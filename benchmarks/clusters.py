"""Shares of clusters under a reward, and under the same reward that keeps them: the recipe `mixture`, entropies in nats.

    python -m benchmarks.clusters        # results/clusters.csv and its table; some five CPU minutes, resumes

4,096 samples of the pretrained model are clustered by k-means into four. Both rewards are black boxes, with equal iterations
and samples; keep_clusters asks its reward 4,096 times more, once. The optima are in closed form, the cells of clusters taken
for the modes, from which they differ by some 1e-6.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

from _harness import Figures, arguments, built, run_jobs, summary

K, SAMPLES, ITERATIONS, STEPS = 4, 4096, 80, 25
DIRECTION, BETA = [1.0, 0.5], 0.5


def measured(arm: str, seed: int, iterations: int) -> Figures:
    """A run of 80 iterations; `linear` is the reward alone, whatever was trained on."""
    import torch

    import scoreaction as sa
    from scoreaction.rewards.keep_clusters import KeptShares
    from scoreaction.tasks.clusters import Clusters

    direction = torch.tensor(DIRECTION)
    plain = sa.Reward(lambda samples, prompts: samples @ direction)
    drawn = sa.sample(built("mixture").model, n=SAMPLES, steps=50, seed=seed + 100, reference=True)
    clusters = Clusters.fit(drawn, K, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clusters.npz"
        clusters.write(path)
        tuner = sa.Finetuner(
            built("mixture").model,
            reward=KeptShares(plain, clusters) if arm == "keep_clusters" else plain,
            algorithm=sa.ScoreAction(beta=BETA),
            sampler=sa.Sampler(steps=STEPS),
            train=sa.Train(iterations=iterations, batch=256, lr=2e-3, seed=seed),
            evaluation=sa.Evaluation(n=4096, steps=50, clusters=path),
            held_out={"linear": plain},
        )
    for _ in tuner:
        pass
    figures = summary(tuner)
    shares = [cluster["share_tuned"] for cluster in figures["clusters"]]
    names = ("kl_nats", "cluster_entropy_base", "cluster_entropy_tuned", "diversity_tuned", "model_evaluations", "seconds")
    return {
        "linear": figures["held_out.linear_tuned"], **{name: figures[name] for name in names}, "least_share": min(shares),
        "effective": math.exp(figures["cluster_entropy_tuned"]),
        "queries": figures["reward_queries"] + (SAMPLES if arm == "keep_clusters" else 0),
    }  # fmt: skip


if __name__ == "__main__":
    jobs = {
        f"{arm}/{seed}": {"arm": arm, "seed": seed, "iterations": ITERATIONS}
        for seed in range(3)
        for arm in ("linear", "keep_clusters")
    }
    run_jobs(measured, jobs, arguments(__doc__ or "", "clusters").parse_args())
