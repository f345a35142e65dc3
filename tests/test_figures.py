"""Truth: the ends of axes by hand."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
from twins import close, same

from scoreaction.report.figures import samples_figure


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
