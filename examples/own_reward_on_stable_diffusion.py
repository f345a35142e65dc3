"""A reward of your own on a Stable Diffusion: pictures with more blue in them, by LoRA, and back into plain diffusers.

python examples/own_reward_on_stable_diffusion.py [iterations]        # about a minute and a half on a laptop's CPU

The pipeline is the tiny one that ships, in Stable Diffusion's own classes: text encoder, UNet, autoencoder, 32 x 32 pictures.
For the real one change three things, on a GPU:
- MODEL = "stable-diffusion-v1-5/stable-diffusion-v1-5", or any other that docs/pipelines.md lists;
- `build_from_pipeline(pipeline, lora_rank=4, gradient_checkpointing=True)`;
- `sa.Sampler(steps=20, grid="scheduler", guidance=5.0)` and `sa.Train(batch=16, lr=1e-4, max_rows=2, precision="bf16")`.
"""

import sys

import torch
from diffusers import DiffusionPipeline

import scoreaction as sa
from scoreaction.models.diffusers import build_from_pipeline
from scoreaction.tasks.shapes.scorer import shipped

MODEL = str(shipped())
PROMPTS = ["a blue circle", "a red square", "a green triangle"]


def blueness(pictures, prompts):
    """pictures (batch, 3, height, width) in [0, 1]; the mean of blue less that of red and green."""
    return 100 * (pictures[:, 2] - pictures[:, :2].mean(dim=1)).mean(dim=(1, 2))


torch.manual_seed(0)
iterations = int(sys.argv[1]) if len(sys.argv) > 1 else 15
pipeline = DiffusionPipeline.from_pretrained(MODEL, dtype=torch.float32)
tuner = sa.Finetuner(
    build_from_pipeline(pipeline, lora_rank=16),
    reward=sa.Reward(blueness, differentiable=True),  # without the promise of a gradient a surrogate is fitted
    algorithm=sa.ScoreAction(beta=0.3, rows=32, updates=2, critic_updates=16),
    sampler=sa.Sampler(steps=10, grid="scheduler"),
    train=sa.Train(iterations=iterations, batch=16, lr=3e-3, max_rows=256),
    prompts=PROMPTS,
)
for metrics in tuner:
    print(f"{metrics['iteration']:3d}  reward {metrics['reward_mean']:6.2f}  KL {metrics['kl_nats']:.2f} nats")
folder = tuner.save("runs/blue")

plain = DiffusionPipeline.from_pretrained(MODEL, dtype=torch.float32)
plain.set_progress_bar_config(disable=True)


def measure():
    noise = torch.Generator().manual_seed(0)
    drawn = plain(8 * PROMPTS, num_inference_steps=20, guidance_scale=1.0, generator=noise, output_type="pt").images
    return float(blueness(drawn, None).mean())


before = measure()
plain.load_lora_weights(str(folder))  # what was trained is a LoRA like any other
print(f"plain diffusers: reward {before:.2f} before, {measure():.2f} with the LoRA, from the same noise")
