"""Policies trained on the zoo without the family of the network that they are tried on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlcompress import spec
from rlcompress.core.learned import Lessons, fit
from rlcompress.core.policy import LEARNED, save_policy
from rlcompress.rl.play import environment_options
from rlcompress.stages.workspace import Workspace
from rlcompress.stages.zoo import lessons_of, members, new_policy, sample

#: Network of `benchmarks.networks` -> how the names of its family begin in the zoo.
FAMILIES = {"vgg19": "vgg", "mobilenetv2": "mobilenet", "resnet18": "resnet"}


def family_of(member: str) -> str:
    """Of a name in the zoo."""
    named = (family for family in FAMILIES.values() if member.startswith(family))
    return next(named, member.split("-")[0])


def zoo() -> Workspace:
    """In `runs/zoo`, where `rlcompress train-policy zoo` works too."""
    experiments = spec.load_experiments(Path("experiments.yaml"))
    sets = ["threads=1", "ppo.num_env_runners=0"]
    return Workspace("zoo", spec.resolve(experiments, "zoo", sets), Path("runs") / "zoo")


def lessons(run: Workspace, without: str = "") -> dict[str, Lessons]:
    """Of the zoo's networks, but those whose names begin with `without`."""
    chosen = {n: m for n, m in members(run).items() if not (without and n.startswith(without))}
    return {name: lessons_of(member, sample(member)) for name, member in chosen.items()}


def lessons_by_samples(
    run: Workspace, counts: Sequence[int | None]
) -> dict[int | None, dict[str, Lessons]]:
    """Of all the zoo's networks, from the first so many samples of each; None: from all."""
    found = {name: (member, sample(member)) for name, member in members(run).items()}
    return {
        count: {
            name: lessons_of(member, records[:count]) for name, (member, records) in found.items()
        }
        for count in counts
    }


def held_out_policy(network: str, seed: int) -> Path:
    """The folder of a policy that never saw the network's family, trained if need be."""
    family = FAMILIES[network]
    folder = Path("runs") / "transfer" / f"without-{family}-{seed}"
    if not (folder / "policy.json").exists():
        run = zoo()
        known = lessons(run, family)
        folder.mkdir(parents=True, exist_ok=True)
        fit(list(known.values()), seed=seed).save(folder / LEARNED)
        ppo = run.experiment.ppo
        about = {"networks": list(known), "seed": seed, **environment_options(ppo)}
        save_policy(folder, new_policy(ppo.hidden), about)
    return folder
