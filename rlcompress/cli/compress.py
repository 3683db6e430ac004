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
        raise UserError(
            f"--target {text}: times fewer bytes; allowed: a number above 1, such as 20x or 7.5"
        )
    return ratio


def _name(model: str, data: str, target: str) -> str:
    """Of the experiment and its folder: what differs in one of these is another run. An experiments
    file may have it."""
    words = [text.replace(":", "-").rpartition(".")[2] for text in (model, data)]
    return re.sub(r"[^A-Za-z0-9_-]", "_", "-".join([*words, target])).lstrip("_-")


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
        typer.Option(
            "--out", metavar="DIR", help="The run folder.  [default: runs/MODEL-DATA-TARGET]"
        ),
    ] = None,
) -> None:
    """Make one network small: model, data and a target in, a ticket out.

    \b
    rlcompress compress --model vgg19 --data digits --target 20x --set model.args.width=0.25
    rlcompress compress --model mynet:build --data mydata:load --target 20x --weights mynet.pt
    """
    from rlcompress import spec, stages
    from rlcompress.core.models import find_factory
    from rlcompress.stages.preflight import Problems, require_possible

    problems = Problems()
    ratio = _ratio(target) if problems.none_in(lambda: _ratio(target)) else 20.0
    if weights == "":  # a shell variable that is not set; without weights it would be trained
        problems.lines.append("--weights: empty; allowed: a file, or no --weights to train one")
    name = _name(model, data, f"{ratio:g}x")
    content: dict[str, Any] = {
        "description": f"rlcompress compress --target {target}",
        "model": {"factory": model},
        "data": {"factory": data},
        "dense": {"weights": weights or None},
        "search": {
            "searcher": "transfer",
            "policy": "default",
            "baselines": [],
            "episodes": evaluations,
            "target": [ratio, round(ROOM * ratio, 3)],
        },
    }
    folder = out or Path("runs") / name
    check_folder(folder)
    try:
        experiment = spec.resolve(spec.single(Path("compress"), name, content), name, sets or ())
    except UserError as error:
        problems.lines += str(error).splitlines()
        for factory in (model, data):
            if ":" in factory:  # of other names `resolve` has told
                problems.none_in(lambda name=factory: find_factory(name, {}))  # type: ignore[misc]
    else:
        # An experiments file of its own: with it every other verb works on this run.
        path = folder / "experiments.yaml"
        run = stages.Run(name, experiment, folder, ["--file", str(path), "--out", str(folder)])
        problems.none_in(lambda: require_possible(run.workspace))
    problems.tell()
    interrupt.folder = folder
    run.run(write=path)
