"""The verdict of a run and of a comparison. Truth: the figures it is given, read by hand; twins are told apart."""

from __future__ import annotations

from typing import Any

import numpy as np
from commanding import TINY
from test_report import SUMMARY
from twins import same

from scoreaction.cli import main
from scoreaction.commands.compare import grouped
from scoreaction.report.tiles import LARGE, SHOWN, tiles_of
from scoreaction.report.verdict import comparison_verdict, run_verdict

CLUSTERED = {"cluster_entropy_base": 1.386, "cluster_entropy_tuned": 0.65}
"""Less than half of the clusters that there were, in effect."""


def run(**changes: Any) -> str:
    return run_verdict({**SUMMARY, "reward_base_se": 0.1, "reward_tuned_se": 0.1, **changes})


def group(label: str, n: int = 3, error: float = 0.01, **mean: Any) -> dict[str, Any]:
    figures = {**SUMMARY, **mean}
    return {"label": label, "n": n, "mean": figures, "standard_error": dict.fromkeys(figures, error if n > 1 else None)}


def comparison(*groups: dict[str, Any]) -> str:
    return comparison_verdict({"groups": list(groups)})


def test_a_rise_is_one_beyond_its_errors() -> None:
    same("rose from 0.1 to 2 at a KL of 1.2 nats" in run(), True, fell=" rose " in run(reward_tuned=-2.0))
    chance = "can be told from chance"
    same(chance in run(reward_tuned=0.3), True, beyond=chance in run(reward_tuned=0.5))
    silent = run(reward_base=0.0, reward_tuned=0.0, reward_base_se=0.0, reward_tuned_se=0.0)
    same(chance in silent, False, of_chance=chance in run(reward_base=0.0, reward_tuned=0.0))
    assert silent.startswith("every sample has the reward 0, before and after, which says nothing of the run; at a KL of")
    same(run(reward_tuned=None), "the tuned model has no finite figures: it diverged", of_numbers=run())


def test_what_speaks_against_a_gain_is_said() -> None:
    for text, bad, good in (
        ("left the data behind", {"kl_nats": 6.0}, {"kl_nats": 5.0}),
        ("only 40% as diverse", {"diversity_tuned": 0.8}, {"diversity_tuned": 1.2}),
        ("fill 1.9 clusters in effect, 4 before", CLUSTERED, {**CLUSTERED, "cluster_entropy_tuned": 0.7}),
        ("the held-out legibility", {"held_out.legibility_tuned": 0.4}, {"held_out.legibility_tuned": 0.9}),
    ):
        same(text in run(**bad), True, where_it_is_not=text in run(**good))
    error = {"held_out.legibility_tuned_se": 0.3}
    same("held-out" in run(), True, within_its_error="held-out" in run(**error))
    close = "as close to the optimum as can be told"
    same(close in run(distance_to_optimum=0.15), True, far=close in run(distance_to_optimum=0.2))
    same("1.3 times as far" in run(distance_to_optimum=0.195), True, of_the_floor="2 times" in run(distance_to_optimum=0.195))
    tokens = {"objective_gap": 0.07, "distance_floor": 0.0, "distance_oracle": 0.0}
    same("0.07 below the best possible reward - 0.5 x KL" in run(**tokens), True, without="below" in run())


