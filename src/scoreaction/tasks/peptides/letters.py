"""Peptides as tokens: 20 amino acids and an end, 32 positions, and what is computed of their letters."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

ACIDS = "ACDEFGHIKLMNPQRSTVWY"
ALPHABET = ACIDS + "-"
"""The letter of each token; the last is the end, which fills all positions behind a peptide."""
END, VOCABULARY, LENGTH = len(ACIDS), len(ALPHABET), 32

HYDROPHOBICITY = {
    "A": 0.62, "C": 0.29, "D": -0.90, "E": -0.74, "F": 1.19, "G": 0.48, "H": -0.40, "I": 1.38, "K": -1.50, "L": 1.06,
    "M": 0.64, "N": -0.78, "P": 0.12, "Q": -0.85, "R": -2.53, "S": -0.18, "T": -0.05, "V": 1.08, "W": 0.81, "Y": 0.26,
}  # fmt: skip
"""The normalised consensus scale (Eisenberg, Schwarz, Komaromy and Wall 1984, J. Mol. Biol. 179, 125-142)."""
CHARGE = {"K": 1.0, "R": 1.0, "H": 0.1, "D": -1.0, "E": -1.0}
"""Elementary charges of side chains near pH 7, where a tenth of histidine is charged; the two ends of a peptide cancel."""


def tokens_of_peptides(peptides: Sequence[str]) -> Tensor:
    """Tokens (n, 32) of peptides of at most 32 letters, with ends behind them; ValueError for another letter or a longer one.

    >>> tokens_of_peptides(["AC"])[0, :4].tolist()
    [0, 1, 20, 20]
    """
    for peptide in peptides:
        other = set(peptide) - set(ACIDS)
        if other or len(peptide) > LENGTH:
            wrong = f"has {len(peptide)} letters" if not other else f"has the letters {''.join(sorted(other))}"
            raise ValueError(f"the peptide {peptide!r} {wrong}; at most {LENGTH} of {ACIDS} are read")
    rows = [[ACIDS.index(letter) for letter in peptide] + [END] * (LENGTH - len(peptide)) for peptide in peptides]
    return torch.tensor(rows, dtype=torch.long).reshape(len(rows), LENGTH)


def peptides_of_tokens(tokens: Tensor) -> list[str]:
    """The letters before the first end of each row of tokens (n, length).

    >>> peptides_of_tokens(torch.tensor([[8, 9, 20, 0], [0, 0, 1, 2]]))
    ['KL', 'AACD']
    """
    return ["".join(ALPHABET[token] for token in row).partition("-")[0] for row in tokens.tolist()]


def inside(tokens: Tensor) -> Tensor:
    """True at the letters of each peptide, before the first end: (n, length)."""
    return (tokens == END).cumsum(-1) == 0


def hydrophobic_moment(tokens: Tensor, degrees: float = 100.0) -> Tensor:
    """`|sum_k h_k exp(i k delta)|/L`, delta the turn of a residue in degrees: (n,), 0 of the empty peptide.

    h is Eisenberg's consensus scale, L the number of letters, k their positions; 100 degrees are an alpha helix. Eisenberg,
    Weiss and Terwilliger 1982 (Nature 299, 371-374). tokens (n, length) as `ALPHABET` has them.

    >>> [round(value, 4) for value in hydrophobic_moment(tokens_of_peptides(["I", "IR", ""])).tolist()]
    [1.38, 1.5426, 0.0]
    """
    scale = _table(HYDROPHOBICITY, tokens)[tokens] * inside(tokens)
    angle = torch.arange(tokens.shape[-1], device=tokens.device, dtype=torch.float64) * math.radians(degrees)
    moment = torch.hypot((scale * angle.cos()).sum(-1), (scale * angle.sin()).sum(-1))
    return moment / inside(tokens).sum(-1).clamp(min=1)


def net_charge(tokens: Tensor) -> Tensor:
    """The number of K and R, and a tenth of H, less that of D and E, before the first end: (n,) elementary charges.

    >>> net_charge(tokens_of_peptides(["KRH", "KDE", ""])).tolist()
    [2.1, -1.0, 0.0]
    """
    return (_table(CHARGE, tokens)[tokens] * inside(tokens)).sum(-1)


def _table(values: dict[str, float], tokens: Tensor) -> Tensor:
    return torch.tensor([values.get(letter, 0.0) for letter in ALPHABET], dtype=torch.float64, device=tokens.device)
