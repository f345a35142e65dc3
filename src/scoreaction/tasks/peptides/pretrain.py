"""Pretraining of the shipped peptides: a masked diffusion model and two classifiers of disjoint halves.

Run as `python -m scoreaction.tasks.peptides.pretrain --output DIR [--data FILE] [--seed K] [--batches N]`. Data: the peptides
of 7 to 32 letters in AMPvsUniProt.csv of the package modlamp (Mueller et al. 2017, doi 10.1093/bioinformatics/btx285), which
is read where modlamp is installed, or from FILE. On a CPU the same seed and number of threads give the same files.
"""

from __future__ import annotations

import csv
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from rich.console import Console
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from scoreaction.tasks.fitting import fit, masked_loss, save_half
from scoreaction.tasks.peptides.letters import LENGTH, VOCABULARY, tokens_of_peptides
from scoreaction.tasks.peptides.networks import AntimicrobialNet, PeptidesNet

FILE, SHORTEST, SIZE = "AMPvsUniProt.csv", 7, 128
HELD_OUT = 10
"""One in so many peptides is kept from the diffusion model, for its loss."""


class Peptides(NamedTuple):
    """Tokens (n, 32) and labels (n,), 1 for antimicrobial, in a shuffled order that is always the same."""

    tokens: Tensor
    labels: Tensor

    def part(self, rows: slice) -> Peptides:
        """Some of them."""
        return Peptides(self.tokens[rows], self.labels[rows])

    def halves(self) -> tuple[Peptides, Peptides]:
        """The half of the reward's classifier, and that of the judge."""
        return self.part(slice(0, None, 2)), self.part(slice(1, None, 2))


def data_file() -> Path:
    """The file in an installed modlamp, none of whose code is run; ValueError without it."""
    spec = find_spec("modlamp")
    if spec is None or spec.origin is None:
        raise ValueError(f"--data: modlamp is not installed; pip install modlamp, or give the path of its data/{FILE}")
    return Path(spec.origin).parent / "data" / FILE


def read_peptides(file: Path) -> Peptides:
    """Peptides of 7 to 32 letters, each once; those that the file has with both labels are left out."""
    with file.open(newline="", encoding="utf-8") as lines:
        rows = [[cell.strip() for cell in row] for row in list(csv.reader(lines))[1:]]
    labels: dict[str, set[int]] = {}
    for peptide, label in rows:
        labels.setdefault(peptide, set()).add(int(label))
    known = {peptide: own for peptide, own in labels.items() if len(own) == 1 and SHORTEST <= len(peptide) <= LENGTH}
    order = torch.randperm(len(known), generator=Generator().manual_seed(0))
    tokens = tokens_of_peptides(list(known))
    return Peptides(tokens[order], torch.tensor([label for (label,) in known.values()])[order])


def split(peptides: Peptides) -> tuple[Tensor, Tensor]:
    """Tokens that the diffusion model is trained on, and those that are kept from it."""
    kept = torch.arange(len(peptides.tokens)) % HELD_OUT == 0
    return peptides.tokens[~kept], peptides.tokens[kept]


@torch.no_grad()
def held_out_loss(net: nn.Module, tokens: Tensor, draws: int = 8) -> float:
    """The loss in nats a position, the mean over draws of what is masked, the same for every network."""
    generator = Generator().manual_seed(0)
    return sum(float(masked_loss(net, tokens, None, generator, mask=VOCABULARY)) for _ in range(draws)) / draws


def train_network(peptides: Peptides, seed: int, batches: int, console: Console) -> PeptidesNet:
    """Trains the diffusion model on nine tenths of the peptides, of both labels, in batches of 128."""
    generator = Generator().manual_seed(seed)
    torch.manual_seed(seed)
    net, (tokens, kept) = PeptidesNet(), split(peptides)

    def loss() -> Tensor:
        rows = torch.randint(0, len(tokens), (SIZE,), generator=generator)
        return masked_loss(net, tokens[rows], None, generator, mask=VOCABULARY)

    net = fit(net, loss, batches=batches, lr=2e-3, name="peptides", console=console, decay=0.99)
    console.print(f"held-out loss {held_out_loss(net, kept):.4f} nats a position, of {len(kept)} peptides", highlight=False)
    return net


def train_classifiers(peptides: Peptides, seed: int, batches: int, console: Console) -> list[AntimicrobialNet]:
    """Trains the reward's classifier on one half of the labels, and the judge on the other."""
    out, halves = [], peptides.halves()
    for i, (half, other) in enumerate((halves, halves[::-1])):
        generator = Generator().manual_seed(seed + 1 + i)
        torch.manual_seed(seed + 1 + i)
        net = AntimicrobialNet()

        def loss(net: AntimicrobialNet, half: Peptides, generator: Generator) -> Tensor:
            rows = torch.randint(0, len(half.labels), (SIZE,), generator=generator)
            return F.binary_cross_entropy_with_logits(net(half.tokens[rows]), half.labels[rows].float())

        learn = partial(fit, batches=batches, lr=2e-3, console=console, decay=0.99)
        net = learn(net, partial(loss, net, half, generator), name=("reward classifier", "judge")[i])
        console.print(f"{accuracy(net, other):.4f} right on the other half", highlight=False)
        out.append(net)
    return out


@torch.no_grad()
def accuracy(net: AntimicrobialNet, peptides: Peptides) -> float:
    """The share of peptides whose label a classifier reads, in [0, 1]."""
    return float(((net(peptides.tokens) > 0) == (peptides.labels == 1)).float().mean())


def main(
    output: Annotated[Path, typer.Option(help="Folder to write; it is made if missing.")],
    data: Annotated[Path | None, typer.Option(help=f"{FILE}; by default that of an installed modlamp.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything drawn.")] = 0,
    batches: Annotated[int, typer.Option(help="Batches of 128 for the diffusion model.")] = 1000,
    classifier_batches: Annotated[int, typer.Option(help="Batches of 128 for each classifier.")] = 400,
    only: Annotated[str, typer.Option(help="masked, classifiers or all.")] = "all",
) -> None:
    """Trains the networks and saves them in half precision; they are loaded in float32."""
    if only not in ("all", "masked", "classifiers"):
        raise typer.BadParameter(f"--only takes masked, classifiers or all, not {only!r}")
    try:
        peptides = read_peptides(data or data_file())
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    console = Console()
    torch.set_num_threads(1)
    output.mkdir(parents=True, exist_ok=True)
    if only != "masked":
        reward, judge = train_classifiers(peptides, seed, classifier_batches, console)
        save_half(reward, output / "reward_classifier.safetensors")
        save_half(judge, output / "judge.safetensors")
    if only != "classifiers":
        save_half(train_network(peptides, seed, batches, console), output / "masked.safetensors")
    console.print(f"saved in {output}")


command = typer.Typer(add_completion=False)
command.command()(main)

if __name__ == "__main__":
    command()
