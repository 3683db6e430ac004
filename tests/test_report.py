"""The report: what the page says of a run folder, what the figures show, the model card."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from matplotlib.text import Text

from rlcompress.core.schedule import Measurement, Record, Schedule, performance_density
from rlcompress.report import depth, figures
from rlcompress.report.card import model_card, points
from rlcompress.report.figures import TIMES
from rlcompress.report.page import write_report

SPEC = {
    "model": {"factory": "vgg19", "args": {"width": 0.25}},
    "data": {"factory": "digits", "args": {"size": 32}},
    "ticket": {"floor": 1.0},
    "seed": 7,
}
LAYERS = [
    {"name": "conv", "kind": "conv", "group": "conv"},
    {"name": "dw", "kind": "depthwise", "group": "conv"},
    {"name": "head", "kind": "linear", "group": "head"},
]
PNG = b"\x89PNG\r\n\x1a\n"


def measurement(accuracy: float, size: int) -> Measurement:
    density = performance_density(accuracy, size)
    return Measurement(accuracy, 0.5, 1 - accuracy, size, size // 4, size, size * 8, density)


DENSE = measurement(0.93, 4_000_000)


def record(searcher: str, evaluation: int, accuracy: float, size: int) -> Record:
    return Record(Schedule({"conv": 0.5}), measurement(accuracy, size), searcher, 0, evaluation)


RECORDS = [
    record("ppo", 1, 0.925, 100_000),
    record("ppo", 2, 0.921, 61_200),
    record("ppo", 3, 0.60, 20_000),
    record("uniform", 1, 0.924, 222_000),
    record("random", 1, 0.11, 90_000),
]


def make_ticket(name: str, searcher: str, accuracy: float, size: int) -> dict[str, Any]:
    curve = [{"step": s, "loss": 1.0, "validation_accuracy": 0.9} for s in (0, 10)]
    return {
        "id": name,
        "searcher": searcher,
        "schedule": {"keep": {"conv": 0.5}, "bits": {"conv": 3, "head": 6}},
        "dense": measurement(0.928, 4_000_000).to_dict(),
        "ticket": measurement(accuracy, size).to_dict(),
        "arm": "rewind",
        "controls": {"fresh": measurement(0.8123, size).to_dict()},
        "validation": {"dense": 0.928, "rewind": accuracy, "fresh": 0.8},
        "floor": 1.0,
        "input": {"shape": [1, 32, 32], "mean": 4.88, "std": 6.02},
        "curves": {"rewind": curve, "fresh": curve},
        "seed": 7,
        "spec_hash": "0123abcd",
        "split": "test",
        "target": 60.0,
        "ratio": 4_000_000 / size,
        "search": measurement(0.9, size).to_dict(),
    }


PPO = make_ticket("aaaa1111", "ppo", 0.9234, 61_000)
UNIFORM = make_ticket("bbbb2222", "uniform", 0.9211, 200_000)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run after its search, without tickets."""
    folder = tmp_path / "demo"
    (folder / "search").mkdir(parents=True)
    (folder / "dense").mkdir()
    spec = {"experiment": "demo", "hash": "0123abcd", "spec": SPEC}
    (folder / "spec.yaml").write_text(yaml.safe_dump(spec))
    curve = [{"epoch": 1, "step": 5, "loss": 0.5, "validation_accuracy": 0.9}]
    dense = {"inputs": "x", "seed": 7, "seconds": 1.0, "curve": curve}
    (folder / "dense" / "metrics.json").write_text(
        json.dumps(dense | {"validation": DENSE.to_dict()})
    )
    (folder / "search" / "dense.json").write_text(json.dumps(DENSE.to_dict()))
    (folder / "search" / "layers.json").write_text(json.dumps(LAYERS))
    lines = "".join(r.to_json() + "\n" for r in RECORDS)
    (folder / "search" / "archive.jsonl").write_text(lines)
    return folder


def add(run: Path, *tickets: dict[str, Any]) -> Path:
    for ticket in tickets:
        folder = run / "tickets" / ticket["id"]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "ticket.json").write_text(json.dumps(ticket))
    return run


