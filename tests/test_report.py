"""The report: what the page says of a run folder; the model card."""

from __future__ import annotations

import html
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

from rlcompress.report import depth, figures
from rlcompress.report.card import points
from rlcompress.report.figures import TIMES
from rlcompress.schema import Experiment, spec_hash
from rlcompress.spec import write_resolved
from rlcompress.stages.report import report
from rlcompress.stages.workspace import Workspace
from tests.reports import (
    COMMAND,
    EXPERIMENT,
    PNG,
    PPO,
    SPEC,
    UNIFORM,
    add,
    card,
    make_ticket,
    write,
)
from tests.reports import run as run  # the fixture

DECISIONS = [{"step": s, "layer": "conv", "keep": 0.5, "bits": 4, "loss": 1 / s} for s in (10, 20)]
DELIVERED = {
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
KNAPSACK = {"search": {"searcher": "knapsack"}}


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
    path = write(run)
    page = Page(path)
    assert path == run / "report" / "index.html"
    assert page.headings == ["Searchers", "Training", "Do it again"]
    pictures = {p.name for p in path.parent.iterdir()}
    assert pictures == {"index.html", "front.png", "training.png"}
    assert (path.parent / "front.png").read_bytes().startswith(PNG)
    assert COMMAND in html.unescape(path.read_text())
    assert spec_hash(EXPERIMENT) in path.read_text()


def test_searchers_are_compared_at_the_floor(run: Path) -> None:
    """The floor is 92.0 %; 4 MB / 61.2 kB = 65.4."""
    page = Page(write(run))
    assert page.row("ppo") == ["3", "3", "61.2 kB", f"65.4{TIMES}", "92.10", "1504.9"]
    assert page.row("uniform")[:4] == ["1", "1", "222 kB", f"18{TIMES}"]
    assert page.row("random") == ["1", "1", "none reached it"]
    assert "densest at the floor" in page.row("searcher")


def test_ticket_stands_beside_dense_baseline_and_controls(run: Path) -> None:
    learning = {"searcher": "ppo", "evaluation": 8, "mean_return": -1.0, "entropy": 2.0}
    (run / "search" / "curve.jsonl").write_text(json.dumps(learning) + "\n")
    path = write(add(run, PPO, UNIFORM))
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
    page = Page(write(add(run, cheap, PPO, UNIFORM)))
    assert page.row("bytes")[1] == "61,000"
    assert page.row("cccc3333")[:2] == ["ppo", "70.00"]


SHORT = (
    "no ticket within 1 point of dense, ticket.floor (best -2.80 on validation): lower "
    "search.target (--target of compress), raise search.episodes (--evaluations) or ticket.floor"
)


def test_a_missed_floor_stands_on_page_and_card(run: Path) -> None:
    missed = make_ticket("cccc3333", "ppo", 0.90, 10_000)
    assert SHORT in write(add(run, missed)).read_text()
    assert f"**Below the accuracy floor**: {SHORT}.\n" in card(missed)
    assert "ticket.floor =" not in card(PPO)
    # A ticket at the floor goes before it, however large.
    assert "ticket.floor =" not in write(add(run, PPO)).read_text()


def test_page_needs_nothing_else(run: Path) -> None:
    path = write(add(run, PPO, UNIFORM))
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
    first = {p.name: p.read_bytes() for p in write(run).parent.iterdir()}
    assert {p.name: p.read_bytes() for p in write(run).parent.iterdir()} == first


def test_names_are_escaped(run: Path) -> None:
    path = write(add(run, PPO | {"searcher": "<b>&"}))
    assert "<b>&" not in path.read_text()
    assert Page(path).rows[0][2] == "<b>& ticket"


@pytest.mark.parametrize(
    "name", ["search/archive.jsonl", "search/dense.json", "dense/metrics.json"]
)
def test_a_missing_input_is_named_with_the_command_that_makes_it(run: Path, name: str) -> None:
    (run / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{name}.*rlcompress run demo"):
        write(run)
    assert not (run / "report").exists()


def beside(run: Path, name: str, accuracy: float, where: Any = (), **changes: Any) -> Workspace:
    """A run in a folder beside `run`, with a ticket of its options and one of others.
    `where`: options of where it ran."""
    workspace = Workspace("demo", Experiment.model_validate(SPEC | changes), run.parent / name)
    seed = workspace.experiment.seed
    ran = Experiment.model_validate(SPEC | changes | dict(where))
    write_resolved(ran, "demo", workspace.folder / "spec.yaml")
    mine = make_ticket("eeee5555", "ppo", accuracy, 61_000) | {"seed": seed}
    theirs = make_ticket("ffff6666", "ppo", 0.99, 1_000) | {"seed": seed}
    inputs = workspace.inputs.ticket
    add(workspace.folder, mine | {"inputs": inputs}, theirs | {"inputs": f"{inputs}, distilled"})
    return workspace


def test_several_seeds_give_means_and_intervals(run: Path) -> None:
    """Runs beside this one count if they differ in nothing but the seed and where they ran."""
    workspace = beside(run, "demo", 0.9234)
    elsewhere = {"threads": 1, "ppo": {"num_env_runners": 0, "num_gpus_per_env_runner": 0.5}}
    elsewhere |= {"storage": "s3://bucket/runs", "device": "cuda:7"}
    beside(run, "b", 0.9034, elsewhere, seed=8)
    beside(run, "c", 0.1, seed=9, model={"factory": "vgg19", "args": {"width": 0.5}})
    beside(run, "d", 0.1, seed=8)  # a seed that is there already
    text = report(workspace).read_text()
    assert "deviations of 2 seeds (7, 8)" in text
    assert "the others are the runs b." in " ".join(text.split())
    assert "91.34 ± 1.41" in text
    rows = figures.arms_over_seeds([PPO, make_ticket("x", "ppo", 0.9034, 61_000)])
    assert rows["rewind"] == pytest.approx((91.34, 1.4142), abs=1e-3)
    assert figures.arms_over_seeds([PPO])["rewind"][1] is None


@pytest.mark.parametrize(
    "content", [b"openapi: 3.0.0\n", b"", b"a: [", b"\xff", b"experiment: x\nspec: {}\n", None]
)
def test_a_folder_beside_that_is_no_run_is_passed_over(run: Path, content: bytes | None) -> None:
    workspace = beside(run, "demo", 0.9234)
    other = run.parent / "api" / "spec.yaml"
    if content is None:
        other.mkdir(parents=True)
    else:
        other.parent.mkdir()
        other.write_bytes(content)
    assert "Seed 7 alone" in report(workspace).read_text()


def test_tickets_of_other_options_or_of_another_searcher_are_not_shown(run: Path) -> None:
    workspace = beside(run, "demo", 0.9234)
    inputs = workspace.inputs.ticket
    smaller = make_ticket("gggg7777", "knapsack", 0.9234, 20_000)
    add(run, UNIFORM | {"inputs": inputs}, smaller | {"inputs": inputs})
    (run / "dynamic").mkdir()
    path = run / "dynamic" / "ticket.json"
    dynamic = PPO | {"id": "dynamic-1", "decisions": DECISIONS}
    path.write_text(json.dumps(dynamic | {"inputs": "other options none"}))
    page = Page(report(workspace))
    assert page.rows[0] == ["", "dense", "ppo ticket", "uniform ticket"]
    assert page.row("bytes") == ["4,000,000", "61,000", "200,000"]
    assert not {"All tickets", "While it trained"} & set(page.headings)
    path.write_text(json.dumps(dynamic | {"inputs": f"{workspace.inputs.dynamic} none"}))
    assert "While it trained" in Page(report(workspace)).headings
    # What the options name comes first, on the terminal too.
    workspace = Workspace("demo", Experiment.model_validate(SPEC | KNAPSACK), run)
    add(run, smaller | {"inputs": workspace.inputs.ticket})
    assert Page(report(workspace)).rows[0][:3] == ["", "dense", "knapsack ticket"]


def test_cost_of_each_layer_and_compression_in_training(run: Path) -> None:
    before = {"channels": 16, "bits": 32, "bytes": 5000, "macs": 2_000_000}
    after = {"channels": 8, "bits": 3, "bytes": 120, "macs": 500_000}
    add(run, PPO)
    costs = [{"name": "conv", "dense": before, "ticket": after}]
    (run / "tickets" / PPO["id"] / "layers.json").write_text(json.dumps(costs))
    path = write(run, dynamic=PPO | {"id": "dynamic-1", "decisions": DECISIONS})
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
    loss, keep, bits = depth.dynamic_figure(DECISIONS).axes
    np.testing.assert_allclose(loss.lines[0].get_xydata(), [[10, 0.1], [20, 0.05]])
    assert keep.lines[0].get_ydata().tolist() == [0.5, 0.5]
    assert bits.lines[0].get_ydata().tolist() == [4, 4]


def test_model_card_front_matter_and_figures() -> None:
    text = card(PPO, DELIVERED)
    assert "| model.onnx | 5,432 | 5,321 | 90.00 % | 99.50 % | 2.0e-07 |" in text
    assert "| batch 1 | 2.00 | 1.50 |" in text
    bare = card(PPO)
    assert "onnx" not in bare.lower()
    _, head, body = text.split("---\n", 2)
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
    assert f"Made by `{COMMAND}`" in body


def test_a_card_says_retrained_of_an_arm_that_was_trained() -> None:
    assert "What survived was retrained (arm `rewind`)" in card(PPO)
    untrained = PPO | {"arm": "reconstructed", "controls": {"rewind": PPO["ticket"]}}
    text = card(untrained | {"validation": PPO["validation"] | {"reconstructed": 0.93}})
    assert "retrained" not in text
    assert "refitted in closed form, not trained (arm `reconstructed`)" in text


def add_delivered(run: Path, ticket: dict[str, Any]) -> None:
    for name, content in (("onnx", DELIVERED["onnx"]), ("latency", DELIVERED["latency"])):
        (run / "tickets" / ticket["id"] / f"{name}.json").write_text(json.dumps(content))


def test_without_labels_agreement_is_not_called_accuracy(run: Path) -> None:
    """On page, figures and card; what the search measures goes by the option as well."""
    path = run / "dense" / "metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"labelled": False}))
    third = make_ticket("cccc3333", "ppo", 0.90, 10_000)
    add_delivered(add(run, PPO, UNIFORM, third), PPO)
    dynamic = PPO | {"id": "dynamic-1", "decisions": DECISIONS}
    text = write(run, dynamic=dynamic).read_text().split("<details><summary>Every option")
    said = re.sub(r"validation_accuracy|accuracy-\d-\w+|accuracy-\$\{|point\.accuracy", "", text[0])
    said = said.replace('"accuracy":', "")  # what the page's script finds
    assert "accuracy" not in said.lower()
    assert Page(run / "report" / "index.html").row("agreement with dense, %")[0] == "92.80"
    assert '"measure":"agreement with dense"' in text[1]
    text = card(PPO, DELIVERED, labelled=False)
    assert "accuracy" not in text.lower()
    assert "| | agreement with dense | bytes |" in text
    assert "They have no labels" in text
    (result,) = yaml.safe_load(text.split("---\n", 2)[1])["model-index"][0]["results"]
    assert [m["type"] for m in result["metrics"]] == ["agreement", "bytes"]


def test_a_search_without_labels_agrees_and_its_tickets_are_accurate(run: Path) -> None:
    blind = Experiment.model_validate(SPEC | {"calibration": {"labels": False}})
    path = write(add(run, PPO), experiment=blind)
    page = Page(path)
    assert page.row("accuracy, %")[0] == "92.80"
    assert [c for row in page.rows for c in row if "agree" in c] == ["agreement with dense, %"]
    assert "Diamonds: tickets, their accuracy on the test split" in path.read_text()


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
