"""Eight faults, ten times each: does the same command end the run, with nothing lost?

    uv run python -m benchmarks.faults                    # hours; goes on where it was stopped
    uv run python -m benchmarks.faults --rounds 1         # each fault once
    uv run python -m benchmarks.faults --faults sigterm,node

Every fault strikes a process of its own on a tiny VGG-19 on digits (`benchmarks.stage_set`), at a
moment that the run's files tell, another one in each round (`benchmarks.faulty`). It survives if,
after at most the same command again,

- every archive line that was there before is there, none is doubled, none is missing,
- the fault ended the command as the README says, without a traceback,
- MLflow holds what it holds after an undisturbed run, nothing twice, nothing left open,
- the area under the front is not below that of undisturbed searches: not more than three standard
  deviations of theirs below their mean, over other draws.

`disk_full` mounts a tmpfs and so needs root; without, it is left out and said so. Every fault is a
line of runs/faults.jsonl.
"""

from __future__ import annotations

import os
import shutil
import statistics
from pathlib import Path
from typing import Any

from benchmarks import faulty, results, stage_set

PATH = Path("runs") / "faults.jsonl"
#: Env runners of the undisturbed searches.
UNDISTURBED = (1, 2, 3, 4)


def floor(rows: list[dict[str, Any]]) -> float:
    """The lowest front that may count as an undisturbed search's."""
    areas = [row["front"] for row in rows if row["fault"] == "none"]
    return statistics.mean(areas) - 3 * statistics.stdev(areas) if len(areas) > 1 else 1.0


def survived(row: dict[str, Any], lowest: float) -> bool:
    counts = row["lost"] + row["doubled"] + row["missing"]
    return not counts and not row["wrong"] and row["front"] >= lowest - 1e-9


def summarise(rows: list[dict[str, Any]]) -> None:
    """Prints the table and writes the result file."""
    lowest = floor(rows)
    struck = [row for row in rows if row["fault"] != "none"]
    print(f"\n{'fault':20}{'n':>4}{'survived':>10}{'lost':>6}{'doubled':>9}{'front':>8}{'s':>6}")
    for name in faulty.FAULTS:
        mine = [row for row in struck if row["fault"] == name]
        if mine:
            lost, doubled = (sum(row[key] for row in mine) for key in ("lost", "doubled"))
            front, seconds = (
                statistics.mean(row[key] for row in mine) for key in ("front", "seconds")
            )
            count = sum(survived(row, lowest) for row in mine)
            print(f"{name:20}{len(mine):4}{count:10}{lost:6}{doubled:9}{front:8.3f}{seconds:6.0f}")
        for row in mine:
            for text in row["wrong"]:
                print(f"  round {row['turn']}: {text}")
    print(f"undisturbed fronts: from {lowest:.3f} on")
    searches = [r["front"] for r in struck if faulty.FAULTS[r["fault"]].ended == "dense"]
    figures = {
        "survived": {
            **results.figure([survived(row, lowest) for row in struck], f"of {len(struck)}"),
            "value": sum(survived(row, lowest) for row in struck),
            "sd": None,
        },
        "lost_lines": {
            **results.figure([row["lost"] for row in struck], f"in {len(struck)} faults"),
            "value": sum(row["lost"] for row in struck),
            "sd": None,
        },
    }
    if searches:
        figures["front_ratio"] = results.figure(searches, "area / an undisturbed search's")
    for name, value in figures.items():
        print(f"{name:20}{value['value']:8.3f}  {value['unit']}")
    print(results.write("faults", figures, rows), flush=True)


def main() -> None:
    parser = results.parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="the same as --rounds 1")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--faults", default=",".join(faulty.FAULTS))
    options = parser.parse_args()
    names = options.faults.split(",")
    if unknown := set(names) - set(faulty.FAULTS):
        parser.error(f"no such fault: {', '.join(unknown)}; there are {', '.join(faulty.FAULTS)}")
    if "disk_full" in names and os.geteuid() != 0:
        print("disk_full is left out: only root can mount a tmpfs")
        names.remove("disk_full")
    folder, key = stage_set.HOME.resolve(), stage_set.KEY
    rows = results.Rows(PATH)

    def mine() -> list[dict[str, Any]]:
        return [row for row in rows.rows if row["key"] == key]

    whole = stage_set.prepare()
    # What no fault touched comes first: it says which fronts are another draw's.
    plan = [("none", turn) for turn in range(len(UNDISTURBED))]
    plan += [(n, turn) for turn in range(1 if options.quick else options.rounds) for n in names]
    for name, turn in plan:
        if any(row["fault"] == name and row["turn"] == turn for row in mine()):
            continue
        place = folder / f"{name}-{turn}"
        if place.exists():
            shutil.rmtree(place)
        found: dict[str, Any]
        try:
            if name == "none":
                found = {"front": faulty.undisturbed(place, whole, UNDISTURBED[turn])}
            else:
                found = faulty.play(name, place, whole, turn)
        except stage_set.MissedError as error:
            print(f"{name}, round {turn}: missed, nothing struck: {error}", flush=True)
            continue
        finally:
            shutil.rmtree(place)
        about = {"key": key, "fault": name, "turn": turn, "commit": results.commit()}
        rows.append({**about, **found})
        print({"fault": name, "turn": turn, **found}, flush=True)
    summarise(mine())


if __name__ == "__main__":
    main()
