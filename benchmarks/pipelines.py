"""One full iteration of each algorithm on a network of Stable Diffusion 1.5's size with random weights.

    python -m benchmarks.pipelines             # results/pipelines.csv and a table; each job in a process of its own
    python -m benchmarks.pipelines --only cpu  # CPU: 256 x 256, batch 2 asked one row at a time, 4 steps, a quarter of an hour

An algorithm that updates at random points of the paths does one update at 2 of them (on a GPU, as many as a network call has),
one that takes likelihood ratios goes over all steps. On the CPU: the cores it may use, fp32, gradient checkpointing, no
guidance. Seconds of the iteration, the same over the time inside forwards and backwards of networks, decoder and reward, and
the process's peak resident memory. On a GPU, where there is one: pictures a second of sampling, seconds of an iteration and
peak memory at LoRA rank 4, bf16, 512 x 512, for 1 to 16 points of one network call. Reward: redness of the picture, with its
gradient, through the decoder.
"""

from __future__ import annotations

import os
import resource
import time
from typing import Any

import torch
from _harness import Figures, arguments, run_jobs
from overhead import watched

ALGORITHMS = ("score_action", "ddpo", "dpok", "sqdf", "vard", "pi_ft", "draft", "refl", "adjoint_matching")
ROWS = (1, 2, 4, 8, 16)
GIB = 2**30


def random_pipeline(dtype: torch.dtype) -> Any:
    """Stable Diffusion 1.5's layers, from its configuration, with random weights; the tokenizer knows letters."""
    import diffusers
    import transformers

    from scoreaction.models.diffusers import read_index
    from scoreaction.models.pipelines.skeleton import shipped

    folder = shipped("stable-diffusion-v1-5/stable-diffusion-v1-5")
    kinds = read_index(folder)
    letters = [chr(code) for code in range(97, 123)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    parts: dict[str, Any] = {}
    for name in ("unet", "vae"):
        kind = getattr(diffusers, kinds[name][1])
        parts[name] = kind.from_config(kind.load_config(folder, subfolder=name))
    config = transformers.CLIPTextConfig.from_pretrained(folder, subfolder="text_encoder", eos_token_id=1, bos_token_id=0)
    return diffusers.StableDiffusionPipeline(
        unet=parts["unet"].to(dtype),
        vae=parts["vae"],
        text_encoder=transformers.CLIPTextModel(config).to(dtype),
        tokenizer=transformers.CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=77),
        scheduler=diffusers.PNDMScheduler.from_pretrained(folder, subfolder="scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def redness(samples: torch.Tensor, prompts: Any) -> torch.Tensor:
    """Mean of red minus the mean of the rest."""
    return samples[:, 0].mean((1, 2)) - samples[:, 1:].mean((1, 2, 3))


def tuner_for(algorithm: str, *, device: str, rows: int, steps: int, batch: int) -> Any:
    """A run of one iteration."""
    import scoreaction as sa
    from scoreaction import catalog
    from scoreaction.models.pipelines.assemble import build_from_pipeline

    config = catalog.find("algorithm", algorithm, key="algorithm.name").Config
    small = {"updates": 1, "critic_updates": 2, "stages": 1, "inner": 1, "rows": max(2, rows), "critic_rows": 8}
    dtype, side = (torch.float32, 256) if device == "cpu" else (torch.bfloat16, 512)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_from_pipeline(random_pipeline(dtype), lora_rank=4, gradient_checkpointing=True, height=side, width=side)
    return sa.Finetuner(
        model,
        reward=sa.Reward(redness, differentiable=True),
        algorithm=config(**{key: value for key, value in small.items() if key in config.model_fields}),
        sampler=sa.Sampler(steps=steps, grid="scheduler", guidance=1.0 if device == "cpu" else 5.0),
        train=sa.Train(
            iterations=2, batch=batch, lr=1e-4, max_rows=rows, device=device, held_out_rows=2, checkpoint_every=1000,
            precision="fp32" if device == "cpu" else "bf16",
        ),
        prompts=["a red cat"],
    )  # fmt: skip


def on_cpu(algorithm: str) -> Figures:
    """Seconds and peak memory of one iteration: the smallest batch is 2, asked one row at a time."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    tuner = tuner_for(algorithm, device="cpu", rows=1, steps=4, batch=2)
    with watched(tuner) as watch:
        began = time.perf_counter()
        metrics = next(iter(tuner))
        seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    over = {"network_seconds": watch.seconds, "over_networks": seconds / watch.seconds}
    return {"seconds": seconds, **over, "peak_gib": peak / GIB, **_counts(metrics)}


def on_gpu(algorithm: str, rows: int) -> Figures:
    """The second iteration, and sampling alone."""
    from scoreaction.sampling.draw import draw

    tuner = tuner_for(algorithm, device="cuda", rows=rows, steps=10, batch=max(2, rows))
    iterations = iter(tuner)
    next(iterations)
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    began = time.perf_counter()
    metrics = next(iterations)
    torch.cuda.synchronize()
    seconds, peak = time.perf_counter() - began, torch.cuda.max_memory_allocated()
    began = time.perf_counter()
    draw(tuner.model, tuner.sampler, rows, ["a red cat"] * rows, 0)
    torch.cuda.synchronize()
    speed = rows / (time.perf_counter() - began)
    return {"seconds": seconds, "peak_gib": peak / GIB, "pictures_per_second": speed, **_counts(metrics)}


def _counts(metrics: Figures) -> Figures:
    kept = ("model_evaluations", "model_backward_rows", "grad_norm")
    return {key: metrics[key] for key in kept} | {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    }


def job(device: str, algorithm: str, rows: int) -> Figures:
    """One job, by device."""
    return on_cpu(algorithm) if device == "cpu" else on_gpu(algorithm, rows)


def main() -> None:
    from scoreaction import catalog

    parser = arguments(__doc__ or "", "pipelines")
    parser.set_defaults(processes=1)
    options = parser.parse_args()
    there = [name for name in ALGORITHMS if name in catalog.files("algorithm")]
    jobs = {f"cpu-{name}": {"device": "cpu", "algorithm": name, "rows": 1} for name in there}
    if torch.cuda.is_available():
        jobs |= {f"gpu-{name}-{n}": {"device": "cuda", "algorithm": name, "rows": n} for name in there for n in ROWS}
    run_jobs(job, jobs, options)


if __name__ == "__main__":
    main()
