"""The verbs on an experiment."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from rlcompress.cli import complete
from rlcompress.cli.app import app
from rlcompress.cli.options import (
    FILE,
    AsJson,
    File,
    Name,
    Out,
    Sets,
    experiment_verb,
    open_run,
)
from rlcompress.core.errors import UserError

if TYPE_CHECKING:
    from rlcompress.stages import Run


#: Of `check`: options that go with an experiment, and with --model.
_WITH_NAME = {"file": "--file", "sets": "--set", "out": "--out"}
_WITH_MODEL = {"shape": "--input", "classes": "--classes"}


@app.command()
def check(
    ctx: typer.Context,
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[EXPERIMENT]", help="A name that `ls` lists.", autocompletion=complete.names
        ),
    ] = None,
    file: File = FILE,
    sets: Sets = None,
    out: Out = None,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="PKG.MOD:FACTORY", help="A network alone, without data."),
    ] = None,
    shape: Annotated[
        str, typer.Option("--input", metavar="C,H,W", help="With --model: shape of one image.")
    ] = "3,224,224",
    classes: Annotated[
        int, typer.Option("--classes", metavar="N", min=1, help="With --model: its num_classes.")
    ] = 10,
    as_json: AsJson = False,
) -> None:
    """Print the layers and groups, one evaluation, and the time to expect. Starts no Ray.

    \b
    rlcompress check quickstart
    rlcompress check --model torchvision.models:resnet18 --input 3,224,224
    """
    if (name is None) == (model is None):
        raise UserError("check wants an EXPERIMENT or --model PKG.MOD:FACTORY, one of the two")
    ignored = _WITH_MODEL if model is None else _WITH_NAME
    sources = {flag: ctx.get_parameter_source(key) for key, flag in ignored.items()}
    if given := [
        flag for flag, source in sources.items() if source and source.name == "COMMANDLINE"
    ]:
        kind = "--model, a network alone" if model is None else "an EXPERIMENT"
        raise UserError(f"check: {', '.join(given)}: only with {kind}")
    if model is None:
        assert name is not None
        return open_run(name, file, sets, out).check(as_json=as_json)
    from rlcompress import spec

    alone = spec.resolve_alone(model, shape, classes)
    from rlcompress.stages.check import check_model

    check_model(alone.model, alone.input, alone.classes, as_json=as_json)


@app.command()
@experiment_verb(begins=True, fresh=True, shorts=["searcher"])
def run(run: Run) -> None:
    """Run all stages: dense, search, ticket, export, report. Goes on where it stopped.

    \b
    rlcompress run quickstart
    rlcompress run quickstart --searcher knapsack --out runs/quickstart-knapsack
    rlcompress run quickstart --set search.episodes=50 --fresh
    """
    run.run()


@app.command()
@experiment_verb(begins=True, fresh=True, shorts=["searcher", "sensitivity"], json=True)
def search(run: Run, as_json: bool) -> None:
    """Train the dense network if need be, then search for schedules.

    \b
    rlcompress search quickstart
    rlcompress search quickstart --searcher random --out runs/quickstart-random
    rlcompress search quickstart --searcher knapsack --sensitivity refitted
    """
    run.search(as_json=as_json)


@app.command()
@experiment_verb(begins=True, shorts=["searcher"])
def ticket(run: Run) -> None:
    """Retrain the best schedules into tickets, with their controls.

    \b
    rlcompress ticket quickstart
    rlcompress ticket quickstart --set ticket.top=3 --set ticket.floor=0.5
    """
    run.ticket()


@app.command()
@experiment_verb(begins=True)
def tune(run: Run) -> None:
    """Search PPO's reward and settings with Ray Tune; one front of all trials.

    \b
    rlcompress tune quickstart --set tune.trials=8
    """
    run.tune()


@app.command()
@experiment_verb(begins=True)
def dynamic(run: Run) -> None:
    """Compress the network during one training run, with the policy in the loop.

    \b
    rlcompress dynamic quickstart
    rlcompress dynamic quickstart --set dynamic.target=40 --set dynamic.policy_episodes=16
    """
    run.dynamic()


@app.command()
@experiment_verb(shorts=["searcher"])
def export(run: Run) -> None:
    """Write tickets at the size they claim: packed weights, ONNX.

    \b
    rlcompress export quickstart
    rlcompress export quickstart --set export.onnx=false
    """
    run.export()


@app.command()
@experiment_verb(shorts=["searcher"])
def report(run: Run) -> None:
    """Draw the figures and write report/index.html.

    \b
    rlcompress report quickstart
    """
    run.report()


@app.command("train-policy")
@experiment_verb(begins=True)
def train_policy(run: Run) -> None:
    """Train one policy on the networks of `zoo`, for networks it never saw.

    \b
    rlcompress train-policy zoo
    rlcompress train-policy zoo --set zoo.ppo_episodes=400 --set ppo.num_env_runners=8
    """
    run.train_policy()


@app.command()
def transfer(
    name: Name,
    policy: Annotated[
        str,
        typer.Option(
            "--policy",
            metavar="RUN_OR_ALIAS",
            help="A run folder, NAME@ALIAS in MLflow's registry, or default.",
        ),
    ] = "default",
    evaluations: Annotated[
        int,
        typer.Option("--evaluations", metavar="N", min=1, help="Schedules to measure in all."),
    ] = 10,
    file: File = FILE,
    sets: Sets = None,
    out: Out = None,
) -> None:
    """Compress an experiment's network with a policy trained on others: one episode for each of up
    to 24 sizes, then local search with what evaluations are left.

    \b
    rlcompress transfer quickstart
    rlcompress transfer resnet18-fashion --policy runs/zoo --evaluations 50
    rlcompress transfer quickstart --policy NAME@champion --set tracking.uri=http://SERVER:5000
    """
    from rlcompress import spec

    given = ["search.searcher=transfer", spec.override("search.policy", policy)]
    given += [f"search.episodes={evaluations}", "search.baselines=[]"]
    overrides = [*given, *(sets or ())]  # what --set says wins
    open_run(name, file, overrides, out, begins=True).transfer()
