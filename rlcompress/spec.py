"""Experiments: load `experiments.yaml`, merge, validate, and write what was resolved.

Merge order: `defaults` <- the `extends` chain, root first <- the experiment <- `--set`.
Mappings merge key by key and lists replace. A `model` or `data` that changes its `factory`
does not inherit the `args` of the old one. The options themselves are in `schema`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from rlcompress.core.errors import UserError, did_you_mean
from rlcompress.core.files import save_bytes
from rlcompress.schema import (
    NAME,
    Alone,
    CalibrationSpec,
    DataSpec,
    DenseSpec,
    Experiment,
    ExportSpec,
    ModelSpec,
    PPOSpec,
    SearchSpec,
    TicketSpec,
    TrackingSpec,
    spec_hash,
)
from rlcompress.schema.complaints import Loc, problems, show

__all__ = [
    "CalibrationSpec",
    "DataSpec",
    "DenseSpec",
    "Experiment",
    "ExperimentFile",
    "ExportSpec",
    "ModelSpec",
    "PPOSpec",
    "Resolved",
    "SearchSpec",
    "SpecError",
    "TicketSpec",
    "TrackingSpec",
    "load_experiments",
    "override",
    "read_resolved",
    "resolve",
    "spec_hash",
    "write_resolved",
]


class SpecError(UserError):
    """Everything that is wrong with an experiment, one line a problem."""

    @property
    def lines(self) -> list[str]:
        return str(self).split("\n")


# A blank `quickstart:` is a mapping without keys, not a mistake.
_blank = BeforeValidator(lambda value: {} if value is None else value)
_Name = Annotated[str, Field(pattern=NAME)]


class _Entry(BaseModel):
    """An experiment as written: its own keys are validated once they are merged."""

    model_config = ConfigDict(extra="allow", strict=True)
    extends: str | None = None


class _Layout(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    defaults: Annotated[dict[str, Any], _blank] = {}
    experiments: dict[_Name, Annotated[_Entry, _blank]]


class _RunFile(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    experiment: str
    hash: str
    spec: Experiment


@dataclass(frozen=True)
class ExperimentFile:
    """An experiments file whose layout is sound; `resolve` validates an experiment in it.

    defaults      keys that every experiment starts from
    experiments   name -> the experiment's own keys
    extends       name -> the experiment it starts from, or None
    """

    path: Path
    defaults: Mapping[str, Any]
    experiments: Mapping[str, Mapping[str, Any]]
    extends: Mapping[str, str | None]


class Resolved(NamedTuple):
    """What a run folder's `spec.yaml` holds; `hash` is the one it was written with."""

    name: str
    experiment: Experiment
    hash: str


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    problem = f'the key "{key.value}" is given twice'
                    raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Block style, lists on one line; quotes what `_Loader` would read as a number."""


_EXPONENT = re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$")
for _kind in (_Loader, _Dumper):
    # YAML 1.1 reads 1e-3, without a dot, as text.
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))
_Dumper.add_representer(
    list,
    lambda dumper, items: dumper.represent_sequence("tag:yaml.org,2002:seq", items, True),
)


def _parse(text: str, where: str) -> Any:
    """YAML as plain values. Raises SpecError with one line that starts with `where`."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise SpecError(f"{where}: {place}{error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise SpecError(f"{where}: not YAML: {' '.join(str(error).split())}") from None


def _read(path: Path, hint: str) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SpecError(f"{path}: no such file; {hint}") from None
    except OSError as error:
        raise SpecError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise SpecError(f"{path}: not UTF-8 text, at byte {error.start}") from None
    return _parse(text, str(path))


def load_experiments(path: Path | str) -> ExperimentFile:
    """Read a file of experiments and check its layout.

    Raises SpecError if it is missing, is not YAML, or is laid out wrongly. The options of an
    experiment are checked by `resolve`, so that a mistake in one spares the others.
    """
    path = Path(path)
    raw = _read(path, "run from the folder that has it, or name it with --file PATH")
    try:
        layout = _Layout.model_validate(raw)
    except ValidationError as error:
        raise SpecError(*problems(_Layout, error, lambda loc: f"{path}: ")) from None
    entries = layout.experiments
    return ExperimentFile(
        path=path,
        defaults=layout.defaults,
        experiments={name: entry.model_extra or {} for name, entry in entries.items()},
        extends={name: entry.extends for name, entry in entries.items()},
    )


def single(path: Path, name: str, content: Mapping[str, Any]) -> ExperimentFile:
    """A file of one experiment that need not be written yet."""
    return ExperimentFile(path, {}, {name: content}, {name: None})


def write_single(path: Path, name: str, content: Mapping[str, Any]) -> None:
    """What `load_experiments` reads as `single`."""
    text = yaml.dump({"experiments": {name: dict(content)}}, Dumper=_Dumper, sort_keys=False)
    save_bytes(path, text.encode())


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            value = _merge(old, value)
        merged[key] = value
    return merged


def _merge_experiment(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    base = dict(base)
    for section in ("model", "data"):
        old, new = base.get(section), over.get(section)
        if not isinstance(old, Mapping) or not isinstance(new, Mapping):
            continue
        if "factory" in old and new.get("factory", old["factory"]) != old["factory"]:
            base[section] = {key: value for key, value in old.items() if key != "args"}
    return _merge(base, over)


def _chain(file: ExperimentFile, name: str) -> list[str]:
    """The experiments that `name` is built from, root first."""
    names: list[str] = []
    current: str | None = name
    while current is not None:
        if current in names:
            loop = " -> ".join([*names[names.index(current) :], current])
            raise SpecError(f"{file.path}: {name}: extends goes round in a circle: {loop}")
        if current not in file.experiments:
            known = sorted(file.experiments)
            user = f"{names[-1]}: extends = {show(current)}" if names else current
            near = did_you_mean(current, known)
            raise SpecError(
                f"{file.path}: {user}: no such experiment{near} (there are: {', '.join(known)})"
            )
        names.append(current)
        current = file.extends[current]
    return names[::-1]


def _overrides(texts: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """`KEY=VALUE` texts as one partial experiment, and what is wrong with them."""
    values: dict[str, Any] = {}
    lines: list[str] = []
    for text in texts:
        key, equals, value = text.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            lines.append(f"--set {text}: must be KEY=VALUE, such as search.episodes=50")
            continue
        try:
            nested = _parse(value, f"--set {text}")
        except SpecError as error:
            lines += error.lines
            continue
        for part in reversed(parts):
            nested = {part: nested}
        values = _merge(values, nested)
    return values, lines


def override(key: str, text: str) -> str:
    """`KEY=VALUE` that sets `key` to this text, whatever else YAML would read in it."""
    try:
        plain = _parse(text, key) == text
    except SpecError:
        plain = False
    return f"{key}={text if plain else json.dumps(text, ensure_ascii=False)}"


def _holds(values: Any, loc: Loc) -> bool:
    for part in loc:
        if not isinstance(values, Mapping) or part not in values:
            return isinstance(values, list)
        values = values[part]
    return True


def resolve(file: ExperimentFile, name: str, overrides: Sequence[str] = ()) -> Experiment:
    """Merge and validate experiment `name`; overrides are `section.key=VALUE`, VALUE in YAML.

    Raises SpecError with every problem at once: unknown names and keys with the nearest match,
    values out of range, `extends` that leads nowhere or in a circle.
    """
    values, lines = _overrides(overrides)
    try:
        chain = _chain(file, name)
    except SpecError as error:
        raise SpecError(*error.lines, *lines) from None
    here = f"{file.path}: {name}"
    layers = [(f"{here}: (from defaults) ", file.defaults)]
    layers += [(f"{here}: (from {parent}) ", file.experiments[parent]) for parent in chain[:-1]]
    layers += [(f"{here}: ", file.experiments[name]), (f"{here}: --set ", values)]

    def where(loc: Loc) -> str:
        return next((label for label, layer in reversed(layers) if _holds(layer, loc)), f"{here}: ")

    merged: dict[str, Any] = {}
    for _, layer in layers:
        merged = _merge_experiment(merged, layer)
    try:
        experiment = Experiment.model_validate(merged)
    except ValidationError as error:
        raise SpecError(*lines, *problems(Experiment, error, where)) from None
    if lines:
        raise SpecError(*lines)
    return experiment


def resolve_alone(model: str, shape: str, classes: int) -> Alone:
    """A network without data; `shape` is "C,H,W". Raises SpecError with every problem at once."""
    try:
        return Alone.model_validate({"model": model, "input": shape, "classes": classes})
    except ValidationError as error:
        raise SpecError(*problems(Alone, error, lambda loc: "--")) from None


def write_resolved(experiment: Experiment, name: str, path: Path | str) -> None:
    """Write every option, defaults too, and the hash; whole or not there."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "experiment": name,
        "hash": spec_hash(experiment),
        "spec": experiment.model_dump(mode="json"),
    }
    save_bytes(path, yaml.dump(content, Dumper=_Dumper, sort_keys=False).encode())


def read_resolved(path: Path | str) -> Resolved:
    """The inverse of `write_resolved`. Raises SpecError on a file that is missing or unsound."""
    path = Path(path)
    raw = _read(path, "a run writes it when it starts")
    try:
        stored = _RunFile.model_validate(raw)
    except ValidationError as error:
        raise SpecError(*problems(_RunFile, error, lambda loc: f"{path}: ")) from None
    return Resolved(stored.experiment, stored.spec, stored.hash)
