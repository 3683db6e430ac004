"""What `rlcompress run quickstart` reaches and how long it takes, over seeds.

    uv run python -m benchmarks.quickstart                 # seeds 1, 2, 3
    uv run python -m benchmarks.quickstart --quick         # seed 1
    uv run python -m benchmarks.quickstart --experiment quickstart-mobilenet --quick

No option was chosen by what these seeds gave on the test split; seed 0 was seen on the way.
Everything runs through the command line, each seed in a run folder of its own. Accuracies are
those of the test split, of the artifact as read back from the disk. `kl_ratio`: how many times
less KL the policy's front has than uniform's, the geometric mean over ten sizes of the target
range, score images (both searchers had the same number of evaluations).
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import results
from rlcompress import spec
from rlcompress.core.files import read_archive
from rlcompress.core.schedule import Measurement, Record


def least_kl(records: list[Record], max_bytes: float) -> float:
    return min((r.measurement.kl for r in records if r.measurement.bytes <= max_bytes), default=9.9)


def kl_ratio(folder: Path, target: tuple[float, float]) -> float:
    records = read_archive(folder / "search" / "archive.jsonl")
    dense = Measurement.from_dict(json.loads((folder / "search" / "dense.json").read_text()))
    ppo = [r for r in records if r.searcher == "ppo"]
    uniform = [r for r in records if r.searcher == "uniform"]
    logs = []
    for ratio in np.geomspace(*target, 10):
        ours, theirs = (least_kl(rows, dense.bytes / ratio) for rows in (ppo, uniform))
        logs.append(np.log(max(theirs, 1e-4) / max(ours, 1e-4)))
    return float(np.exp(np.mean(logs)))


def run(experiment: str, seed: int) -> list[dict[str, Any]]:
    """One row a ticket."""
    folder = Path("runs") / f"benchmark-{experiment}-{seed}"
    words = ["run", experiment, "--out", str(folder), "--set", f"seed={seed}", "--fresh"]
    begun = time.monotonic()
    subprocess.run([sys.executable, "-m", "rlcompress", *words], check=True)
    seconds = time.monotonic() - begun
    resolved = spec.resolve(spec.load_experiments(Path("experiments.yaml")), experiment)
    rows = []
    for path in sorted(folder.glob("tickets/*/ticket.json")):
        ticket = json.loads(path.read_text())
        rows.append(
            {
                "experiment": experiment,
                "seed": seed,
                "searcher": ticket["searcher"],
                "split": ticket["split"],
                "dense": ticket["dense"]["accuracy"],
                "accuracy": ticket["ticket"]["accuracy"],
                "arm": ticket["arm"],
                "controls": {n: m["accuracy"] for n, m in ticket["controls"].items()},
                "bytes": path.with_name("weights.safetensors").stat().st_size,
                "ratio": ticket["ratio"],
                "density": ticket["ticket"]["density"],
                "kl_ratio": kl_ratio(folder, resolved.search.target),
                "seconds": seconds,
            }
        )
    return rows


def summarise(experiment: str, rows: list[dict[str, Any]]) -> None:
    """Prints the table and writes the result file."""
    print(f"\n{'searcher':10}{'seed':>5}{'dense':>9}{'ticket':>9}{'bytes':>10}{'x':>8}  arm")
    for row in rows:
        print(
            f"{row['searcher']:10}{row['seed']:5}{row['dense']:9.2%}{row['accuracy']:9.2%}"
            f"{row['bytes']:10,}{row['ratio']:8.1f}  {row['arm']}"
        )
    figures = {}
    for name in sorted({row["searcher"] for row in rows}):
        mine = [row for row in rows if row["searcher"] == name]
        drops = [100 * (row["accuracy"] - row["dense"]) for row in mine]
        figures[f"points_{name}"] = results.figure(drops, "points against dense, test split")
        figures[f"ratio_{name}"] = results.figure([r["ratio"] for r in mine], "times fewer bytes")
        figures[f"density_{name}"] = results.figure(
            [r["density"] for r in mine], "% per 10^6 bytes"
        )
    searched = [row for row in rows if row["searcher"] == "ppo"]
    figures["kl_ratio"] = results.figure([r["kl_ratio"] for r in searched], "KL of uniform / ppo")
    figures["seconds"] = results.figure([r["seconds"] for r in searched], "s, command to end")
    for name, value in figures.items():
        sd = f" ± {value['sd']:.2f}" if value["sd"] is not None else ""
        print(f"{name:20}{value['value']:10.2f}{sd}  {value['unit']}  (n = {value['n']})")
    print(results.write(experiment.replace("-", "_"), figures, rows), flush=True)


def main() -> None:
    parser = results.parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="the first seed alone")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--experiment", default="quickstart")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    seeds = [int(seed) for seed in options.seeds.split(",")]
    for seed in seeds[:1] if options.quick else seeds:
        rows += run(options.experiment, seed)
        summarise(options.experiment, rows)


if __name__ == "__main__":
    main()
