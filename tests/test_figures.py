"""Truth: the ends of axes by hand, the boxes of what is drawn, the pixels of a panel."""

from __future__ import annotations

import io
import itertools

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image
from twins import close, same

from scoreaction.report.axes import few_ticks, new_figure, panels_of
from scoreaction.report.curve_figures import squeeze
from scoreaction.report.sample_figures import samples_figure


def corners(shift=0.0):
    """Samples on the corners of the unit square, moved along x."""
    return np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]] * 5) + [shift, 0.0]


def test_what_has_run_away_does_not_shrink_the_others_to_dots():
    """Twin: the range of all samples."""
    figure = samples_figure({"before": corners(), "near": corners(0.5), "far": corners(40.0)})
    low, high = figure.axes[0].get_xlim()
    close([low, high], [-0.16, 2.16], atol=1e-3, of_all=[-3.28, 44.28])
    titles = [axis.get_title(loc="left") or axis.get_title() for axis in figure.axes]
    same(titles[2], "far (100% outside)", unsaid="far")
    same(titles[1], "near", said_for_nothing="near (0% outside)")
    plt.close(figure)


def test_numbers_of_an_axis_stand_apart():
    """Truth: the boxes of drawn labels. Twin: matplotlib's own, which collide."""

    def collide(mend):
        figure, (axis,) = new_figure(width=3.0)
        axis.plot([0, 200_000], [0, 1])
        mend(axis)
        figure.canvas.draw()
        boxes = [label.get_window_extent() for label in axis.get_xticklabels() if label.get_text()]
        return any(left.x1 >= right.x0 for left, right in itertools.pairwise(boxes))

    same(collide(few_ticks), False, as_they_come=collide(lambda axis: None))
    figure, (axis,) = new_figure()
    axis.plot([0, 20_000], [0, 1])
    squeeze(axis, "x", [20_000.0, 1.0])
    figure.canvas.draw()
    same(axis.get_xticklabels()[-1].get_text(), "10 k", in_full="10000")


@pytest.mark.slow
def test_each_panel_is_a_picture_of_its_own():
    """Truth: its own line's colour and not the neighbour's. Twin: the figure in one piece."""
    figure, axes = new_figure(2)
    for axis, colour in zip(axes, ("#ff0000", "#0000ff"), strict=True):
        axis.plot([0, 1], color=colour, linewidth=3)

    def colours(panel):
        pixels = np.asarray(Image.open(io.BytesIO(panel))).reshape(-1, 3).tolist()
        return [colour in pixels for colour in ([255, 0, 0], [0, 0, 255])]

    whole = io.BytesIO()
    figure.savefig(whole, format="png", dpi=60)
    pixels = Image.open(whole).convert("RGB")
    together = io.BytesIO()
    pixels.save(together, "PNG")
    left, right = panels_of(figure, dpi=60)
    same(colours(left), [True, False], in_one_piece=colours(together.getvalue()))
    same(colours(right), [False, True], exchanged=colours(left))
