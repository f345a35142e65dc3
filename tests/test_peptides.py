"""Truth: moments and charges by hand and as modlamp 4.3.3 documents them, peptides of a known kind, closed forms of losses."""

import csv
import math
from unittest.mock import patch

import numpy as np
import pytest
import torch
from twins import accepts, close, same
from typer.testing import CliRunner

import scoreaction as sa
from scoreaction.models import peptides
from scoreaction.recipes.build import build
from scoreaction.recipes.recipe import load_recipe
from scoreaction.report.parts import letters_of, samples_of
from scoreaction.report.token_figures import tokens_figure
from scoreaction.rewards import antimicrobial, hydrophobic_moment, net_charge
from scoreaction.tasks.fitting import masked_loss
from scoreaction.tasks.peptides import letters, networks
from scoreaction.tasks.peptides.letters import ALPHABET, END, LENGTH, VOCABULARY, peptides_of_tokens, tokens_of_peptides
from scoreaction.tasks.peptides.networks import AntimicrobialNet, PeptidesNet
from scoreaction.tasks.peptides.pretrain import FILE, command, data_file, read_peptides, split

ANTIMICROBIAL = [
    "GIGKFLHSAKKFGKAFVGEIMNS",  # magainin 2
    "GIGAVLKVLTTGLPALISWIKRKRQQ",  # melittin
    "ILPWKWPWWPWRR",  # indolicidin
    "FLPLIGRVLSGIL",  # temporin A
    "RGGRLCYCRRRFCVCVGR",  # protegrin 1
    "KWKLFKKIGAVLKVL",  # of cecropin A and melittin
]
OTHERS = [
    "HSQGTFTSDYSKYLDSRRAQDFVQWLMNT",  # glucagon
    "DRVYIHPFHL",  # angiotensin I
    "DAEFRHDSGYEVHHQKLVFFAEDVGSNK",  # amyloid beta 1-28
    "SYSMEHFRWGKPV",  # of corticotropin
    "MSTNPKPQRKTKRNTNRRPQDVKFPGG",  # of a virus's core
    "DEDEGSTDEDEGSTDE",
]
REWARDS = {module.__name__.rpartition(".")[2]: module for module in (antimicrobial, hydrophobic_moment, net_charge)}


def test_peptides_are_tokens_and_back():
    """Twin: an end in the middle is forgotten."""
    tokens = tokens_of_peptides([*ANTIMICROBIAL, ""])
    same(peptides_of_tokens(tokens), [*ANTIMICROBIAL, ""], shifted=peptides_of_tokens((tokens + 1) % VOCABULARY))
    behind = tokens.clone()
    behind[:, -1] = 3
    same(peptides_of_tokens(behind), [*ANTIMICROBIAL, ""], all_letters=["".join(ALPHABET[i] for i in row) for row in behind])
    for wrong, said in (("ABC", "has the letters B"), ("A" * 33, "has 33 letters")):
        with pytest.raises(ValueError, match=f"^the peptide '{wrong}' {said}"):
            tokens_of_peptides([wrong])


def test_the_moment_is_what_a_hand_and_modlamp_find():
    """Two letters at 100 degrees are 1.38 cos 50; modlamp's page of `calculate_moment` has .48790226, by a scale of two digits.

    Twins: another angle, a sum in place of a mean.
    """
    by_hand = 1.38 * math.cos(math.radians(50))
    pair = tokens_of_peptides(["II"])
    close(
        letters.hydrophobic_moment(pair), by_hand, atol=1e-12, strand=letters.hydrophobic_moment(pair, 180.0), sum=2 * by_hand
    )
    tokens = tokens_of_peptides(["GLFDIVKKVVGALGSL"])
    two_digits = {letter: float(f"{value:.2g}") for letter, value in letters.HYDROPHOBICITY.items()}
    with patch.object(letters, "HYDROPHOBICITY", two_digits):
        documented = letters.hydrophobic_moment(tokens)
    ours = hydrophobic_moment.build(hydrophobic_moment.Config())(tokens, None)
    close(documented, 0.48790226, atol=5e-9, of_the_whole_scale=ours)
    close(ours, 0.48790226, atol=0.01, sum=16 * ours)
    half = hydrophobic_moment.build(hydrophobic_moment.Config(unit=2.0))(tokens, None)
    close(2 * half, ours, atol=1e-6, no_unit=half)


