"""Policies trained on the zoo without the family of the network that they are tried on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlcompress import spec
from rlcompress.core.files import save_bytes
from rlcompress.core.learned import Lessons, fit
from rlcompress.core.policy import LEARNED, save_policy
from rlcompress.rl.play import environment_options
from rlcompress.stages.workspace import Workspace
from rlcompress.stages.zoo import lessons_of, members, new_policy, play_zoo, sample

#: Network of `benchmarks.networks` -> how the names of its family begin in the zoo.
FAMILIES = {"vgg19": "vgg", "mobilenetv2": "mobilenet", "resnet18": "resnet"}


def family_of(member: str) -> str:
    """Of a name in the zoo."""
    named = (family for family in FAMILIES.values() if member.startswith(family))
    return next(named, member.split("-")[0])


#: Of the zoo, for a quick look.
QUICK = ("cnn-1.0-digits", "squeezenet-0.5-digits", "mobilenetv1-0.25-digits", "cnn-0.5-fashion")
QUICK_SAMPLES = 12


def zoo(*, quick: bool = False) -> Workspace:
    """In `runs/zoo`, where `rlcompress train-policy zoo` works too; four of its networks with a few
    samples each in `runs/zoo-quick`."""
    experiments = spec.load_experiments(Path("experiments.yaml"))
    sets = ["threads=1", "ppo.num_env_runners=0"]
    experiment = spec.resolve(experiments, "zoo", sets)
    if not quick:
        return Workspace("zoo", experiment, Path("runs") / "zoo")
    few = {name: experiment.zoo.networks[name] for name in QUICK}
    small = experiment.zoo.model_copy(update={"networks": few, "samples": QUICK_SAMPLES})
    experiment = experiment.model_copy(update={"zoo": small})
    return Workspace("zoo-quick", experiment, Path("runs") / "zoo-quick")


def lessons(run: Workspace) -> dict[str, Lessons]:
    """Of the zoo's networks."""
    return {name: lessons_of(member, sample(member)) for name, member in members(run).items()}


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


def held_out_policy(network: str, seed: int, episodes: int = 0, *, quick: bool = False) -> Path:
    """The folder of a policy that never saw the network's family, trained if need be; its prior
    learned on the zoo, the policy itself from so many episodes of PPO over the zoo."""
    family = FAMILIES[network]
    played = f"-ppo{episodes}" if episodes else ""
    place = "transfer-quick" if quick else "transfer"
    folder = Path("runs") / place / f"without-{family}-{seed}{played}"
    run, done = zoo(quick=quick), folder / "done"
    made_of = run.inputs.policy
    if not done.exists() or done.read_text() != made_of:
        chosen = {n: m for n, m in members(run).items() if not n.startswith(family)}
        sampled = {name: sample(member) for name, member in chosen.items()}
        folder.mkdir(parents=True, exist_ok=True)
        learned = fit([lessons_of(chosen[n], sampled[n]) for n in chosen], seed=seed)
        learned.save(folder / LEARNED)
        ppo = run.experiment.ppo
        policy = new_policy(ppo.hidden)
        if episodes:
            run.experiment = run.experiment.model_copy(update={"seed": seed})
            policy, episodes = play_zoo(run, chosen, sampled, learned, folder, episodes)
        about = {"networks": list(chosen), "seed": seed, "episodes": episodes}
        save_policy(folder, policy, {**about, **environment_options(ppo)})
        save_bytes(done, made_of.encode())
    return folder
