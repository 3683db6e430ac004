"""`rlcompress compress`: the whole job for one network, without an experiments file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from rlcompress.cli import interrupt
from rlcompress.cli.app import app
from rlcompress.cli.options import Sets, check_folder
from rlcompress.core.errors import UserError

#: Of the target: schedules up to this much smaller are tried too.
ROOM = 1.1


def _ratio(text: str) -> float:
    """20, 20x, 7.5x -> a size ratio."""
    if not re.fullmatch(r"\d+(\.\d+)?x?", text) or (ratio := float(text.rstrip("x"))) <= 1:
        raise UserError(f"--target {text}: must be a number above 1 such as 20x, times fewer bytes")
    return ratio


@app.command()
def compress(
    model: Annotated[
        str, typer.Option("--model", metavar="PKG.MOD:FACTORY", help="Makes the network.")
    ],
    data: Annotated[
        str,
        typer.Option("--data", metavar="PKG.MOD:FACTORY", help="Makes train, validation, test."),
    ],
    target: Annotated[
        str, typer.Option("--target", metavar="TIMES", help="Times fewer bytes on disk, as in 20x.")
    ],
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights",
            metavar="FILE",
            help="Trained weights (.safetensors, .pt); else it is trained.",
        ),
    ] = None,
    evaluations: Annotated[
        int, typer.Option("--evaluations", metavar="N", min=1, help="Schedules to measure.")
    ] = 25,
    sets: Sets = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="The run folder.  [default: runs/FACTORY]"),
    ] = None,
) -> None:
    """Make one network small: model, data and a target in, a ticket out.

    \b
    rlcompress compress --model vgg19 --data digits --target 20x --set model.args.width=0.25
    rlcompress compress --model mynet:build --data mydata:load --target 20x --weights mynet.pt
    """
    from rlcompress import spec

    ratio = _ratio(target)
    content: dict[str, Any] = {
        "description": f"rlcompress compress --target {target}",
        "model": {"factory": model},
        "data": {"factory": data},
        "dense": {"weights": weights},
        "search": {
            "searcher": "transfer",
            "policy": "default",
            "baselines": [],
            "episodes": evaluations,
            "target": [ratio, round(ROOM * ratio, 3)],
        },
    }
    name = re.sub(r"\W", "-", model.rpartition(":")[2]) or "network"
    folder = out or Path("runs") / name
    # An experiments file of its own: with it every other verb works on this run.
    path = folder / "experiments.yaml"
    experiment = spec.resolve(spec.single(Path("compress"), name, content), name, sets or ())
    check_folder(folder)
    interrupt.folder = folder
    folder.mkdir(parents=True, exist_ok=True)
    spec.write_single(path, name, content)
    words = ["--file", str(path), *(word for text in sets or () for word in ("--set", text))]

    from rlcompress import stages

    stages.Run(name, experiment, folder, [*words, "--out", str(folder)]).run()
