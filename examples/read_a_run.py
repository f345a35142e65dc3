"""Reading a run's folder: its curve, its summary, and samples of what was trained.

python examples/read_a_run.py [folder]        # without one, a small run is made first: half a minute on a laptop's CPU
"""

import json
import sys
from pathlib import Path

import scoreaction as sa
from scoreaction.cli import main

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/small")
if not folder.exists():  # as `scoreaction train mixture ... --output runs/small` in a shell
    small = ["sampler.steps=10", "train.iterations=30", "evaluation.n=1024", "evaluation.steps=50"]
    main(["train", "mixture", *small, "--output", str(folder)])

lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
for metrics in lines[:: max(len(lines) // 8, 1)]:
    print(f"{metrics['iteration']:4d}  reward {metrics['reward_mean']:7.3f}  KL {metrics['kl_nats']:6.3f} nats")

summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
print(f"reward {summary['reward_base']:.3f} -> {summary['reward_tuned']:.3f} at {summary['kl_nats']:.3f} nats")
print(f"{summary['reward_queries']} questions to the reward, {summary['model_evaluations']} network evaluations")

model = sa.load(folder)  # the tuned model, with the pretrained one as its reference
tuned = sa.sample(model, n=512, steps=50, seed=0)
base = sa.sample(model, n=512, steps=50, seed=0, reference=True)  # the same noise
print(f"tuned samples {tuple(tuned.shape)} have mean {tuned.mean(0).tolist()}, the base's {base.mean(0).tolist()}")