class Page(HTMLParser):
    """Headings, table rows as lists of cell texts, tags, and what is loaded from elsewhere."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.headings: list[str] = []
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.inside: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.inside.append(tag)
        self.sources += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "h2":
            self.headings.append("")

    def handle_endtag(self, tag: str) -> None:
        while self.inside and self.inside.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "td" in self.inside or "th" in self.inside:
            self.rows[-1][-1] += data
        if self.inside and self.inside[-1] == "h2":
            self.headings[-1] += data

    def row(self, first: str) -> list[str]:
        (found,) = (row[1:] for row in self.rows if row[0] == first)
        return found


def test_page_after_the_search_only(run: Path) -> None:
    path = write_report(run)
    page = Page(path)
    assert path == run / "report" / "index.html"
    assert page.headings == ["Searchers", "Training", "Do it again"]
    pictures = {p.name for p in path.parent.iterdir()}
    assert pictures == {"index.html", "front.png", "training.png"}
    assert (path.parent / "front.png").read_bytes().startswith(PNG)
    assert "rlcompress run demo" in path.read_text()
    assert "0123abcd" in path.read_text()


def test_searchers_are_compared_at_the_floor(run: Path) -> None:
    """The floor is 92.0 %; 4 MB / 61.2 kB = 65.4."""
    page = Page(write_report(run))
    assert page.row("ppo") == ["3", "3", "61.2 kB", f"65.4{TIMES}", "92.10", "1504.9"]
    assert page.row("uniform")[:4] == ["1", "1", "222 kB", f"18{TIMES}"]
    assert page.row("random") == ["1", "1", "none reached it"]


def test_ticket_stands_beside_dense_baseline_and_controls(run: Path) -> None:
    learning = {"searcher": "ppo", "evaluation": 8, "mean_return": -1.0, "entropy": 2.0}
    (run / "search" / "curve.jsonl").write_text(json.dumps(learning) + "\n")
    path = write_report(add(run, PPO, UNIFORM))
    page = Page(path)
    assert page.rows[0] == ["", "dense", "ppo ticket", "uniform ticket"]
    assert page.row("bytes") == ["4,000,000", "61,000", "200,000"]
    assert page.row("accuracy, %") == ["92.80", "92.34 -0.46", "92.11 -0.69"]
    assert page.row("size ratio") == [f"1{TIMES}", f"65.6{TIMES}", f"20{TIMES}"]
    assert page.row("rewind (the ticket)")[:2] == ["92.34", "-0.46"]
    assert page.row("fresh")[:2] == ["81.23", "-11.57"]
    assert "Ticket against its controls" in page.headings
    names = ("front", "arms", "schedule", "learning", "training")
    assert {p.name for p in path.parent.iterdir()} == {f"{n}.png" for n in names} | {"index.html"}
    assert page.tags.count("svg") == len(names)


def test_best_ticket_is_the_densest_at_the_floor(run: Path) -> None:
    """A ticket of 70 % is dense, but below the floor."""
    cheap = make_ticket("cccc3333", "ppo", 0.70, 10_000)
    page = Page(write_report(add(run, cheap, PPO, UNIFORM)))
    assert page.row("bytes")[1] == "61,000"
    assert page.row("cccc3333")[:2] == ["ppo", "70.00"]


SHORT = (
    "no ticket within 1 point of dense, ticket.floor (best -2.80 on validation): lower "
    "search.target (--target of compress), raise search.episodes (--evaluations) or ticket.floor"
)


def test_a_missed_floor_stands_on_page_and_card(run: Path) -> None:
    missed = make_ticket("cccc3333", "ppo", 0.90, 10_000)
    assert SHORT in write_report(add(run, missed)).read_text()
    bare = {"onnx": {}, "latency": {}}
    assert f"**Below the accuracy floor**: {SHORT}.\n" in model_card(missed, "demo", SPEC, bare)
    assert "ticket.floor =" not in model_card(PPO, "demo", SPEC, bare)
    # A ticket at the floor goes before it, however large.
    assert "ticket.floor =" not in write_report(add(run, PPO)).read_text()


def test_page_needs_nothing_else(run: Path) -> None:
    path = write_report(add(run, PPO, UNIFORM))
    text, page = path.read_text(), Page(path)
    assert "://" not in text
    assert all(source.startswith("#") for source in page.sources)
    assert not {"link", "img", "iframe"} & set(page.tags)
    assert "<script src" not in text
    assert "prefers-color-scheme: dark" in text
    assert "var(--series-0)" in text
    assert not [c for c in figures.SERIES if c in text.split("</style>", 1)[1]]


def test_writing_twice_gives_the_same_bytes(run: Path) -> None:
    add(run, PPO, UNIFORM)
    first = {p.name: p.read_bytes() for p in write_report(run).parent.iterdir()}
    assert {p.name: p.read_bytes() for p in write_report(run).parent.iterdir()} == first


def test_names_are_escaped(run: Path) -> None:
    path = write_report(add(run, PPO | {"searcher": "<b>&"}))
    assert "<b>&" not in path.read_text()
    assert Page(path).rows[0][2] == "<b>& ticket"


@pytest.mark.parametrize(
    "name", ["search/archive.jsonl", "search/dense.json", "dense/metrics.json"]
)
def test_a_missing_input_is_named_with_the_command_that_makes_it(run: Path, name: str) -> None:
    (run / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{name}.*rlcompress run demo"):
        write_report(run)
    assert not (run / "report").exists()


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


def test_several_seeds_give_means_and_intervals(run: Path) -> None:
    """Runs beside this one count if they differ in nothing but the seed."""
    add(run, PPO)
    for name, seed, accuracy, width in (("b", 8, 0.9034, 0.25), ("c", 9, 0.1, 0.5)):
        other = run.parent / name
        other.mkdir()
        spec = SPEC | {"seed": seed, "model": {"factory": "vgg19", "args": {"width": width}}}
        (other / "spec.yaml").write_text(
            yaml.safe_dump({"experiment": "demo", "hash": "9", "spec": spec})
        )
        add(other, make_ticket("eeee5555", "ppo", accuracy, 61_000) | {"seed": seed})
    text = write_report(run).read_text()
    assert "deviations of 2 seeds (7, 8)" in text
    assert "the others are the runs b." in " ".join(text.split())
    assert "91.34 ± 1.41" in text
    rows = figures.arms_over_seeds([PPO, make_ticket("x", "ppo", 0.9034, 61_000)])
    assert rows["rewind"] == pytest.approx((91.34, 1.4142), abs=1e-3)
    assert figures.arms_over_seeds([PPO])["rewind"][1] is None


def test_cost_of_each_layer_and_compression_in_training(run: Path) -> None:
    before = {"channels": 16, "bits": 32, "bytes": 5000, "macs": 2_000_000}
    after = {"channels": 8, "bits": 3, "bytes": 120, "macs": 500_000}
    add(run, PPO)
    costs = [{"name": "conv", "dense": before, "ticket": after}]
    (run / "tickets" / PPO["id"] / "layers.json").write_text(json.dumps(costs))
    decisions = [
        {"step": s, "layer": "conv", "keep": 0.5, "bits": 4, "loss": 1 / s} for s in (10, 20)
    ]
    (run / "dynamic").mkdir()
    dynamic = PPO | {"id": "dynamic-1", "decisions": decisions}
    (run / "dynamic" / "ticket.json").write_text(json.dumps(dynamic))
    path = write_report(run)
    page = Page(path)
    arrow = "\N{RIGHTWARDS ARROW}"
    assert page.row("conv") == [
        f"16 {arrow} 8",
        f"32 {arrow} 3",
        f"5 kB {arrow} 120 B",
        f"2 M {arrow} 500 k",
    ]
    assert {"What each layer costs", "While it trained"} <= set(page.headings)
    assert (path.parent / "layers.png").exists()
    loss, keep, bits = depth.dynamic_figure(decisions).axes
    np.testing.assert_allclose(loss.lines[0].get_xydata(), [[10, 0.1], [20, 0.05]])
    assert keep.lines[0].get_ydata().tolist() == [0.5, 0.5]
    assert bits.lines[0].get_ydata().tolist() == [4, 4]


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


def test_model_card_front_matter_and_figures() -> None:
    delivered = {
        "onnx": {
            "model.onnx": {
                "bytes": 5432,
                "container_bytes": 5321,
                "difference": 2e-7,
                "agreement": 0.995,
                "validation_accuracy": 0.9,
            }
        },
        "latency": {"1": {"dense": 2.0, "model.onnx": 1.5}},
    }
    card = model_card(PPO, "demo", SPEC, delivered)
    assert "| model.onnx | 5,432 | 5,321 | 90.00 % | 99.50 % | 2.0e-07 |" in card
    assert "| batch 1 | 2.00 | 1.50 |" in card
    bare = model_card(PPO, "demo", SPEC, {"onnx": {}, "latency": {}})
    assert "onnx" not in bare.lower()
    _, head, body = card.split("---\n", 2)
    matter = yaml.safe_load(head)
    assert matter["license"] == "other"
    assert matter["pipeline_tag"] == "image-classification"
    assert {"pruning", "quantization", "vgg19"} <= set(matter["tags"])
    (result,) = matter["model-index"][0]["results"]
    assert result["dataset"]["split"] == "test"
    assert [(m["type"], m["value"]) for m in result["metrics"]] == [
        ("accuracy", 0.9234),
        ("bytes", 61_000),
    ]
    assert "| **ticket (rewind)** | 92.34 % | 61,000 |" in body
    assert "| control: fresh | 81.23 % |" in body
    assert "3-6 bits" in body
    assert 'load_artifact("weights.safetensors")' in body
    assert 'onnxruntime.InferenceSession("model.onnx")' in body
    assert "Seed: 7" in body


def test_report_loads_neither_torch_nor_ray_nor_mlflow() -> None:
    code = (
        "import sys, rlcompress.report.page, rlcompress.report.card;"
        "print({'torch', 'ray', 'mlflow', 'matplotlib.pyplot'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("value", "said"),
    [(1.0, "1 point"), (100 * (0.93 - 0.92), "1 point"), (0.5, "0.5 points"), (0.0, "0 points")],
)
def test_points_are_counted_as_they_are_shown(value, said):
    assert points(value) == said
