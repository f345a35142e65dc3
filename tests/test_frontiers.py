"""Truth: a comparison written by hand; its points, their order and their errors are what the figure shows."""

import json

import pytest
from twins import accepts, close, same

from scoreaction.cli import main
from scoreaction.report.comparison import comparison_part
from scoreaction.report.frontiers import frontier_figures, line_of


def group(algorithm, value, reward, kl, *, error=0.1, **more):
    mean = {"reward_tuned": reward, "reward_base": 0.5, "kl_nats": kl, "diversity_tuned": 2 - kl, "diversity_base": 2.0, **more}
    errors = {key: error and error * (4 if key == "reward_tuned" else 1) for key in mean}
    return {"label": f"{algorithm} {value}", "algorithm": algorithm, "value": value, "mean": mean, "standard_error": errors}


GROUPS = [
    group("sqdf", "10", 1.0, 0.2),
    group("sqdf", "2", 2.0, 0.6),
    group("ddpo", None, 3.0, 1.5, error=None),
]
FOUND = {"sweep": "algorithm.beta=10,2", "groups": GROUPS}


def test_a_line_is_an_algorithms_points_in_the_order_of_the_setting():
    points = line_of(GROUPS, "sqdf", "kl_nats")
    close(
        [point[1:] for point in points],
        [(0.6, 0.1, 2.0, 0.4), (0.2, 0.1, 1.0, 0.4)],
        as_texts=[p[1:] for p in points[::-1]],
        errors_of_the_other_axis=[(x, y_error, y, x_error) for _, x, x_error, y, y_error in points],
    )
    assert [point[0] for point in points] == ["2", "10"]
    assert line_of(GROUPS, "ddpo", "kl_nats") == [(None, 1.5, 0.0, 3.0, 0.0)]


def drawn(figure):
    """Every point with its label, and the texts beside points."""
    (axis,) = figure.axes
    handles, labels = axis.get_legend_handles_labels()
    lines = [handle[0] if isinstance(handle, tuple) else handle for handle in handles]
    return {label: list(map(tuple, line.get_xydata().tolist())) for label, line in zip(labels, lines, strict=True)}


def bars(figure):
    """Half the length of the error bars of the first algorithm's first point: across, and up."""
    across, up = (bar.get_segments()[0] for bar in figure.axes[0].containers[0].lines[2])
    return [(across[1] - across[0])[0] / 2, (up[1] - up[0])[1] / 2]


def test_an_error_bar_lies_along_its_own_axis():
    """Each figure has the reward's error upwards, and its own price's across."""
    found = frontier_figures(FOUND)["frontier_kl"]
    close(bars(found), [0.1, 0.4], atol=1e-9, exchanged=bars(found)[::-1], whole_length=[0.2, 0.8])


def test_the_figures_show_every_way_and_the_pretrained_model():
    figures = frontier_figures(FOUND)
    assert list(figures) == ["frontier_kl", "frontier_diversity"]

    def check(points):
        assert points["sqdf"] == [(0.6, 2.0), (0.2, 1.0)]
        assert points["ddpo (no beta)"] == [(1.5, 3.0)]
        assert points["pretrained model"] == [(0.0, 0.5)]

    accepts(check, drawn(figures["frontier_kl"]), diversity=drawn(figures["frontier_diversity"]))
    assert drawn(figures["frontier_diversity"])["pretrained model"] == [(2.0, 0.5)]
    beside = [text.get_text() for text in figures["frontier_kl"].axes[0].texts]
    assert beside == ["2", "10"]
    assert figures["frontier_kl"].axes[0].get_title() == "Up and to the left is better"
    assert figures["frontier_diversity"].axes[0].get_title() == "Up and to the right is better"
    assert frontier_figures({**FOUND, "sweep": None}) == {}


def test_the_optimum_of_each_beta_and_held_out_rewards_are_drawn():
    known = {"optimum_kl_nats": 0.7, "optimum_reward": 2.5, "held_out.ink_tuned": 4.0, "held_out.ink_base": 5.0}
    groups = [group("a", "1", 1.0, 0.2, **known), group("a", "2", 2.0, 0.6, **{**known, "optimum_kl_nats": 0.3})]
    figures = frontier_figures({"sweep": "train.lr=1,2", "groups": groups})
    unknown = frontier_figures({"sweep": "train.lr=1,2", "groups": [group("a", "1", 1.0, 0.2)]})
    same(list(figures), ["frontier_kl", "frontier_diversity", "frontier_ink"], without_held_out=list(unknown))
    best = {name: drawn(figure).get("best possible") for name, figure in figures.items()}
    same(
        best["frontier_kl"],
        [(0.3, 2.5), (0.7, 2.5)],
        on_another_axis=best["frontier_ink"],
        not_known=drawn(unknown["frontier_kl"]).get("best possible"),
    )
    base = {name: drawn(figure)["pretrained model"] for name, figure in figures.items()}
    same(base["frontier_ink"], [(5.0, 0.5)], of_the_kl=base["frontier_kl"], of_the_diversity=base["frontier_diversity"])


@pytest.mark.long
def test_a_sweep_leaves_its_frontiers_beside_the_comparison(tmp_path):
    from commanding import TINY

    folder = tmp_path / "sweep"
    command = ["compare", "mixture", *TINY[1:], "train.iterations=2", "--algorithms", "ddpo,dpok", "--output", str(folder)]
    assert main([*command, "--sweep", "algorithm.beta=0.1,1"]) == 0
    assert {path.name for path in folder.glob("frontier_*.png")} == {"frontier_kl.png", "frontier_diversity.png"}
    titles = [picture.title for picture in comparison_part(folder).pictures]
    found = json.loads((folder / "comparison.json").read_text())
    (folder / "comparison.json").write_text(json.dumps({**found, "sweep": None}))
    plain = [picture.title for picture in comparison_part(folder).pictures]
    truth = ["Reward against KL: the frontier", "Reward against diversity: the frontier"]
    same(titles, plain + truth, nothing_swept=plain, order=plain + truth[::-1])
