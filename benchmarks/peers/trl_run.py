"""One run of TRL on the shapes, in TRL's own environment: `python trl_run.py '{"method": "ddpo", ...}'`, for the benchmark.

Of scoreaction it takes the program that judges pictures, the learned scorer and the captions. It writes the adapters of the
epochs asked for, and figures.json: rows of network calls, CPU and wall seconds of training, mean reward of every epoch.
"""

from __future__ import annotations

import itertools
import json
import random
import sys
import warnings
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")

import torch  # noqa: E402
from peft import LoraConfig  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from trl import (  # noqa: E402
    AlignPropConfig,
    AlignPropTrainer,
    DDPOConfig,
    DDPOTrainer,
    DefaultDDPOStableDiffusionPipeline,
)
from watch import Watch  # noqa: E402

from scoreaction.tasks.shapes.reader import judge  # noqa: E402
from scoreaction.tasks.shapes.scenes import parse_caption  # noqa: E402
from scoreaction.tasks.shapes.scorer import load_scorer, scene_ids  # noqa: E402

LAYERS = ["to_k", "to_q", "to_v", "to_out.0"]


class Pipeline(DefaultDDPOStableDiffusionPipeline):
    """TRL's pipeline with an adapter of this rank, and embeddings without their negative half where nothing is guided.

    The second mends `train_cfg=False`, for which diffusers 0.31 hands both halves to a network that gets one half of latents.
    """

    def __init__(self, path: str, rank: int) -> None:
        super().__init__(path)
        self.rank = rank
        inner = self.sd_pipeline._encode_prompt

        def encode(prompt: Any, device: Any, each: int, guided: bool, *rest: Any, **named: Any) -> Any:
            return inner(prompt, device, each, guided, *rest, **named) if guided else named["prompt_embeds"]

        self.sd_pipeline._encode_prompt = encode

    def get_trainable_layers(self) -> Any:
        self.sd_pipeline.unet.add_adapter(
            LoraConfig(r=self.rank, lora_alpha=self.rank, init_lora_weights="gaussian", target_modules=LAYERS)
        )
        return self.sd_pipeline.unet


class WithoutLastStep(DDPOTrainer):
    """TRL's DDPO, the last step's loss times 0: its deviation is a hundredth, its gradient outweighs the rest."""

    def calculate_loss(self, latents: Any, timesteps: Any, following: Any, log_probs: Any, advantages: Any, embeds: Any) -> Any:
        kept = (timesteps > 1000 // self.config.sample_num_steps).to(advantages)
        return super().calculate_loss(latents, timesteps, following, log_probs, advantages * kept, embeds)


def trainer_of(run: dict[str, Any], pipeline: Pipeline, prompt: Any, reward: Any) -> Any:
    """The trainer with the settings of a run; what a run does not say is as TRL has it by default."""
    common = dict(
        mixed_precision="no", allow_tf32=False, seed=run["seed"], sample_num_steps=run["steps"], sample_guidance_scale=1.0,
        save_freq=10**6, accelerator_kwargs={"cpu": True}, train_learning_rate=run["lr"],
    )  # fmt: skip
    if run["method"] == "alignprop":
        config = AlignPropConfig(
            train_batch_size=run["batch"], truncated_backprop_rand=False,
            truncated_backprop_timestep=run["steps"] - run["last"], log_image_freq=10**6, **common,
        )  # fmt: skip
        return AlignPropTrainer(config, reward, prompt, pipeline)
    config = DDPOConfig(
        sample_batch_size=run["batch"], sample_num_batches_per_epoch=1, train_batch_size=run["rows"], train_cfg=False,
        train_clip_range=run["clip"], per_prompt_stat_tracking=run["min_count"] > 0,
        per_prompt_stat_tracking_buffer_size=32, per_prompt_stat_tracking_min_count=run["min_count"], **common,
    )  # fmt: skip
    return (WithoutLastStep if run["method"].startswith("ddpo, masked") else DDPOTrainer)(config, reward, prompt, pipeline)


def main() -> None:
    run: dict[str, Any] = json.loads(sys.argv[1])
    folder, captions = Path(run["folder"]), run["prompts"]
    random.seed(run["seed"])
    rewards: list[float] = []
    order = itertools.chain.from_iterable(random.sample(captions, len(captions)) for _ in itertools.count())
    scorer = load_scorer() if run["reward"] == "scorer" else None

    def reward(images: Any, prompts: Any, _: Any) -> Any:
        scenes = [parse_caption(text) for text in prompts]
        if scorer is not None:
            values = torch.nn.functional.logsigmoid(scorer(images, scene_ids(scenes)))
        else:
            values = torch.tensor(judge(images, scenes))
        rewards.append(float(values.mean()))
        return values, {}

    pipeline = Pipeline(run["pipeline"], run["rank"])
    trainer = trainer_of(run, pipeline, lambda: (next(order), {}), reward)
    pipeline.set_progress_bar_config(disable=True)
    calls = {"rows": 0}
    pipeline.unet.register_forward_pre_hook(lambda _, args: calls.update(rows=calls["rows"] + len(args[0])))
    watch, steps, figures = Watch(), 0, []
    for epoch in range(run["epochs"]):
        steps = trainer.step(epoch, steps)
        if epoch + 1 in run["kept"]:
            kept = {n: p.detach().contiguous() for n, p in pipeline.unet.named_parameters() if ".lora_" in n}
            save_file(kept, folder / f"epoch{epoch + 1}.safetensors")
            counted = {"epochs": epoch + 1, "evaluations": calls["rows"], "reward": rewards[-1]}
            figures.append(counted | watch.figures())
    watch.end()
    (folder / "figures.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
