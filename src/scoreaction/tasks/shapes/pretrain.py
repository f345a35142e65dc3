"""Pretraining of the shipped `shapes`: a Stable Diffusion of two million parameters, and a scorer of its pictures.

Run as `python -m scoreaction.tasks.shapes.pretrain --output DIR [--seed K]`. Data: pictures drawn by `scenes.draw`, each with
a caption that is wrong on purpose in places, so that the model follows prompts imperfectly. On a CPU the same seed and
number of threads give the same files.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import AutoencoderKL
from rich.console import Console
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from scoreaction.diffusion.processes import TableVP
from scoreaction.tasks.fitting import fit, new_scheduler, noisy, save_half
from scoreaction.tasks.shapes import parts
from scoreaction.tasks.shapes.scenes import COLOURS, RELATIONS, SHAPES, Scene, all_scenes, draw
from scoreaction.tasks.shapes.scorer import Scorer, scene_ids

WRONG = (0.25, 0.1, 0.1, 0.07, 0.12)
"""Probability, in each stage, that a caption names another colour, shape, count or relation, drawn for each independently. That
of the last stage decides how often the model errs."""
CAPTION_DROPOUT = 0.12
"""Share of pictures without their caption, for classifier-free guidance (Ho and Salimans 2022)."""
VAE_PICTURES = 4_096
"""Largest number of pictures that the autoencoder is trained on."""


def random_scenes(n: int, generator: Generator) -> list[Scene]:
    """Draws n scenes: half of them pairs, a sixth each of one, two and three things."""
    scenes = all_scenes()
    counted, pairs = scenes[: len(scenes) - 528], scenes[-528:]
    which = torch.randint(0, 2, (n,), generator=generator).tolist()
    rows = torch.randint(0, len(counted) * len(pairs), (n,), generator=generator).tolist()
    return [pairs[row % len(pairs)] if pair else counted[row % len(counted)] for pair, row in zip(which, rows, strict=True)]


def altered(scene: Scene, chance: float, generator: Generator) -> Scene:
    """Replaces each attribute of a scene by another with this probability; the result has a caption too."""

    def other(value: Any, values: list[Any]) -> Any:
        hit, pick = torch.rand(2, generator=generator).tolist()
        rest = [v for v in values if v != value]
        return rest[int(pick * len(rest))] if hit < chance else value

    def thing(now: tuple[str, str]) -> tuple[str, str]:
        return other(now[0], list(COLOURS)), other(now[1], list(SHAPES))

    if scene.relation is None:
        return Scene((thing(scene.things[0]),) * other(len(scene.things), [1, 2, 3]))
    relation = other(scene.relation, list(RELATIONS))
    while True:
        first, second = (thing(t) for t in scene.things)
        if first != second:
            return Scene((first, second), relation)


def train_vae(seed: int, batches: int, pictures: int, console: Console) -> Any:
    """Trains the autoencoder on squared error plus 1e-4 times the mean KL of a latent to N(0, 1); latents get variance 1."""
    generator = Generator().manual_seed(seed)
    torch.manual_seed(seed)
    net = parts.new_vae()
    data = 2 * draw(random_scenes(min(pictures, VAE_PICTURES), generator), generator) - 1

    def loss() -> Tensor:
        x = data[torch.randint(0, len(data), (24,), generator=generator)]
        posterior = net.encode(x).latent_dist
        z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        return F.mse_loss(net.decode(z).sample, x) + 1e-4 * kl

    vae: Any = fit(net, loss, batches=batches, lr=3e-3, name="autoencoder", console=console, decay=0.99)
    latents = encoded(vae, data[:1024])
    vae.register_to_config(scaling_factor=float(1 / latents.std()))
    with torch.no_grad():
        error = F.mse_loss(vae.decode(latents).sample, data[:1024]).item() / 4
    console.print(f"autoencoder: mean squared error {error:.5f} for pixels in [0, 1]", highlight=False)
    return vae


@torch.no_grad()
def encoded(vae: Any, pictures: Tensor) -> Tensor:
    """Encodes pictures in [-1, 1] as the means of their latents, unscaled."""
    return torch.cat([vae.encode(x).latent_dist.mean for x in pictures.split(256)])


def train_diffusion(vae: Any, seed: int, batches: tuple[int, ...], pictures: int, console: Console) -> tuple[Any, Any]:
    """Trains text encoder and UNet on `E ||v - unet(alpha z + sigma eps, t, text)||^2`, `v = alpha eps - sigma z`."""
    generator = Generator().manual_seed(seed + 1)
    torch.manual_seed(seed + 1)
    tokenizer = parts.new_tokenizer()
    net: Any = nn.ModuleDict({"text": parts.new_text_encoder(tokenizer), "unet": parts.new_unet()})
    process = TableVP.from_scheduler(new_scheduler(steps_offset=1).alphas_cumprod, ends_at_data=True)
    scenes = random_scenes(pictures, generator)
    latents = encoded(vae, 2 * draw(scenes, generator) - 1) * vae.config.scaling_factor
    captions = ["", *(scene.caption for scene in all_scenes())]
    row_of = {caption: row for row, caption in enumerate(captions)}
    tokens = tokenizer(captions, padding="max_length", max_length=parts.LENGTH, return_tensors="pt").input_ids
    size = 64

    def loss(wrong: float, generator: Generator) -> Tensor:
        index = torch.randint(0, len(latents), (size,), generator=generator)
        caption = torch.tensor([row_of[altered(scenes[i], wrong, generator).caption] for i in index.tolist()])
        caption = torch.where(torch.rand(size, generator=generator) < CAPTION_DROPOUT, 0, caption)
        t, x, v = noisy(process, latents[index], generator)
        text = net["text"](tokens[caption]).last_hidden_state
        return F.mse_loss(net["unet"](x, process.timestep(t).float(), text).sample, v)

    for stage, (wrong, n) in enumerate(zip(WRONG, batches, strict=True)):
        if stage:
            generator = Generator().manual_seed(seed + 3 + stage)
            net.requires_grad_(True).train()
        part = partial(loss, wrong, generator)
        net = fit(net, part, batches=n, lr=1.5e-3, name=f"diffusion {stage + 1}", console=console, decay=0.998)
    return net["text"], net["unet"]


def train_scorer(seed: int, batches: int, pictures: int, console: Console) -> Scorer:
    """Trains the scorer to tell right from wrong captions of pictures, some of which are blurred or noisy."""
    generator = Generator().manual_seed(seed + 2)
    torch.manual_seed(seed + 2)
    scenes = random_scenes(pictures, generator)
    data = draw(scenes, generator)
    net, size = Scorer(), 64

    def loss() -> Tensor:
        index = torch.randint(0, len(data), (size,), generator=generator)
        x = degraded(data[index], generator)
        right = scene_ids([scenes[i] for i in index.tolist()])
        wrong = scene_ids([_wrong(scenes[i], generator) for i in index.tolist()])
        logits = torch.stack([net(x, right), -net(x, wrong)])
        return F.softplus(-logits).mean()

    return fit(net, loss, batches=batches, lr=1.5e-3, name="scorer", console=console, decay=0.99)


def _wrong(scene: Scene, generator: Generator) -> Scene:
    """Draws a different scene: this one with a few attributes altered, or any other."""
    draw_one: list[Callable[[], Scene]] = [lambda: altered(scene, 0.3, generator), lambda: random_scenes(1, generator)[0]]
    while True:
        other = draw_one[int(torch.rand((), generator=generator) < 0.25)]()
        if other != scene:
            return other


def degraded(pictures: Tensor, generator: Generator) -> Tensor:
    """Blurs a third of the pictures and adds noise to another third."""
    kind = torch.randint(0, 3, (len(pictures), 1, 1, 1), generator=generator)
    blurred = F.avg_pool2d(pictures, 3, stride=1, padding=1, count_include_pad=False)
    noise = 0.1 * torch.randn(pictures.shape, generator=generator)
    return torch.where(kind == 0, pictures, torch.where(kind == 1, blurred, (pictures + noise).clamp(0, 1)))


@torch.no_grad()
def scorer_accuracy(net: Scorer, seed: int, n: int) -> float:
    """Share of new pictures on which the right caption outscores one with altered attributes."""
    generator = Generator().manual_seed(seed + 3)
    scenes = random_scenes(n, generator)
    wrong = [_wrong(scene, generator) for scene in scenes]
    pictures = draw(scenes, generator)
    return float((net(pictures, scene_ids(scenes)) > net(pictures, scene_ids(wrong))).float().mean())


def main(
    output: Annotated[Path, typer.Option(help="Folder to write; it is made if missing.")],
    seed: Annotated[int, typer.Option(help="Seed of everything drawn.")] = 0,
    vae_batches: Annotated[int, typer.Option(help="Batches of 24 for the autoencoder.")] = 2000,
    batches: Annotated[
        tuple[int, int, int, int, int], typer.Option(help="Batches of 64 for text encoder and UNet, stage by stage.")
    ] = (3500, 4000, 6000, 5000, 1000),
    scorer_batches: Annotated[int, typer.Option(help="Batches of 64 for the scorer.")] = 6000,
    pictures: Annotated[
        int, typer.Option(help="Pictures drawn for the diffusion model and, at most, the autoencoder.")
    ] = 20_000,
    scorer_pictures: Annotated[int, typer.Option(help="Pictures drawn for the scorer.")] = 30_000,
    only: Annotated[str, typer.Option(help="vae, diffusion (with the autoencoder of the folder), scorer or all.")] = "all",
) -> None:
    """Trains the networks and saves them in half precision."""
    if only not in ("all", "vae", "diffusion", "scorer"):
        raise typer.BadParameter(f"--only takes vae, diffusion, scorer or all, not {only!r}")
    console = Console()
    torch.set_num_threads(1)
    output.mkdir(parents=True, exist_ok=True)
    if only in ("all", "scorer"):
        scorer = train_scorer(seed, scorer_batches, scorer_pictures, console)
        right = scorer_accuracy(scorer, seed, min(scorer_pictures, 2000))
        console.print(f"scorer: prefers the right caption of {right:.4f} new pictures", highlight=False)
        (output / "scorer").mkdir(exist_ok=True)
        save_half(scorer, output / "scorer" / "scorer.safetensors")
    if only in ("all", "vae"):
        train_vae(seed, vae_batches, pictures, console).half().save_pretrained(output / "vae")
    if only in ("all", "diffusion"):
        vae: Any = AutoencoderKL.from_pretrained(output, subfolder="vae", torch_dtype=torch.float32).eval()
        vae.register_to_config(_name_or_path="shapes")  # else the path of the folder is stored
        text_encoder, unet = train_diffusion(vae, seed, batches, pictures, console)
        parts.assemble(vae, text_encoder, unet).to(torch.float16).save_pretrained(output)
    for file in output.rglob("*.safetensors"):
        file.chmod(0o644)
    console.print(f"saved in {output}")


if __name__ == "__main__":
    typer.run(main)
