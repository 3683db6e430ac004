"""Whether the finals pick a winner that is as good as it looked: successive halving's gap.

    uv run python -m benchmarks.finals                           # half an hour; goes on if stopped
    uv run python -m benchmarks.finals --networks vgg19 --seeds 1

Fashion-MNIST, the experiments of `benchmarks.networks`; a seed draws all calibration images.
`knapsack` searches, then two winners are compared: the densest within `ticket.floor` points of the
dense network on the images that scored the search, and the one that the finals put first, on more
images and by several fits. Both are fitted as for a ticket, without training, and measured on the
validation images that neither saw.

gap   points of accuracy against the dense network that a winner was said to have, less those that
      it has on the images held back; positive: it looked too good

Every winner is a line of runs/finals-NETWORK.jsonl.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import results
from benchmarks.networks import EXPERIMENTS, identity, workspace
from rlcompress.core.files import read_lines
from rlcompress.core.fitted import fitted_network
from rlcompress.core.pareto import rank_at_floor
from rlcompress.core.schedule import Record
from rlcompress.core.ticket import Task
from rlcompress.core.train import top1
from rlcompress.searchers import Settings, find, in_process
from rlcompress.stages.finals import finals
from rlcompress.stages.workspace import Workspace

SEARCHER = "knapsack"
WINNERS = {"search", "finals"}


def winners(run: Workspace, evaluations: int) -> dict[str, tuple[Record, float]]:
    """(record, accuracy of the dense network on the same images) of both."""
    e = run.experiment
    settings = Settings(evaluations, e.search.target, e.seed, e.search.sensitivity)
    records = list(find(SEARCHER)(run.problem, settings, [], in_process(run.problem)))
    dense = run.problem.dense.accuracy
    floor = dense - e.ticket.floor / 100

    def rank(record: Record) -> tuple[bool, float]:
        return rank_at_floor(record.measurement.accuracy, floor, record.measurement.density)

    whole = top1(run.network("trained"), run.splits[1])
    return {
        "search": (max(records, key=rank), dense),
        "finals": (finals(run, SEARCHER, records)[0], whole),
    }


def key_of(run: Workspace, evaluations: int) -> str:
    low, high = run.experiment.search.target
    return f"{identity(run)} {low:g}-{high:g} {evaluations}"


def measure(network: str, seed: int, evaluations: int) -> None:
    trained = workspace(EXPERIMENTS[network])
    run = Workspace(
        trained.name, trained.experiment.model_copy(update={"seed": seed}), trained.folder
    )
    torch.set_num_threads(1)
    rows = results.Rows(Path("runs") / f"finals-{network}.jsonl")
    about: dict[str, Any] = {"key": key_of(run, evaluations), "seed": seed}
    done = {row["winner"] for row in rows.rows if {**row, **about} == row}
    if done == WINNERS:
        return
    dense: nn.Module = run.network("trained")
    held = run.splits[2]
    accuracy = top1(dense, held)
    evaluator = run.evaluator(dense, run.experiment.ticket.fit_images, run.splits[0], seed)
    for name, (record, whole) in winners(run, evaluations).items():
        if name in done:
            continue
        small = fitted_network(dense, evaluator, record.schedule)
        task = Task(small, run.structure)
        said = 100 * (record.measurement.accuracy - whole)
        found = 100 * (top1(task.prepared(), held) - accuracy)
        row = {"winner": name, "said": said, "held": found, "bytes": record.measurement.bytes}
        rows.append({**about, "network": network, **row})
        print(f"{network} seed {seed} {name}: {said:+.2f} said, {found:+.2f} held back", flush=True)


def summarise(evaluations: int) -> None:
    figures: dict[str, Any] = {}
    everything: list[dict[str, Any]] = []
    for network, experiment in EXPERIMENTS.items():
        path = Path("runs") / f"finals-{network}.jsonl"
        if not path.exists():
            continue
        key = key_of(workspace(experiment), evaluations)
        rows = [row for row in read_lines(path) if row["key"] == key]
        everything += rows
        for name in ("search", "finals"):
            gaps = [row["said"] - row["held"] for row in rows if row["winner"] == name]
            if gaps:
                figures[f"gap_{name}_{network}"] = results.figure(gaps, "points")
    for name, value in figures.items():
        sd = f" ± {value['sd']:.2f}" if value["sd"] is not None else ""
        print(f"{name:24}{value['value']:7.2f}{sd}  {value['unit']}  (n = {value['n']})")
    if everything:
        print(results.write("finals", figures, everything, keep=True), flush=True)


def main() -> None:
    parser = results.parser(__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--networks", default="vgg19,mobilenetv2")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--evaluations", type=int, default=100)
    parser.add_argument("--summary", action="store_true", help="of what is measured; no more")
    options = parser.parse_args()
    if options.quick:
        options.evaluations, options.seeds = 12, "1"
    for seed in () if options.summary else options.seeds.split(","):
        for network in options.networks.split(","):
            measure(network, int(seed), options.evaluations)
    summarise(options.evaluations)


if __name__ == "__main__":
    main()
