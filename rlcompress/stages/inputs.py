"""What each result of a run depends on, as text: made from other inputs, it is not this run's."""

from __future__ import annotations

import json
from dataclasses import dataclass

from rlcompress.spec import CalibrationSpec, Experiment, SearchSpec, spec_hash

#: Goes up when the same options come to mean other measurements: older searches are set aside.
MEASUREMENTS = "10"
DENSE = ("model", "data", "dense", "seed")


@dataclass(frozen=True)
class Inputs:
    """Of the results of one experiment. `weights`: digest of its `dense.weights`, "" without."""

    experiment: Experiment
    weights: str

    @property
    def dense(self) -> str:
        return self._hashed(self.experiment, *DENSE)

    @property
    def estimates(self) -> str:
        """Whoever needs them first makes them, also outside a search and so before its folder is
        claimed."""
        e = self._searched()
        parts = {"keeps", "bits", "clip", "round_to"}
        search = e.search.model_dump(mode="json", include=parts)
        return f"{self._hashed(e, *DENSE, 'calibration')} {json.dumps(search, sort_keys=True)}"

    @property
    def search(self) -> str:
        """All that gives a measurement or a proposal its meaning."""
        e = self._searched()
        # Without defaults: a new option orphans no old search.
        search = e.search.model_dump(mode="json", exclude_defaults=True)
        hashed = self._hashed(e, *DENSE, "calibration", "ppo")
        return f"{MEASUREMENTS} {hashed} {json.dumps(search, sort_keys=True)}"

    @property
    def ticket(self) -> str:
        """Of a schedule's ticket, beside the schedule; not how many there are."""
        e = self.experiment
        plain = e.ticket.model_dump(mode="json", exclude={"top", "floor"}, exclude_defaults=True)
        # The images that are left choose among the arms.
        plain |= e.calibration.model_dump(include={"final_images"}, exclude_defaults=True)
        return f"{self.search} {e.search.finalists} {json.dumps(plain, sort_keys=True)}"

    @property
    def tune(self) -> str:
        """Of the trials of `tune`, beside the policy that they begin with."""
        e = self.experiment
        evaluations = e.tune.trial_episodes or e.search.episodes
        return f"{self.search} {spec_hash(e, 'tune')} {evaluations} {e.ticket.floor:g}"

    @property
    def dynamic(self) -> str:
        """Of compression during training, beside the policy that decides. Its episodes are scored
        by the images of the finalists."""
        sections = (*DENSE, "calibration", "dynamic", "ppo", "search")
        return f"{MEASUREMENTS} {self._hashed(self._uncounted(), *sections)}"

    @property
    def samples(self) -> str:
        """Of what is measured of a network of the zoo, beside the range of sizes."""
        return self._hashed(self._searched(), *DENSE, "calibration", "search")

    @property
    def policy(self) -> str:
        """Of a policy that a zoo trains, and how the experiment's own network judges it."""
        sections = (*DENSE, "calibration", "search", "ppo", "zoo")
        return f"{MEASUREMENTS} {self._hashed(self._searched(), *sections)}"

    def _hashed(self, experiment: Experiment, *sections: str) -> str:
        hashed = spec_hash(experiment, *sections)
        return f"{hashed} {self.weights}" if self.weights else hashed

    def _uncounted(self) -> Experiment:
        """With defaults for how many schedules are measured, and by whom."""
        # Whose policy a searcher began with is noted beside its records.
        names = {"searcher", "baselines", "policy"}
        names |= {"episodes", "baseline_episodes", "finalists", "cache_mb"}
        search = self.experiment.search.model_copy(update=SearchSpec().model_dump(include=names))
        return self.experiment.model_copy(update={"search": search})

    def _searched(self) -> Experiment:
        """As `_uncounted`, and with the default for images that no search has to do with: those
        that score one do not depend on how many more score finalists."""
        plain = CalibrationSpec().model_dump(include={"final_images"})
        calibration = self.experiment.calibration.model_copy(update=plain)
        return self._uncounted().model_copy(update={"calibration": calibration})
