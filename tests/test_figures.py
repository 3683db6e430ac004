"""What the report's figures show."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from matplotlib.text import Text

from rlcompress.core.schedule import Schedule
from rlcompress.report import depth, figures
from rlcompress.report.figures import TIMES
from tests.reports import DENSE, LAYERS, PPO, RECORDS, UNIFORM, make_ticket, record


def test_front_axis_is_not_stretched_by_hopeless_points() -> None:
    figure = figures.front_figure(RECORDS, DENSE, [PPO, UNIFORM])
    ax, below = figure.axes
    assert below.get_yscale() == "log"
    low, high = ax.get_ylim()
    assert 85 < low < 92.1
    assert 93 < high < 96
    texts = {text.get_text() for text in ax.texts}
    assert {"dense", f"ppo ticket, 65.6{TIMES}", f"uniform ticket, 20{TIMES}"} <= texts
    assert any("2 of 5 evaluations" in text for text in texts)
    (legend,) = figure.legends
    assert [t.get_text() for t in legend.get_texts()] == ["ppo", "uniform", "random"]


def test_front_of_hopeless_points_alone_shows_them() -> None:
    points = [record("random", e, 0.1 + e / 100, 1000 * e) for e in range(1, 4)]
    ax, _ = figures.front_figure(points, DENSE).axes
    assert ax.get_ylim()[0] < 11


def test_labels_of_the_front_do_not_overlap() -> None:
    near = make_ticket("dddd4444", "knapsack", 0.92, 63_000)
    figure = figures.front_figure(RECORDS, DENSE, [PPO, near, UNIFORM])
    figure.draw_without_rendering()
    texts = [text for text in figure.axes[0].texts if "ticket" in text.get_text()]
    boxes = [Text.get_window_extent(text) for text in texts]
    assert len(boxes) == 3
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[i + 1 :])
        assert box.y0 > figure.axes[0].get_window_extent().y1


def test_schedule_figure_draws_every_layer_in_order() -> None:
    schedule = Schedule({"conv": 0.25}, {"conv": 3, "dw": 5})
    above, below = depth.schedule_figure(schedule, LAYERS).axes

    def heights(ax: Any) -> list[float]:
        return [b.get_height() for b in sorted(ax.patches, key=lambda b: b.get_x())]

    assert heights(above) == [0.25, 0.25, 1.0]
    assert heights(below) == [3, 5, 8]
    assert [t.get_text() for t in below.texts] == ["32"]
    assert [t.get_text() for t in below.get_xticklabels()] == ["conv", "dw", "head"]


def test_arms_and_training_and_learning_figures_show_their_numbers() -> None:
    (ax,) = figures.arms_figure([PPO]).axes
    assert [t.get_text() for t in ax.texts] == ["dense 92.80", "92.34", "81.23"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["rewind", "fresh"]
    dense = {"curve": [{"step": 5, "loss": 0.5, "validation_accuracy": 0.9}]}
    panels = figures.training_figure(dense, PPO).axes
    assert [len(panel.lines) for panel in panels] == [1, 2, 1, 2]
    np.testing.assert_allclose(panels[2].lines[0].get_xydata(), [[5, 90]])
    points = [
        {"searcher": "ppo", "evaluation": e, "mean_return": -1.0, "entropy": 2.0} for e in (8, 16)
    ]
    left, right = figures.learning_figure(points).axes
    assert left.lines[0].get_xydata().tolist() == [[8, -1], [16, -1]]
    assert right.lines[0].get_xydata().tolist() == [[8, 2], [16, 2]]


def test_places_of_the_points_are_where_the_svg_has_them() -> None:
    """The picture's own coordinates of the points of one searcher on the KL panel."""
    figure = figures.front_figure(RECORDS, DENSE)
    svg = figures.to_svg(figure, "front")
    places = figures.front_places(figure, RECORDS)
    part = svg[svg.index('id="kl-0-front"') :]
    drawn = re.search(r'<use [^>]*x="([\d.]+)" y="([\d.]+)"', part)
    assert drawn is not None
    found = [(p[0], p[2]) for p, r in zip(places, RECORDS, strict=True) if r.searcher == "ppo"]
    # The front begins at its smallest schedule.
    assert (float(drawn[1]), float(drawn[2])) == pytest.approx(min(found), abs=0.2)
    assert [p[1] is None for p in places] == [False, False, True, False, True]


def test_labels_name_the_measure_and_fit_their_panels() -> None:
    measure = "agreement with dense"
    dense = {"curve": [{"step": 5, "loss": 0.5, "validation_accuracy": 0.9}]}
    drawn = (
        figures.front_figure(RECORDS, DENSE, [PPO], measure),
        figures.arms_figure([PPO], measure),
        figures.training_figure(dense, PPO, measure),
    )
    for figure in drawn:
        figure.draw_without_rendering()
        labels = [label for ax in figure.axes for label in (ax.xaxis.label, ax.yaxis.label)]
        said = " ".join(label.get_text() for label in labels).replace("\n", " ")
        assert measure in said
        assert "accuracy" not in said
        height = figure.axes[0].get_window_extent().height
        assert all(label.get_window_extent().height < 1.1 * height for label in labels)


@pytest.mark.parametrize(
    ("value", "size", "count"),
    [
        (0, "0 B", "0"),
        (999, "999 B", "999"),
        (999.6, "1 kB", "1 k"),
        (1234, "1.23 kB", "1.23 k"),
        (143_000, "143 kB", "143 k"),
        (999_400, "999 kB", "999 k"),
        (999_600, "1 MB", "1 M"),
        (999_500_000, "1 GB", "1 G"),
        (12_345_678, "12.3 MB", "12.3 M"),
        (5e15, "5000 TB", "5000 T"),
    ],
)
def test_sizes_and_counts_as_people_read_them(value: float, size: str, count: str) -> None:
    assert (figures.size(value), figures.count(value)) == (size, count)