def test_the_best_is_by_what_the_recipe_maximises() -> None:
    near, far = group("near", distance_to_optimum=0.2), group("far", distance_to_optimum=9.0, reward_tuned=50.0, kl_nats=400.0)
    said = comparison(far, near)
    same(said.startswith("near is closest to the optimum (0.2); next is far (9), "), True, by_reward=said.startswith("far"))
    same("far has left the data behind" in said, True, near="near has" in said)
    same("standard errors behind" in said, True, one_seed="errors" in comparison(group("a", 1), group("b", 1)))
    alike = comparison(near, group("other", error=0.2, distance_to_optimum=0.3))
    same("3 seeds cannot tell them apart" in alike, True, apart="cannot" in said)
    unknown = {k: v for k, v in SUMMARY.items() if "optimum" not in k and "distance" not in k}
    cheap, dear = (
        {"label": name, "n": 1, "mean": {**unknown, "reward_tuned": reward, "kl_nats": kl}, "standard_error": {}}
        for name, reward, kl in (("cheap", 2.0, 1.0), ("dear", 3.0, 4.0))
    )
    by_beta = comparison(dear, cheap)
    same(by_beta.startswith("cheap has the highest reward - 0.5 x KL (1.5 at 1 nats)"), True, by_reward="dear has" in by_beta)
    free = comparison(*({**g, "mean": {**g["mean"], "beta": None}} for g in (dear, cheap)))
    same(free.startswith("dear has the highest reward (3 at 4 nats)"), True, by_beta="cheap has" in free)
    gone = {**cheap, "label": "gone", "mean": {**cheap["mean"], "reward_tuned": None, "kl_nats": None}}
    same(comparison(dear, gone).endswith("; gone diverged"), True, all_there="diverged" in comparison(dear, cheap))


def test_the_terminal_has_it_too(tmp_path: Any, capsys: Any) -> None:
    assert main(["train", "mixture", *TINY, "train.iterations=1", "--output", str(tmp_path / "run")]) == 0
    lines = capsys.readouterr().out.splitlines()
    same([line.split(":")[0] for line in lines[-2:]], ["verdict", "run"], without=[line.split(":")[0] for line in lines[-3:-1]])


def test_pictures_stand_over_their_prompts_one_of_each_first() -> None:
    """Twin: the first so many, of which some prompts would have none."""
    prompts = [f"prompt {i // 2}" for i in range(4 * SHOWN)]
    pictures = np.linspace(0, 1, len(prompts))[:, None, None, None] * np.ones((1, 3, 4, 4))
    box = tiles_of("Before and after", "", {"before": pictures, "after": 1 - pictures}, prompts)
    same(len({tile.prompt for tile in box.tiles}), SHOWN, first_so_many=len(set(prompts[:SHOWN])))
    few = tiles_of("", "", {"before": pictures}, ["a", "b"] * (2 * SHOWN))
    same([tile.prompt for tile in few.tiles[:13]], ["a"] * 0 + ["a", "b"] * 6 + ["a"], sorted=["a"] * 13)
    large = tiles_of("", "", {"before": np.zeros((1, 3, LARGE, LARGE))}, None)
    same(
        large.tiles[0].pictures[0].startswith("data:image/jpeg"),
        True,
        small=box.tiles[0].pictures[0].startswith("data:image/jpeg"),
    )
    same(box.small, True, large=large.small)


def test_what_diverged_is_neither_hidden_nor_in_the_way() -> None:
    """Of two seeds one has no KL: the mean of the other is none. Truth: the seed that has one, alone."""
    fine = {"label": "a", "algorithm": "a", "value": None, "summary": {"reward_tuned": 2.0, "kl_nats": 1.0}}
    lost = {**fine, "summary": {"reward_tuned": 2.0, "kl_nats": None}}
    for seeds in ([fine, lost], [lost, fine]):
        same(
            "kl_nats" in grouped(seeds)[0]["mean"], False, of_those_that_have_one="kl_nats" in grouped([fine, fine])[0]["mean"]
        )
    b = {"label": "b", "algorithm": "b", "value": None, "summary": {"reward_tuned": 1.0, "kl_nats": 1.0, "beta": 0.5}}
    a = {**lost, "summary": {**lost["summary"], "beta": 0.5}}
    same(comparison(*grouped([a, b])).startswith("b has"), True, by_reward=comparison(*grouped([fine, b])).startswith("b has"))
    none = run(distance_to_optimum=None)
    same("optimum" in none, False, with_a_distance="optimum" in run(distance_to_optimum=0.15))
    same("below" in run(objective_gap=None), False, with_a_gap="below" in run(objective_gap=0.1))