def test_the_charge_is_what_a_hand_and_modlamp_find():
    """modlamp's page of `calculate_charge`: 3.989 of KLAKFGKRSELVALSG at pH 7.4, its end amidated; .990 is the other end's.

    Twins: an acid that counts as nothing, a whole histidine.
    """
    charge = net_charge.build(net_charge.Config())
    found = charge(tokens_of_peptides(["KLAKFGKRSELVALSG", "HHKD"]), None)
    first_end = 1 / (1 + 10 ** (7.4 - 9.38))
    close(found[0], 3.989 - first_end, atol=1e-3, with_the_end=3.989, no_acid=4.0)
    close(found[1], 0.2, atol=1e-6, whole_histidine=2.0)
    close(net_charge.build(net_charge.Config(unit=0.5))(tokens_of_peptides(["KK"]), None), 4.0, no_unit=2.0)


@pytest.mark.parametrize("name", REWARDS)
def test_what_stands_behind_the_end_does_not_count(name):
    """Twin: without the end. And an empty peptide has a score."""
    reward = REWARDS[name].build(REWARDS[name].Config())
    tokens = tokens_of_peptides(["GIGKFLHSAKKFGKAF"])
    behind, joined = tokens.clone(), tokens.clone()
    behind[:, 17:25] = joined[:, 16:24] = tokens_of_peptides(["RRIRRWRD"])[:, :8]
    close(reward(behind, None), reward(tokens, None), atol=1e-6, without_the_end=reward(joined, None))
    assert torch.isfinite(reward(tokens_of_peptides([""]), None)).all()


@pytest.mark.parametrize("judge", [False, True])
def test_the_classifiers_know_well_known_peptides(judge):
    """Six of each kind, one mistake at most. Twins: kinds exchanged, the letters in the order of the alphabet."""
    reward = antimicrobial.build(antimicrobial.Config(judge=judge))

    def knows(peptides):
        right = torch.cat(
            [s * (reward(tokens_of_peptides(p), None).exp() - 0.5) for s, p in zip((1, -1), peptides, strict=True)]
        )
        assert int((right > 0).sum()) >= 11, right

    ordered = [["".join(sorted(peptide)) for peptide in kind] for kind in (ANTIMICROBIAL, OTHERS)]
    accepts(knows, (ANTIMICROBIAL, OTHERS), exchanged=(OTHERS, ANTIMICROBIAL), ordered=ordered)
    tokens = tokens_of_peptides(ANTIMICROBIAL + OTHERS)
    share = antimicrobial.build(antimicrobial.Config(judge=judge, correct=True))(tokens, None)
    same(share, (reward(tokens, None) > math.log(0.5)).float(), log=reward(tokens, None))
    other = antimicrobial.build(antimicrobial.Config(judge=not judge))(tokens, None)
    assert not torch.allclose(other, reward(tokens, None), atol=0.01), "the judge is the reward"


def test_every_position_sees_both_sides():
    """Twin: the attention of a causal network."""
    torch.manual_seed(0)

    def sees(causal):
        net = PeptidesNet(16, 1, 2)
        for block in net.blocks:
            block.causal = causal
        torch.nn.init.normal_(net.head.weight)
        x = tokens_of_peptides(["ACDEFG"])
        other = torch.where(torch.arange(LENGTH) == 5, 7, x)
        with torch.no_grad():
            moved = (net(x, torch.ones(1), None) - net(other, torch.ones(1), None)).abs().amax(2)[0]
        assert bool((moved > 0).all()), moved

    accepts(sees, False, causal=True)


def test_the_loss_of_even_tokens_is_log_21():
    """Twins: a sum over positions, letters without the end."""
    tokens = tokens_of_peptides(ANTIMICROBIAL)
    with torch.no_grad():
        found = masked_loss(PeptidesNet(16, 1, 2), tokens, None, torch.Generator().manual_seed(0), mask=VOCABULARY)
    close(found, math.log(VOCABULARY), atol=1e-5, summed=LENGTH * math.log(VOCABULARY), no_end=math.log(END))


def file_of(folder, rows):
    path = folder / FILE
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["9", "1", "UniProt", "AMP"], *rows])
    return path


def synthetic(folder, n=60):
    """A file of n peptides of 7 to 32 letters, in which K says antimicrobial, and of some that are left out."""
    rng = np.random.default_rng(0)
    rows = [["".join(rng.choice(list("AGLV" + "KE"[i % 2]), int(rng.integers(7, 33)))), f" {1 - i % 2}"] for i in range(n)]
    return file_of(folder, [*rows, rows[0], ["ACDEFGHI", "1"], ["ACDEFGHI", "0"], ["ACD", "1"], ["K" * 33, "1"]])


def test_the_data_are_peptides_of_one_label_and_halves_are_apart(tmp_path):
    """Twins: rows that are left out; the halves exchanged for one."""
    data = read_peptides(synthetic(tmp_path))
    same(len(data.labels), 60, with_those_of_two_labels=61, all_rows=65)
    assert {"ACDEFGHI", "ACD"}.isdisjoint(peptides_of_tokens(data.tokens))

    def apart(parts):
        rows = [set(peptides_of_tokens(part)) for part in parts]
        assert not rows[0] & rows[1]
        assert sum(map(len, rows)) == 60

    halves = [half.tokens for half in data.halves()]
    accepts(apart, halves, the_same=[halves[0], halves[0]])
    accepts(apart, split(data), the_same=split(data)[:1] * 2)
    with (
        pytest.raises(ValueError, match=f"^--data: modlamp is not installed; .*data/{FILE}"),
        patch("scoreaction.tasks.peptides.pretrain.find_spec", lambda name: None),
    ):
        data_file()


@pytest.mark.slow
def test_the_shipped_samples_are_like_peptides():
    """About 21 letters, 1.7 charges, half of them antimicrobial, nine in ten end once. Twins: even tokens, no end."""
    x = sa.sample(peptides.build(peptides.Config()), n=64)
    judge = antimicrobial.build(antimicrobial.Config(judge=True, correct=True))

    def alike(x):
        inside = letters.inside(x)
        assert 18 < float(inside.sum(1).float().mean()) < 24
        assert 0.5 < float(letters.net_charge(x).mean()) < 3
        assert 0.35 < float(judge(x, None).mean()) < 0.75
        assert float((~inside & (x != END)).any(1).float().mean()) < 0.2

    even = torch.randint(0, VOCABULARY, (64, LENGTH), generator=torch.Generator().manual_seed(0))
    accepts(alike, x, even=even, no_end=even % END)


def test_a_figure_writes_letters():
    """Twin: the numbers of tokens."""
    samples = {"before": np.array([[0, 1, 2]]), "after": np.array([[0, 0, 2]])}

    def written(letters):
        figure = tokens_figure(samples, letters)
        assert [text.get_text() for text in figure.axes[1].texts] == ["A", "A", "-"]
        assert [tick.get_text() for tick in figure.axes[2].get_xticklabels()] == ["A", "B", "-"]

    accepts(written, "AB-", numbers=None)


@pytest.mark.slow
def test_the_recipe_trains_and_its_samples_have_letters(tmp_path):
    """Figures of all judges, `letters` beside the samples. Twin: the letters of another model."""
    small = ["train.iterations=1", "train.batch=8", "evaluation.n=8", "algorithm.rows=8", "algorithm.updates=1"]
    tuner = build(load_recipe("peptides", small), tmp_path / "run")
    list(tuner)
    summary = tuner.summary()
    judged = {f"held_out.{name}_tuned" for name in ("antimicrobial", "net_charge", "hydrophobic_moment")}
    assert judged <= summary.keys(), summary.keys()
    same(letters_of(tmp_path / "run"), ALPHABET, none=None)
    assert letters_of(tmp_path) is None
    same(samples_of(tmp_path / "run", "base").shape, (8, LENGTH), letters_alone=(8, END))


@pytest.mark.long
def test_the_retraining_command_writes_what_the_model_loads(tmp_path):
    data, words = synthetic(tmp_path), ["--batches", "2", "--classifier-batches", "2", "--output", str(tmp_path)]
    done = CliRunner().invoke(command, [*words, "--data", str(data)])
    assert done.exit_code == 0, done.output
    assert "held-out loss" in done.output
    assert sa.sample(peptides.build(peptides.Config(path=tmp_path)), n=2).shape == (2, LENGTH)
    with patch.object(networks, "shipped", lambda: tmp_path):
        again = AntimicrobialNet()
        again.load_state_dict(networks.judge.__wrapped__().state_dict())
    assert not torch.equal(again.last.weight, networks.judge().last.weight)
    for wrong in (["--data", "/nowhere"], ["--data", str(data), "--only", "judge"]):
        assert CliRunner().invoke(command, [*words, *wrong]).exit_code == 2


def test_what_is_no_peptide_is_refused():
    """Pictures, tokens of a larger vocabulary, other letters than tokens, a folder without weights."""
    for name, module in REWARDS.items():
        reward = module.build(module.Config())
        for samples in (torch.rand(2, 1, 8, 8), torch.rand(2, LENGTH), torch.full((2, LENGTH), VOCABULARY)):
            with pytest.raises(ValueError, match=f"^{name}: scores tokens.*take the model peptides$"):
                reward(samples, None)
    with pytest.raises(ValueError, match=r"^path: /nowhere has no masked.safetensors.*python -m scoreaction.tasks.peptides"):
        peptides.build(peptides.Config(path="/nowhere"))
    with pytest.raises(ValueError, match=r"^letters: must be one for each of 21 tokens \(got 20\)"):
        sa.MaskedModel(PeptidesNet(16, 1, 2), process=sa.Masking(VOCABULARY), length=LENGTH, letters=letters.ACIDS)
